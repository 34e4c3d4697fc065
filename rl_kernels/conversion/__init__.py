"""Whole models: plan which blocks are replaced, replace them, and merge them into plain layers again."""

from rl_kernels.conversion.checkpoints import Loaded, load_plain_state_dict
from rl_kernels.conversion.merging import merge
from rl_kernels.conversion.planner import plan
from rl_kernels.conversion.plans import Plan
from rl_kernels.conversion.replacing import replace

__all__ = ["Loaded", "Plan", "load_plain_state_dict", "merge", "plan", "replace"]
