"""Whole models: plans, replacing and merging, checkpoints. `toys.py` holds small models, `common.py` what is asked."""
