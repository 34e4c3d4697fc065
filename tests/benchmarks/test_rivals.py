from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import benchmarks.run
from benchmarks.cases import AttentionCase, BlockCase, Case, ConvCase, LinearCase, ModelCase
from benchmarks.contenders import BOTH, FORWARD, STEP, Wrong, enter, largest_error, true_results
from benchmarks.measure import Settings
from benchmarks.problems import COEFFICIENTS, build
from benchmarks.rivals import CEILING, RIVALS, Given, Rival, ours
from benchmarks.run import measure_cell
from rl_kernels.backends.selection import requested

CASES: list[Case] = [
    LinearCase(name="linear", group="linear", m=5, n=7, k=6),
    ConvCase(name="conv", group="conv", batch=2, in_channels=4, out_channels=6, size=5, kernel=3, stride=2, groups=2),
    ConvCase(
        name="last", group="conv", batch=2, in_channels=4, out_channels=4, size=5, kernel=1, layout="channels_last"
    ),
    AttentionCase(name="attention", group="attention", features=8, heads=2, tokens=5, batch=2),
    BlockCase(name="block", group="block", channels=4, size=6, batch=3),
]
SETTINGS = Settings(warmup_calls=1, sample_seconds=1e-6, cell_seconds=0, min_rounds=3, max_rounds=3)
ROOFLINE = {"flops_per_second": {"float32": 1e9, "bfloat16": 1e9}, "read_bytes_per_second": 1e9}
# torch.compile takes seconds a case: it is held to the others on one, without its compiler.
QUICK_RIVALS = [name for name in RIVALS if name != "compile"]


