"""Whole models: plan which blocks are replaced, replace them, and merge them into plain layers again."""

from rl_kernels.conversion.merge import merge
from rl_kernels.conversion.plan import plan
from rl_kernels.conversion.records import Plan
from rl_kernels.conversion.replace import replace
from rl_kernels.conversion.state import Loaded, load_plain_state_dict

__all__ = ["Loaded", "Plan", "load_plain_state_dict", "merge", "plan", "replace"]
