"""The four ways of a call through torch, and which one it takes: the first that fits.

The order matters, each way is there for what the later ones break:

* ``autocast``: autocast is on. The activation is cast as torch's own layers cast, and the call made anew with it off.
* ``composite``: a functorch transform or forward-mode AD is active, or an argument is a tensor subclass or batched.
  The recipe in plain aten (``composite.py``), which torch can differentiate, batch and shard in every way it knows.
  This one materialises the mixed weight; so do the registered ops themselves, where a captured graph is transformed.
  But layers of DTensors that are sharded in a common way call the ops on their local shards (``sharding.py``).
* ``op``: compiling, exporting or tracing, or a dispatch mode is active. The registered op, one node for every observer.
* ``lean``: all others. A ``torch.autograd.Function`` around the op.

Before all of them an ordinary call on the CPU is offered once to the C++ extension, whose fast path is the lean way
without a step in Python (``csrc/bindings``). It declines whatever belongs to the first three ways, and bad arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from rl_kernels._extension import without_fast_path
from rl_kernels.ops.values import Recipe

# Tracers wrap every tensor in one of the last two, and see the registered ops.
_PLAIN_TYPES = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)

# Private names of torch, absent from some versions: without them the transform in question cannot be active.
_functorch_is_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_dispatch_stack_depth: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_is_batched: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_batchedtensor", lambda _: False)
_is_legacy_batched: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda _: False)


_plain_torch = False


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, every call goes the composite way: what a user could write in plain torch. For comparisons."""
    global _plain_torch
    previous, _plain_torch = _plain_torch, True
    try:
        with without_fast_path():
            yield
    finally:
        _plain_torch = previous


def _has_autocast(device: str) -> bool:
    return device != "meta" and torch.amp.is_autocast_available(device)


# Before torch 2.12 Dynamo cannot trace the question. torch.compiler.assume_constant_result does this, and imports
# Dynamo, which takes seconds.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts ``x`` to; None where it is off."""
    device = x.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def autocast_cast(dtype: torch.dtype, x: Tensor, recipe: Recipe) -> tuple[Tensor, Recipe]:
    """Cast as autocast casts for torch's layers: everything but float64.

    float32 sources stay as they are: the ops round the mix itself to the dtype of x, so that no cast copy of a whole
    weight is made, and their gradients arrive in float32.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    weights, coefficients, biases = recipe
    if all(weight.dtype == torch.float32 for weight in weights) and dtype != torch.float32:
        return cast(x), recipe
    biases = None if biases is None else [cast(bias) for bias in biases]
    return cast(x), Recipe([cast(weight) for weight in weights], coefficients, biases)


def is_transformed() -> bool:
    """Whether a functorch transform or forward-mode AD is active."""
    return _functorch_is_active() or getattr(forward_ad, "_current_level", -1) >= 0


def needs_composite(tensors: Sequence[Tensor]) -> bool:
    """Whether a call with these arguments goes the composite way."""
    if _plain_torch or is_transformed():
        return True
    if any(type(tensor) not in _PLAIN_TYPES for tensor in tensors):
        return True
    return not torch.compiler.is_compiling() and any(_is_batched(t) or _is_legacy_batched(t) for t in tensors)


def is_observed(activation: Tensor) -> bool:
    """Whether something looks on that has to see the registered op."""
    return (
        torch.compiler.is_compiling()
        or activation.is_meta
        or type(activation) in (FakeTensor, FunctionalTensor)
        or _dispatch_stack_depth() > 0
        or torch.jit.is_tracing()
    )


def needs_lean_node(*tensors: Tensor) -> bool:
    """Whether the lean way has to leave a node for autograd, or may call the op below it."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
