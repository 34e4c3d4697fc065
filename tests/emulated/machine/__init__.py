"""The interpreter: executes the PTX of compiled kernels on a CPU. It knows no backend of the package's.

Warps run in an order, and asynchronous work takes effect at times, that a seed determines.

* ``launch.py``: what tests call: ``run``, on tensors of the host; ``launch_triton.py``: the same for what Triton
  compiles and launches.
* ``ptx.py``: a text parsed into kernels, variables and instructions; ``values.py``: PTX's types, and literals.
* ``instructions.py``: an instruction decoded by the family that its opcode begins with; ``families.py`` registers them:
  ``arithmetic.py``, ``control.py``, ``matrix.py``, ``transfers.py``; for sm_90 ``hopper.py``, ``mbarrier.py``,
  ``tma.py``, ``wgmma.py``.
* ``machine.py``: the launch, its CTAs and warps, executed; ``memory.py``: memories, and what an access does wrong.

How a launch travels: ``launch.run`` parses the text, gives each tensor a region of global memory in which only its
elements are inside, lays out the parameters and the shared and local variables, and hands all that to ``Launch``.
``Launch.run`` takes one CTA after another in an order from the seed. Each instruction was decoded once, to a function
of a warp and its active lanes; a scheduler picks a warp that can go on, and runs one of its instructions. Reads and
writes go through ``memory.Storage``, which keeps for every byte whether it is inside, whether it was written, and by
which warp since which barrier: whatever is out of bounds, uninitialised, misaligned, racing or still under way is a
``Fault``, with the instruction, its line, CTA, warp and lane. Copies that are asynchronous are held back, as late as
waits allow or by chance, so that a missing wait shows. At the end what was written is copied back into the tensors.
"""
