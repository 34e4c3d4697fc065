"""Supervised local learning: networks cut into modules, each of which learns from a loss of its own.

``chain.py`` finds where a model can be cut, ``cutting.py`` chooses where, ``splitting.py`` does it (``split``). A
module is judged by what ``heads.py`` and ``auxiliary.py`` make; ``network.py`` has the step, of which every method of
``methods.py`` is a setting; ``system.py`` trains it with the runner of all systems.
"""

from rl_kernels.systems.local.methods import METHODS, Method
from rl_kernels.systems.local.network import LocalNetwork
from rl_kernels.systems.local.splitting import split

__all__ = ["METHODS", "LocalNetwork", "Method", "split"]
