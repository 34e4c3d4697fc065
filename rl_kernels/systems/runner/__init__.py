"""How a run runs: ``training.py`` is the loop, ``state.py`` a checkpoint's content, ``folder.py`` the files of a run,
``record.py`` what is written and shown meanwhile.
"""
