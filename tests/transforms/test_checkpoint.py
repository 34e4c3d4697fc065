"""Activation checkpointing: the gradients stay, and what is computed twice is what was chosen."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from tests.transforms.common import Ops, gradients, images, net

MIXED = ("mixed_conv", "mixed_linear")


def loss(y: Tensor) -> Tensor:
    return y.pow(3).sum()


def backward(model: nn.Module, x: Tensor, run: Any) -> dict[str, Tensor | None]:
    """Gradients by ``.grad``, as the reentrant kind needs; also of the input."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    loss(run(x)).backward()
    return {"x": x.grad} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradients(use_reentrant: bool) -> None:
    """Of a replaced layer with its sources inside, and of one that is checkpointed without them."""
    model, x = net(torch.float64), images(dtype=torch.float64)
    expected = backward(model, x, model)

    def layer_alone(x: Tensor) -> Tensor:
        x = model.convs[2](checkpoint(model.convs[1], model.convs[0](x), use_reentrant=use_reentrant))
        x = x.tanh().mean((2, 3))
        return model.linears[2](checkpoint(model.linears[1], model.linears[0](x), use_reentrant=use_reentrant))

    def in_pieces(x: Tensor) -> Tensor:
        x = checkpoint_sequential(model.convs, 2, x, use_reentrant=use_reentrant)
        return checkpoint_sequential(model.linears, 3, x.tanh().mean((2, 3)), use_reentrant=use_reentrant)

    whole = backward(model, x, lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    for found in (whole, backward(model, x, layer_alone), backward(model, x, in_pieces)):
        torch.testing.assert_close(found, expected)


def counted(model: nn.Module, x: Tensor, policy: Any) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The gradients under a selective policy, and how often each forward op ran."""

    def context() -> Any:
        return create_selective_checkpoint_contexts(policy)

    with Ops() as ops:
        found = gradients(model, checkpoint(model, x, use_reentrant=False, context_fn=context))
    return found, {name: ops.seen[f"rl_kernels::{name}"] for name in MIXED}


@pytest.mark.parametrize("kept", [(), ("mixed_linear",), MIXED], ids=str)
def test_a_selective_policy_sees_our_ops(kept: tuple[str, ...]) -> None:
    """What it keeps runs once, what it does not keep twice."""
    model, x = net(torch.float64), images(dtype=torch.float64)
    expected = gradients(model, model(x))
    keep = [getattr(torch.ops.rl_kernels, name).default for name in kept]

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in keep else CheckpointPolicy.PREFER_RECOMPUTE

    found, counts = counted(model, x, policy)
    torch.testing.assert_close(found, expected)
    assert counts == {name: 1 if name in kept else 2 for name in MIXED}


def test_a_list_of_ops_is_a_policy() -> None:
    model, x = net(torch.float64), images(dtype=torch.float64)
    expected = gradients(model, model(x))
    found, counts = counted(model, x, [torch.ops.rl_kernels.mixed_conv.default])
    torch.testing.assert_close(found, expected)
    assert counts == {"mixed_conv": 1, "mixed_linear": 2}


def test_compiled() -> None:
    model, x = net(torch.float64), images(dtype=torch.float64)
    compiled = torch.compile(
        lambda x: checkpoint(model, x, use_reentrant=False), backend="aot_eager_decomp_partition", fullgraph=True
    )
    torch.testing.assert_close(gradients(model, compiled(x)), gradients(model, model(x)))


def test_under_autocast() -> None:
    """The recomputation runs in the forward's autocast."""
    model, x = net(), images()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = checkpoint(model, x, use_reentrant=False), model(x)
    torch.testing.assert_close(gradients(model, y), gradients(model, expected), rtol=0, atol=0)
