"""The CUDA kernels as the contract wants them: values in, flat arguments to C++ (``csrc/bindings/cuda``).

C++ allocates the outputs, plans the launches (``csrc/cuda/host``) and queues them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rl_kernels._extension import EXTENSION
from rl_kernels.backends.cuda import configs
from rl_kernels.backends.gpu import heuristics
from rl_kernels.ops.values import Geometry, Gradients, Recipe, Wanted

_C: Any = getattr(EXTENSION.module, "cuda", None)

Choose = Callable[..., tuple[int, ...]]
Settings = tuple[Choose | None, tuple[int, int, int, int]]
AS_IS_BEST: Settings = (None, (0, 0, 0, 0))
"""Nothing that a call is held to: no choice of tiles from here, and of ``Held`` in ``csrc/cuda/call.h`` nothing."""


def settings(device: torch.device) -> Settings:
    """What calls are held to where ``heuristics`` is told otherwise than to estimate; tests replace this."""
    if not heuristics.is_told():
        return AS_IS_BEST
    return chooser(device), (int(heuristics.forced() is not None), 0, 0, 0)


def chooser(device: torch.device) -> Choose:
    """The choice of tiles by ``heuristics``, as C++ asks for it."""
    known = heuristics.device_of(device)

    def choose(wgrad: bool, rows: int, columns: int, depth: int, repeats: int, *rest: Any) -> tuple[int, ...]:
        row_bytes, column_bytes, slowness, space = rest
        work = heuristics.Work(rows, columns, depth, row_bytes, column_bytes, 0, slowness, repeats=repeats)
        here = known._replace(shared_bytes=space)
        table = configs.WGRADS if wgrad else configs.PRODUCTS
        config, splits, steps = heuristics.choose(work, configs.usable(table, work, column_bytes, here), here)
        return config.rows, config.columns, config.depth, config.stages, splits, steps

    return choose


def mixed_linear(x: Tensor, recipe: Recipe) -> Tensor:
    return _C.forward(x, *recipe, None, settings(x.device))


def mixed_linear_dgrad(dy: Tensor, recipe: Recipe) -> Tensor:
    return _C.dgrad(dy, recipe.weights, recipe.coefficients, (), None, settings(dy.device))


def mixed_linear_wgrad(
    dy: Tensor, x: Tensor, recipe: Recipe, wanted: Wanted, into: Sequence[Tensor | None] | None = None
) -> Gradients:
    return Gradients(*_C.wgrad(dy, x, recipe, wanted, None, into, settings(dy.device)))


def mixed_conv(x: Tensor, recipe: Recipe, geometry: Geometry) -> Tensor:
    return _C.forward(x, *recipe, geometry, settings(x.device))


def mixed_conv_dgrad(dy: Tensor, recipe: Recipe, input_size: Sequence[int], geometry: Geometry) -> Tensor:
    return _C.dgrad(dy, recipe.weights, recipe.coefficients, input_size, geometry, settings(dy.device))


def mixed_conv_wgrad(
    dy: Tensor,
    x: Tensor,
    recipe: Recipe,
    wanted: Wanted,
    geometry: Geometry,
    into: Sequence[Tensor | None] | None = None,
) -> Gradients:
    return Gradients(*_C.wgrad(dy, x, recipe, wanted, geometry, into, settings(dy.device)))
