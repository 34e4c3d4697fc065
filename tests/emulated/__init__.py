"""Executes the PTX of compiled kernels on a CPU, with warps and asynchronous copies in an order that a seed determines.

launch.py is what tests call; ptx.py parses, instructions.py decodes by the families in arithmetic.py, transfers.py,
control.py and matrix.py, machine.py executes, and memory.py reports what an access does wrong as a ``Fault``.

Not seen: the order of plain accesses that hardware may change, what ptxas does, and time. What passes is right as PTX.
"""
