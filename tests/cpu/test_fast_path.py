"""The fast path gives what the way through Python gives, and autograd's guarantees hold on it."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import rl_kernels as rl
from rl_kernels import functional as F
from rl_kernels.backends import selection
from rl_kernels.ops import values
from tests.cpu.common import KINDS, Call, assert_same, gradients, make, off_the_fast_path

EVERY_NEED = list(itertools.product([False, True], repeat=6))  # x, coefficients, two weights, two biases
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def ops_of(run: Any) -> Counter[str]:
    """How often each of our ops runs, as the profiler sees it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = Counter(event.name for event in profile.events())
    return Counter({name: count for name, count in names.items() if name.startswith("rl_kernels::")})


def both_ways(call: Call, dy: Tensor | None = None) -> None:
    """Hold one call's output and gradients on the fast path against those off it."""
    y = call.fast()
    assert y is not None, "the fast path declined"
    with off_the_fast_path():
        assert call.fast() is None
        expected = call()
        assert_same([y.detach()], [expected.detach()])
        assert y.requires_grad == expected.requires_grad
        wanted = gradients(call, expected, dy) if y.requires_grad else []
    # A linear layer's backward is one op on the fast path, which sums in another order on few rows.
    assert_same(gradients(call, y, dy) if y.requires_grad else [], wanted, exact=call.kind == "conv")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, n: int, granularity: str, kind: str) -> None:
    both_ways(make(kind, dtype, n=n, granularity=granularity))
    both_ways(make(kind, dtype, n=n, granularity=granularity, biased=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_activations_on_float32_weights(x_dtype: torch.dtype, kind: str) -> None:
    both_ways(make(kind, torch.float32, x_dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("needs", EVERY_NEED, ids=lambda needs: "".join("-+"[need] for need in needs))
def test_only_what_is_asked_for_is_computed(needs: tuple[bool, ...], kind: str) -> None:
    call = make(kind, needs=False)
    for leaf, need in zip(call.leaves(), needs, strict=True):
        leaf.requires_grad_(need)
    both_ways(call)
    y = call.fast()
    assert y is not None and y.requires_grad == any(needs)
    if any(needs):
        ran = ops_of(lambda: y.sum().backward())
        op = f"rl_kernels::mixed_{kind}"
        both = kind == "linear" and needs[0] and any(needs[1:4])
        separate = [f"{op}_dgrad"] * needs[0] + [f"{op}_wgrad"] * any(needs[1:4])
        assert ran == Counter([f"{op}_backward"] if both else separate)
    for leaf in call.leaves():
        assert (leaf.grad is not None) == leaf.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_part_of_the_gradients(kind: str) -> None:
    """What ``autograd.grad`` is not asked for is not computed, though it requires a gradient."""
    call = make(kind)
    x, _, first, *_ = call.leaves()
    y = call()
    dy = torch.ones_like(y)
    ran = ops_of(lambda: torch.autograd.grad(y, x, dy, retain_graph=True))
    assert ran == {f"rl_kernels::mixed_{kind}_dgrad": 1}
    assert call.biases is not None
    ran = ops_of(lambda: torch.autograd.grad(y, call.biases, dy, retain_graph=True))
    assert not ran
    ran = ops_of(lambda: torch.autograd.grad(y, first, dy))
    assert ran == {f"rl_kernels::mixed_{kind}_wgrad": 1}


def test_the_profiler_sees_the_forward() -> None:
    assert ops_of(make("linear")) == {"rl_kernels::mixed_linear": 1}
    assert ops_of(make("conv")) == {"rl_kernels::mixed_conv": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_as_coefficients(kind: str) -> None:
    call = make(kind)
    numbers = Call(kind, call.x, call.weights, (0.25, -1.5), call.biases, call.geometry)
    both_ways(numbers)
    as_tensor = Call(kind, call.x, call.weights, torch.tensor([0.25, -1.5]), call.biases, call.geometry)
    assert torch.equal(numbers(), as_tensor())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
def test_any_strides_of_dy(layout: str, kind: str) -> None:
    call = make(kind)
    y = call()
    dy = {
        "expanded": torch.ones(()).expand(y.shape),
        "transposed": torch.randn(y.shape[::-1]).permute(*range(y.dim() - 1, -1, -1)),
        "sliced": torch.randn(*y.shape[:-1], 2 * y.shape[-1])[..., ::2],
    }[layout]
    both_ways(call, dy)


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_derivatives(kind: str) -> None:
    call = make(kind, torch.float64)

    def run(x: Tensor, coefficients: Tensor, *sources: Tensor) -> Tensor:
        again = Call(kind, x, sources[:2], coefficients, sources[2:], call.geometry)
        y = again.fast()
        assert y is not None
        return y

    assert gradcheck(run, call.leaves(), check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(run, call.leaves(), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_create_graph_and_batched_gradients(kind: str) -> None:
    call = make(kind, torch.float64)
    y = call()
    with off_the_fast_path():
        expected = call()
    dys = torch.randn(3, *y.shape, dtype=torch.float64)
    options: list[dict[str, Any]] = [{"create_graph": True}, {"is_grads_batched": True}]
    for options_, dy in zip(options, (dys[0], dys), strict=True):
        found = torch.autograd.grad(y, call.leaves(), dy, retain_graph=True, **options_)
        wanted = torch.autograd.grad(expected, call.leaves(), dy, retain_graph=True, **options_)
        for one, other in zip(found, wanted, strict=True):
            assert one.requires_grad == other.requires_grad
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", range(6))
def test_an_in_place_change_is_caught(position: int, kind: str) -> None:
    call = make(kind)
    y = call()
    with torch.no_grad():
        call.leaves()[position].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_backward_needs_the_graph() -> None:
    call = make("linear")
    y = call()
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


class Swallow(torch.autograd.Function):
    """The identity, whose backward has no gradient to give."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> None:
        return None


def test_no_gradient_at_all() -> None:
    call = make("linear")
    Swallow.apply(call()).sum().backward()
    assert all(leaf.grad is None for leaf in call.leaves())


def test_anomalies_are_traced() -> None:
    call = make("linear")
    with torch.autograd.set_detect_anomaly(True, check_nan=True), pytest.warns(UserWarning, match="MixedLinear"):
        y = call()
        with pytest.raises(RuntimeError, match=r"MixedLinear.* returned nan values"):
            y.backward(torch.full_like(y, torch.nan))


@pytest.mark.parametrize("kind", KINDS)
def test_hooks(kind: str) -> None:
    call = make(kind)
    calls: list[str] = []
    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.clone()):
        y = call()
    assert packed == [leaf.data_ptr() for leaf in call.leaves()]
    assert y.grad_fn is not None and y.grad_fn.name().endswith(f"Mixed{kind.capitalize()}>")
    y.retain_grad()
    y.register_hook(lambda gradient: calls.append("y") or 2 * gradient)
    y.grad_fn.register_hook(lambda *_: calls.append("node"))
    call.x.register_post_accumulate_grad_hook(lambda _: calls.append("x"))
    y.sum().backward()
    assert calls == ["y", "node", "x"] and torch.equal(y.grad, torch.full_like(y, 2))
    with off_the_fast_path():
        again = call.copy()
        (2 * again()).sum().backward()
    assert_same([leaf.grad for leaf in call.leaves()], [leaf.grad for leaf in again.leaves()], exact=kind == "conv")


def test_x_is_not_kept_where_no_weight_wants_it() -> None:
    call = make("linear", needs=False)
    call.x.requires_grad_()
    held: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.data_ptr()) or t, lambda t: t):
        call()
    assert held and call.x.data_ptr() not in held


def test_nothing_outlives_the_graph() -> None:
    call = make("conv")
    dead = weakref.ref(call.weights[0])
    y = call()
    del call
    gc.collect()
    assert dead() is not None, "the graph keeps what backward needs"
    y.sum().backward()
    del y
    gc.collect()
    assert dead() is None


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    call = make(kind)
    with torch.autocast("cpu", torch.bfloat16):
        assert call.fast() is None
        y = call()
        assert y.dtype == torch.bfloat16
    y.sum().backward()
    outside = make(kind)
    y = outside()
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in outside.leaves())


def test_inference_mode() -> None:
    call = make("linear")
    with torch.inference_mode():
        y = call.fast()
        assert y is not None and y.is_inference() and not y.requires_grad
    kept = make("linear", needs=False)
    with torch.inference_mode():
        x = torch.randn(4, 7)
    mixed = Call("linear", x, call.weights, call.coefficients, call.biases)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        mixed()
    assert Call("linear", x, kept.weights, kept.coefficients, kept.biases)().shape == (4, 6)


def test_checkpointing() -> None:
    call = make("linear")
    expected = gradients(call, call())
    found = gradients(call, checkpoint(call, use_reentrant=False))
    assert_same(found, expected)


def test_aliased_sources_and_views() -> None:
    w = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 7, dtype=torch.float64)
    y = F.mixed_linear(x, (w, w), (0.5, 0.25))
    (found,) = torch.autograd.grad(y.sum(), w)
    torch.testing.assert_close(found, 0.75 * torch.ones(4, 6, dtype=torch.float64).t() @ x)
    in_place = F.mixed_linear(x, (w.view(6, 7), w), (0.5, 0.25))
    in_place += 1
    assert torch.equal(torch.autograd.grad(in_place.sum(), w)[0], found)


def test_two_threads_at_once() -> None:
    def step(seed: int) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(seed)
        x, w1, w2 = (
            torch.randn(s, generator=generator, requires_grad=True) for s in ((64, 300), (500, 300), (500, 300))
        )
        call = Call("linear", x, (w1, w2), (0.5, 0.25), None)
        return [g for _ in range(5) for g in gradients(call, call())]

    alone = [step(seed) for seed in range(4)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(step, range(4)))
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_takes_the_backend_in_force(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    run = selection.run

    def spy(asking: values.Call) -> Any:
        asked.append((asking.op, selection.requested()))
        return run(asking)

    monkeypatch.setattr(selection, "run", spy)
    call = make(kind)
    y = call()
    assert asked == []
    with rl.use_backend("reference"):
        found = gradients(call, y)
    assert asked == [(f"mixed_{kind}_dgrad", "reference"), (f"mixed_{kind}_wgrad", "reference")]
    with rl.use_backend("reference"):
        assert_same(found, gradients(call, call()))
    asked.clear()
    with rl.use_backend("streamed"):
        y = call()
    assert asked == [(f"mixed_{kind}", "streamed")]
    asked.clear()
    # Recorded by Python's Function: its backward runs the ops, and so the backend in force.
    gradients(call, y)
    assert asked == [(f"mixed_{kind}_dgrad", "cpu"), (f"mixed_{kind}_wgrad", "cpu")]