@pytest.mark.parametrize("mode", [FORWARD, BOTH])
@pytest.mark.parametrize("name", [*QUICK_RIVALS, "ours"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rivals_agree(case: Case, name: str, mode: str) -> None:
    problem = build(case, "cpu")
    rival = ours("reference") if name == "ours" else RIVALS[name]
    contender = enter(rival, problem, mode, true_results(problem, mode))
    assert contender.check() is not None  # Raises where they do not.


@pytest.mark.parametrize("mode", [FORWARD, BOTH])
def test_compile_agrees(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the graph that torch.compile traces, run eagerly: generating code takes seconds a case."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, mode, dynamic: compiler(fn, backend="aot_eager", dynamic=dynamic))
    problem = build(CASES[0], "cpu")
    contender = enter(RIVALS["compile"], problem, mode, true_results(problem, mode))
    assert contender.check() is not None


def test_half_precision_passes_too() -> None:
    case = LinearCase(name="linear", group="linear", m=16, n=32, k=64, dtype="bfloat16")
    cell = measure_cell(case, BOTH, QUICK_RIVALS, ["auto"], SETTINGS, ROOFLINE)
    assert all("failed" not in rival for rival in cell["rivals"].values()), cell["rivals"]
    assert cell["rivals"]["naive"]["error"] > 1e-4


def test_the_truth_is_that_of_autograd_through_the_mix() -> None:
    """The ceiling's gradients, turned into those of sources and coefficients, are naive's."""
    problem = build(CASES[0], "cpu")
    leaves = [[p.clone().requires_grad_() for p in source] for source in problem.sources]
    mixing = torch.tensor(COEFFICIENTS, requires_grad=True)
    mixed = [mixing[0] * p + mixing[1] * q for p, q in zip(*leaves, strict=True)]
    problem.plain(problem.x, mixed).backward(problem.gradient)
    truth = true_results(problem, BOTH)
    torch.testing.assert_close(truth["coefficients"][0].float(), mixing.grad)
    torch.testing.assert_close(truth["following.weight"][0], leaves[1][0].grad)
    torch.testing.assert_close(truth["previous.bias"][0], leaves[0][1].grad)


def swapped(given: Given) -> Callable[[], Tensor]:
    a, b, x, previous, following = given.a, given.b, given.x, given.previous, given.following
    pairs = list(zip(previous, following, strict=True))
    return lambda: given.problem.plain(x, [b * p + a * q for p, q in pairs])


def without_next(given: Given) -> Callable[[], Tensor]:
    a, x, previous = given.a, given.x, given.previous
    return lambda: given.problem.plain(x, [a * p for p in previous])


def detached(given: Given) -> Callable[[], Tensor]:
    """Right forward; but the coefficients learn nothing."""
    a, b, x, previous, following = given.a, given.b, given.x, given.previous, given.following
    pairs = list(zip(previous, following, strict=True))
    return lambda: given.problem.plain(x, [a.detach() * p + b.detach() * q for p, q in pairs])


def raises(given: Given) -> Callable[[], Tensor]:
    raise RuntimeError("no compiler in /usr/lib/where/cc1plus")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (swapped, "wrong result, not timed: Wrong: output"),
        (without_next, "wrong result, not timed: Wrong: results: got"),
        (detached, "no gradient of a"),
        (raises, "no compiler"),
    ],
)
def test_a_rival_that_is_wrong_or_raises_is_reported_and_not_timed(
    make: Callable[[Given], Callable[[], Tensor]], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RIVALS, "planted", Rival("planted", "", make))
    cell = measure_cell(CASES[0], BOTH, ["planted", "naive"], ["auto"], SETTINGS, ROOFLINE)
    assert set(cell["rivals"]) == {CEILING, "naive", "planted", "rl_kernels[auto]"}
    assert why in cell["rivals"]["planted"]["failed"] and "/usr" not in cell["rivals"]["planted"]["failed"]
    assert "seconds" not in cell["rivals"]["planted"]
    naive = cell["rivals"]["naive"]
    assert naive["seconds"]["p20"] <= naive["seconds"]["median"] <= naive["seconds"]["p80"]
    assert cell["rivals"][CEILING]["ratio"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    assert naive["rounds"] == 3


def test_errors_are_relative_and_nan_is_one() -> None:
    truth: dict[str, tuple[Tensor, Tensor | float]] = {"y": (torch.tensor([3.0, 4.0]), 5.0)}
    assert largest_error({"y": torch.tensor([3.0, 4.5])}, truth, 0.2) == pytest.approx(0.1)
    for wrong in (torch.tensor([3.0, 6.0]), torch.tensor([3.0, torch.nan])):
        with pytest.raises(Wrong, match="y: relative error"):
            largest_error({"y": wrong}, truth, 0.2)
    with pytest.raises(Wrong, match="results: got z, expected y"):
        largest_error({"z": torch.zeros(2)}, truth, 0.2)


def test_memory_counts_the_mixed_weight_and_not_the_gradients() -> None:
    case = LinearCase(name="linear", group="linear", m=1, n=512, k=512)
    cells = {mode: measure_cell(case, mode, ["naive"], ["streamed"], SETTINGS, ROOFLINE) for mode in (FORWARD, BOTH)}
    weight = 4 * 512 * 512
    for cell in cells.values():
        assert cell["rivals"][CEILING]["peak_extra_bytes"] < weight / 4
        assert cell["rivals"]["naive"]["peak_extra_bytes"] >= weight


def test_a_model_cell_says_what_replacement_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import models
    from rl_kernels.systems.models import DigitsResNet

    def tiny() -> torch.nn.Module:
        model = DigitsResNet(width=4, depths=(5,), classes=models.CLASSES)
        model.stem[0] = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
        return model

    monkeypatch.setitem(models.MODELS, "ResNet-32", tiny)
    case = ModelCase(name="tiny", group="model", model="ResNet-32", optimizer="sgd", batch=2)
    cell = measure_cell(case, STEP, [], ["reference"], SETTINGS, ROOFLINE)
    whole, replaced = cell["rivals"]["end-to-end"], cell["rivals"]["rl_kernels[reference]"]
    assert replaced["parameters"] < whole["parameters"]
    assert replaced["optimizer_bytes"] < whole["optimizer_bytes"] == 4 * whole["parameters"]
    assert whole["peak_bytes"] > whole["held_bytes"] > 0
    assert replaced["ratio"]["median"] > 0 and replaced["error"] < 1e-3


def test_a_replaced_model_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import models

    def crooked(model: torch.nn.Module) -> torch.nn.Module:
        merged = merge(model)
        with torch.no_grad():
            next(merged.parameters()).mul_(1.5)
        return merged

    merge = models.rl.merge
    monkeypatch.setattr(models.rl, "merge", crooked)
    case = ModelCase(name="tiny", group="model", model="ResNet-32", optimizer="sgd", batch=1)
    with pytest.raises(Wrong, match="logits: relative error"):
        models.contender(case, "cpu", "reference").check()


def test_a_cell_that_cannot_be_built_is_recorded_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case, device: str) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(benchmarks.run, "build", broken)
    cell = measure_cell(CASES[0], BOTH, ["naive"], ["auto"], SETTINGS, ROOFLINE)
    assert cell["rivals"] == {CEILING: {"failed": "MemoryError: no room"}}


def test_the_models_are_those_of_the_papers() -> None:
    from benchmarks.models import resnet32, vit_tiny

    layers = [m for m in resnet32().modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(layers) + 1 == 32
    assert sum(p.numel() for p in vit_tiny().blocks.parameters()) == pytest.approx(5.34e6, rel=0.01)  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("mode", [FORWARD, BOTH])
def test_contexts_are_in_force_while_a_contender_runs(mode: str) -> None:
    seen = []

    def make(given: Given) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            seen.append((requested(), torch.is_grad_enabled()))
            return given.problem.plain(given.x, given.mixed)

        return forward

    problem = build(CASES[0], "cpu")
    rival = Rival("spy", "", make, context=ours("streamed").context)
    contender = enter(rival, problem, mode, true_results(problem, mode))
    with contender.context():
        contender.check()
    assert seen == [("streamed", mode == BOTH)] and requested() == "auto"
    assert not problem.x.requires_grad
