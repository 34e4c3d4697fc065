"""The families of instructions that there are: importing this registers them."""

from tests.emulated.machine import arithmetic, control, hopper, matrix, mbarrier, tma, transfers, wgmma

__all__ = ["arithmetic", "control", "hopper", "matrix", "mbarrier", "tma", "transfers", "wgmma"]
