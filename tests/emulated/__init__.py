"""Executes the PTX of compiled kernels on a CPU, with warps and asynchronous work in an order that a seed determines.

launch.py is what tests call, backend.py what the CUDA backend's do; ptx.py parses, instructions.py decodes by the
families in arithmetic.py, transfers.py, control.py and matrix.py, and for sm_90 in hopper.py, mbarrier.py, tma.py and
wgmma.py; machine.py executes, and memory.py reports what an access does wrong as a ``Fault``.

Not seen: the order of plain accesses that hardware may change, what ptxas does, and time. What passes is right as PTX.
"""
