"""Systems of papers, trained: ``models.py`` knows nothing of replacement, ``digits.py`` has the data and the training.

(A system is a trained whole. A recipe is how a weight is mixed: ``rl_kernels.ops.values.Recipe``.)
"""
