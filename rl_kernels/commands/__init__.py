"""The commands of ``python -m rl_kernels``, one a module; ``qualify``'s is in ``rl_kernels.qualify``.

Nothing imports a command but ``rl_kernels.__main__``, when it is called: what one needs beyond torch is no other's.
"""
