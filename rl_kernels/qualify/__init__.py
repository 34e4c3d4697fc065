"""``python -m rl_kernels qualify``: which kernels are right on this machine, and where they win.

* ``problems.py``: the layers on which kernels are checked, and those on which they are timed.
* ``correctness.py``: a call held against the float64 reference, and two runs against each other.
* ``timing.py``: a call timed beside its rivals.
* ``command.py``: the command, which writes what these find to a record (``backends/records.py``).
"""
