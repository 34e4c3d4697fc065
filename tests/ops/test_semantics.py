"""torch's semantics hold, and nothing is computed that is not asked for."""

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import rl_kernels as rl
from rl_kernels import functional as F
from rl_kernels.backends import Case, registered, selection
from rl_kernels.ops.values import Call, Recipe
from tests.backends.planted import Planted

BACKENDS = [backend.name for backend in registered()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_coefficients_one_and_zero_are_the_plain_layer_bit_for_bit(dtype: torch.dtype) -> None:
    x, w1, w2 = (torch.randn(s).to(dtype) for s in ((9, 13), (5, 13), (5, 13)))
    b1, b2 = torch.randn(5).to(dtype), torch.randn(5).to(dtype)
    image, f1, f2 = (torch.randn(s).to(dtype) for s in ((2, 4, 9, 7), (6, 2, 3, 3), (6, 2, 3, 3)))
    with rl.use_backend("reference"):
        assert torch.equal(F.mixed_linear(x, (w1, w2), (1.0, 0.0), (b1, b2)), torch.nn.functional.linear(x, w1, b1))
        assert torch.equal(
            F.mixed_conv2d(image, (f1, f2), (0.0, 1.0), None, 2, 1, 1, 2),
            torch.nn.functional.conv2d(image, f2, None, 2, 1, 1, 2),
        )
        assert torch.equal(F.mix((w1, w2), (1.0, 0.0)), w1)


@pytest.mark.parametrize("op", ["mixed_linear", "mixed_conv"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_coefficient_does_not_hide_an_infinity(backend: str, op: str) -> None:
    w1, w2 = torch.randn(5, 7), torch.randn(5, 7)
    w2[2, 3] = torch.inf
    with rl.use_backend(backend):
        if op == "mixed_linear":
            y = F.mixed_linear(torch.randn(4, 7), (w1, w2), (1.0, 0.0))
        else:
            y = F.mixed_conv1d(torch.randn(4, 7, 2), (w1[..., None], w2[..., None]), (1.0, 0.0))
    assert y[:, 2].isnan().all() and not y[:, [0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("form", ["floats", "parameters", "tensor", "mixed", "double"])
def test_forms_of_coefficients(form: str) -> None:
    x, w1, w2 = torch.randn(4, 7), torch.randn(5, 7), torch.randn(5, 7)
    a, b = torch.nn.Parameter(torch.tensor([0.25])), torch.nn.Parameter(torch.tensor(0.5))
    coefficients: Any = {
        "floats": (0.25, 0.5),
        "parameters": (a, b),
        "tensor": torch.tensor([0.25, 0.5]),
        "mixed": [a, 0.5],
        "double": torch.tensor([0.25, 0.5], dtype=torch.float64),
    }[form]
    y = F.mixed_linear(x, (w1, w2), coefficients)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, 0.25 * w1 + 0.5 * w2))
    if form == "parameters":
        y.sum().backward()
        torch.testing.assert_close(a.grad, torch.nn.functional.linear(x, w1).sum().reshape(1))
        torch.testing.assert_close(b.grad, torch.nn.functional.linear(x, w2).sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("x_shape", [(0, 7), (3, 0, 7), (7,)], ids=str)
def test_empty_and_one_dimensional_inputs(x_shape: tuple[int, ...], backend: str) -> None:
    x = torch.randn(x_shape, requires_grad=True)
    w1, w2, b1, b2 = (torch.randn(s, requires_grad=True) for s in ((5, 7), (5, 7), (5,), (5,)))
    coefficients = torch.tensor([0.5, -1.0], requires_grad=True)
    leaves = (x, w1, w2, b1, b2, coefficients)
    with rl.use_backend(backend):
        y = F.mixed_linear(x, (w1, w2), coefficients, (b1, b2))
        found = torch.autograd.grad(y.sum(), leaves)
    expected_y = torch.nn.functional.linear(x, 0.5 * w1 - w2, 0.5 * b1 - b2)
    assert y.shape == expected_y.shape
    torch.testing.assert_close(y, expected_y)
    a, b = coefficients
    naive = torch.nn.functional.linear(x, a * w1 + b * w2, a * b1 + b * b2)
    for one, other in zip(found, torch.autograd.grad(naive.sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 7), (5, 0), (0, 0)], ids=str)
def test_weights_of_no_elements(shape: tuple[int, int], backend: str) -> None:
    out, inside = shape
    x = torch.randn(3, inside, requires_grad=True)
    weights = [torch.randn(shape, requires_grad=True) for _ in range(2)]
    biases = [torch.ones(out, requires_grad=True) for _ in range(2)]
    with rl.use_backend(backend):
        y = F.mixed_linear(x, weights, (0.5, 0.25), biases)
        y.sum().backward()
    assert torch.equal(y, torch.full((3, out), 0.75))
    assert torch.equal(x.grad, torch.zeros(3, inside))
    assert weights[0].grad.shape == shape and torch.equal(biases[0].grad, torch.full((out,), 1.5))


def test_conv_padding_by_name_equals_torch() -> None:
    x, w = torch.randn(2, 3, 8, 9), torch.randn(4, 3, 2, 5)
    for padding, dilation in itertools.product(("same", "valid"), (1, 2)):
        y = F.mixed_conv2d(x, (w,), (1.0,), None, 1, padding, dilation)
        torch.testing.assert_close(y, torch.nn.functional.conv2d(x, w, None, 1, padding, dilation))


def test_a_dilated_kernel_of_one() -> None:
    """In bfloat16 and channels_last plain torch 2.13 crashes the process on this one."""
    x, w = torch.randn(2, 2, 7, 1), torch.randn(1, 2, 3, 1)
    expected = torch.nn.functional.conv2d(x, w, None, (3, 2), (2, 1), (2, 1))
    w = w.bfloat16().to(memory_format=torch.channels_last)
    y = F.mixed_conv2d(x.bfloat16(), (w,), (1.0,), None, (3, 2), (2, 1), (2, 2))
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.05)


def test_one_tensor_as_both_sources() -> None:
    x, w = torch.randn(4, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    y = F.mixed_linear(x, (w, w), (0.5, 0.25))
    (found,) = torch.autograd.grad(y.sum(), w)
    torch.testing.assert_close(found, 0.75 * torch.ones(4, 5, dtype=torch.float64).t() @ x)


def test_sources_that_are_views_of_one_buffer() -> None:
    flat = torch.randn(2 * 35 + 1, dtype=torch.float64, requires_grad=True)
    w1, w2 = flat[1:36].view(5, 7), flat[36:].view(5, 7)
    x = torch.randn(4, 7, dtype=torch.float64)
    F.mixed_linear(x, (w1, w2), (2.0, 3.0)).sum().backward()
    expected = x.sum(0).expand(5, 7).reshape(-1)
    torch.testing.assert_close(flat.grad, torch.cat([torch.zeros(1), 2 * expected, 3 * expected]).double())


@pytest.mark.parametrize("spatial", [0, 2])
@pytest.mark.parametrize("needs", itertools.product([False, True], repeat=5), ids=lambda n: "".join("-+"[v] for v in n))
def test_only_what_is_asked_for_is_computed(
    needs: tuple[bool, ...], spatial: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every combination of requires_grad (x, coefficients, first weight, second weight, biases)."""
    asked: list[tuple[str, Any]] = []

    run = selection.run

    def spy(call: Call) -> Any:
        wanted = call.wanted and [list(call.wanted.weights), call.wanted.coefficients, list(call.wanted.biases)]
        asked.append((call.op.rsplit("_", 1)[-1], wanted))
        return run(call)

    monkeypatch.setattr(selection, "run", spy)
    shape = (5, 7) + (2, 2) * (spatial == 2)
    x = torch.randn((4, 7) + (3, 3) * (spatial == 2)).requires_grad_(needs[0])
    coefficients = torch.tensor([0.5, 0.25]).requires_grad_(needs[1])
    weights = [torch.randn(shape).requires_grad_(needs[2]), torch.randn(shape).requires_grad_(needs[3])]
    biases = [torch.randn(5).requires_grad_(needs[4]) for _ in range(2)]
    call = F.mixed_linear if spatial == 0 else F.mixed_conv2d
    # Not the fast path, which no spy sees: tests/cpu does the same for it.
    with rl.use_backend("streamed"):
        y = call(x, weights, coefficients, biases)
        assert y.requires_grad == any(needs)
        if any(needs):
            y.sum().backward()
    expected: list[tuple[str, Any]] = [("linear" if spatial == 0 else "conv", None)]
    expected += [("dgrad", None)] if needs[0] else []
    if any(needs[1:4]):
        expected += [("wgrad", [[needs[2], needs[3]], needs[1], [needs[4]] * 2])]
    assert asked == expected
    for tensor in (x, coefficients, *weights, *biases):
        assert (tensor.grad is not None) == tensor.requires_grad


def test_two_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def step(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x, w1, w2 = (
            torch.randn(s, generator=generator, requires_grad=True) for s in ((64, 300), (500, 300), (500, 300))
        )
        y = F.mixed_linear(x, (w1, w2), (0.5, 0.25))
        return torch.cat([g.flatten() for g in torch.autograd.grad(y.square().sum(), (x, w1, w2))])

    alone = [step(seed) for seed in range(4)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(step, range(4)))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)


def test_use_backend_nests_and_restores() -> None:
    before = selection.requested()
    with rl.use_backend("reference"):
        assert selection.requested() == "reference"
        with rl.use_backend("streamed"):
            assert selection.requested() == "streamed"
        with pytest.raises(KeyError), rl.use_backend("streamed"):
            raise KeyError
        assert selection.requested() == "reference"
    assert selection.requested() == before


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_sum_for_few_rows_rounds_no_worse_than_a_product(backend: str, rows: int) -> None:
    """Of the input's gradient, which sums over a layer's outputs."""
    weights, coefficients = [torch.randn(4096, 48, requires_grad=True) for _ in range(2)], torch.randn(2)
    x, dy = torch.randn(rows, 48, requires_grad=True), torch.randn(rows, 4096)
    with rl.use_backend(backend):
        F.mixed_linear(x, weights, coefficients).backward(dy)
        dx = torch.ops.rl_kernels.mixed_linear_dgrad(dy, [w.detach() for w in weights], coefficients)
    mixed = F.mix([w.detach() for w in weights], coefficients)
    truth = dy.double() @ F.mix([w.detach().double() for w in weights], coefficients.double())
    plain = (dy @ mixed - truth).norm()
    assert x.grad is not None
    assert (x.grad - truth).norm() <= 2 * plain and (dx - truth).norm() <= 2 * plain


def test_unknown_backends_are_named() -> None:
    message = "backend: got 'cudnn', expected one of auto, cpu, triton, cuda, streamed, reference"
    with pytest.raises(ValueError, match=message), rl.use_backend("cudnn"):
        pass
    program = (
        "import torch, rl_kernels as rl\nrl.functional.mixed_linear(torch.randn(4, 7), (torch.randn(5, 7),), (1.0,))"
    )
    environment = {**os.environ, "RL_KERNELS_BACKEND": "nonsense"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "ValueError: RL_KERNELS_BACKEND: got 'nonsense'" in result.stderr


def test_the_environment_variable_forces_a_backend() -> None:
    program = (
        "import rl_kernels as rl\n"
        "print({s.backend for s in rl.services() if s.serves})\n"
        "with rl.use_backend('streamed'): print({s.backend for s in rl.services() if s.serves})"
    )
    environment = {**os.environ, "RL_KERNELS_BACKEND": "reference"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["{'reference'}", "{'streamed'}"]


def test_selection_is_pure_and_says_why() -> None:
    def refuse(case: Case) -> str | None:
        return "needs a GPU" if case.device == "cpu" else None

    def unproven(case: Case, call: Call | None) -> str | None:
        return "not qualified here"

    def run(*args: Any) -> None:
        return None

    fast = Planted({"mixed_linear": run}, "fast", why_not=refuse)
    unsure = Planted({"mixed_linear": run}, "unsure", worse=unproven)
    plain = Planted({"mixed_linear": run}, "plain")
    everything = (fast, unsure, plain)
    cpu = Case("mixed_linear", "cpu", torch.float32)
    assert selection.choose(cpu, everything) is plain
    assert selection.choose(cpu._replace(device="cuda"), everything) is fast
    assert selection.choose(cpu, everything, "unsure") is unsure
    assert selection.served_by("nothing", "auto", (cpu,)) == ()
    with pytest.raises(RuntimeError, match="backend 'fast' cannot serve mixed_linear on cpu in float32: needs a GPU"):
        selection.choose(cpu, everything, "fast")
    with pytest.raises(RuntimeError, match="unsure: not qualified here"):
        selection.choose(cpu, (fast, unsure))


def test_selection_by_call() -> None:
    """What a backend serves as a case it may refuse, or leave to the next, call by call."""
    cpu = Case("mixed_linear", "cpu", torch.float32)

    def run(*args: Any) -> None:
        return None

    def of_size(size: int) -> Call:
        return Call("mixed_linear", torch.empty(size), Recipe([], torch.empty(0)))

    picky = Planted(
        {"mixed_linear": run},
        "picky",
        why_not_call=lambda call: "too many" if len(call.activation) > 9 else None,
        worse=lambda case, call: "slower on few" if call is not None and len(call.activation) < 3 else None,
    )
    plain = Planted({"mixed_linear": run}, "plain")
    both = (picky, plain)
    assert selection.choose(cpu, both) is picky
    for size, automatic in ((1, plain), (5, picky), (10, plain)):
        assert selection.choose(cpu, both, call=of_size(size)) is automatic
    assert selection.choose(cpu, both, "picky", of_size(1)) is picky
    with pytest.raises(selection.CannotServe, match=r"backend 'picky' cannot serve mixed_linear on cpu.*: too many"):
        selection.choose(cpu, both, "picky", of_size(10))
    with pytest.raises(selection.CannotServe, match=r"no backend serves .* picky: slower on few"):
        selection.choose(cpu, (picky,), call=of_size(1))


def test_listeners_hear_of_every_change() -> None:
    heard: list[str] = []

    def listener() -> None:
        heard.append(selection.requested())

    before = selection.requested()
    selection.on_change(listener)
    try:
        with rl.use_backend("reference"), rl.use_backend("streamed"):
            pass
    finally:
        selection._listeners.remove(listener)
    assert heard == [before, "reference", "streamed", "reference", before]


def test_services_print_a_table() -> None:
    services = rl.services("cpu", torch.bfloat16)
    assert len(services) == 6 * len(BACKENDS)
    text = str(services)
    assert text.splitlines()[0].split() == ["op", "device", "dtype", "backend", "serves", "why"]
    serving = next(service.backend for service in services if service.serves)
    assert f"{serving} comes first" in text
