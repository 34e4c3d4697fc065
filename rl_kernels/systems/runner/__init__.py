"""How a run runs: ``training.py`` is the loop, ``optimizing.py`` what updates the weights, ``state.py`` a checkpoint's
content, ``folder.py`` the files of a run, ``record.py`` what is written and shown meanwhile, ``stopping.py`` signals.
"""
