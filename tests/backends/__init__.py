"""The choice between backends, and the host's side of those for GPUs: pure functions, without a kernel.

`planted.py` is a backend made of functions, for other folders too.
"""
