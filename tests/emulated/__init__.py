"""Compiled kernels, executed on a CPU by the interpreter in ``machine``.

``backend.py`` runs the CUDA backend so, ``problems.py`` has its calls and ``exact.py`` what they should give;
``compilers.py`` runs nvcc.

Not seen: the order of plain accesses that hardware may change, what ptxas does, and time. What passes is right as PTX.
"""
