"""How an op is declared: its schema, its checks, its fake kernel and its FLOP formula, in one call of ``declare``.

An op has one meaning (``backends/reference.py``) and as many implementations as there are backends. Three ops serve a
kind of layer: the forward, the gradient of its input (``dgrad``) and those of its parameters (``wgrad``). The set is
closed under differentiation (``autograd.py``). The ops themselves stand in ``linear.py`` and ``conv.py``.

``wgrad`` returns ``(dweights, dcoefficients, dbiases)``. What its masks do not ask for comes back as an empty tensor
in its place, and is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from rl_kernels.ops.values import Call

LIBRARY = torch.library.Library("rl_kernels", "DEF")

RECIPE = "Tensor[] weights, Tensor coefficients"
"""``(N,)`` or ``(N, out)`` coefficients, in float32, or float64 where the weights are float64."""
WANTED = "bool[] weights_mask, bool coefficients_mask, bool[] biases_mask"
GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
GRADIENTS = "(Tensor[] dweights, Tensor dcoefficients, Tensor[] dbiases)"


class Op(NamedTuple):
    """A declared op.

    Attributes:
        name: in ``torch.ops.rl_kernels``.
        schema: its arguments and results.
        check: raises unless the arguments of a call fit.
        overload: what is called, ``torch.ops.rl_kernels.<name>.default``.
        in_place_overload: of a wgrad, ``<name>_``, which adds the gradient of source j to ``into[j]`` and returns none,
            unless ``into[j]`` is empty; else None. It is eager only (``accumulation.py``).
    """

    name: str
    schema: str
    check: Callable[[Call], None]
    overload: Any
    in_place_overload: Any


OPS: dict[str, Op] = {}
"""Every op by its name, in the order of declaration."""


def declare(
    name: str,
    schema: str,
    check: Callable[[Call], None],
    fake: Callable[[Call], Any],
    flops: Callable[..., int],
) -> Op:
    """Define an op and all that is the same for every backend.

    Args:
        name: in ``torch.ops.rl_kernels``.
        schema: its arguments and results.
        check: raises unless the arguments of a call fit.
        fake: the results of a call that was checked, without their values.
        flops: from the shapes of the arguments: those of the plain layer. (The mix is not counted, as torch counts no
            pointwise work.)
    """

    def fake_kernel(*arguments: Any) -> Any:
        call = Call.of(name, arguments)
        check(call)
        result = fake(call)
        return result if isinstance(result, torch.Tensor) else tuple(result)

    def overload_of(name: str, schema: str) -> Any:
        LIBRARY.define(name + schema)
        return getattr(torch.ops.rl_kernels, name).default

    overload, in_place = overload_of(name, schema), None
    if name.endswith("wgrad"):
        in_place = overload_of(f"{name}_", schema.replace(") ->", ", Tensor(a!)[] into) ->"))
    torch.library.register_fake(f"rl_kernels::{name}", fake_kernel, lib=LIBRARY)
    register_flop_formula(getattr(torch.ops.rl_kernels, name))(flops)
    op = OPS[name] = Op(name, schema, check, overload, in_place)
    return op
