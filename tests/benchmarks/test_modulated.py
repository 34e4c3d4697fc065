"""Frozen weights modulated by factors of low rank: every way computes the same."""

import pytest
import torch

from benchmarks.cases import ConvCase, LinearCase, ModulatedCase, select
from benchmarks.contenders import BOTH, FORWARD, Wrong
from benchmarks.modulated import RIVALS, Factors, entrants
from benchmarks.rivals import CEILING
from benchmarks.run import measure_cell
from tests.benchmarks.test_rivals import ROOFLINE, SETTINGS

LAYERS = (
    LinearCase(name="linear", group="linear", m=5, n=7, k=6),
    ConvCase(name="conv", group="conv", batch=2, in_channels=4, out_channels=6, size=5, kernel=3, stride=2, groups=2),
    ConvCase(
        name="last", group="conv", batch=2, in_channels=4, out_channels=4, size=5, kernel=3, layout="channels_last"
    ),
)
CASES = [
    ModulatedCase(name=f"{layer.name} {r}", group="modulated", layer=layer, rank=r) for layer in LAYERS for r in (1, 3)
]
QUICK = [name for name in RIVALS if name != "compile"]


@pytest.mark.parametrize("mode", [FORWARD, BOTH])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rivals_agree(case: ModulatedCase, mode: str) -> None:
    found = []
    for name, make in entrants(case, mode, QUICK, ["auto", "reference", "streamed"], "cpu"):
        contender = make()
        with contender.context():
            assert contender.check() is not None  # Raises where they do not.
        found.append(name)
    left_out = ["two_products"] if isinstance(case.layer, ConvCase) else []
    expected = [*(name for name in QUICK if name not in left_out), *(name for name in found if name.startswith("rl_"))]
    assert found == expected and found[0] == CEILING and len(found) - len(QUICK) + len(left_out) == 3


def test_compile_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the graph that torch.compile traces, run eagerly: generating code takes seconds a case."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, dynamic: compiler(fn, backend="aot_eager", dynamic=dynamic))
    made = dict(entrants(CASES[0], BOTH, ["compile"], [], "cpu"))["compile"]()
    with made.context():
        assert made.check() is not None


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Factors.factor
    (made,) = [make for name, make in entrants(CASES[0], BOTH, ["naive"], [], "cpu") if name == "naive"]
    monkeypatch.setattr(Factors, "factor", lambda self, left, right_: right(self, left, 2 * right_))
    contender = made()
    with contender.context(), pytest.raises(Wrong, match="relative error"):
        contender.check()


def test_a_cell_in_half_precision() -> None:
    layer = LinearCase(name="linear", group="linear", m=16, n=32, k=64)
    case = ModulatedCase(name="linear", group="modulated", layer=layer, rank=2)
    (case,) = [each for each in select(["modulated"], ["bfloat16"], quick=True) if "64x1024" in each.name][:1] or [case]
    cell = measure_cell(case, BOTH, ["naive"], ["auto"], SETTINGS, ROOFLINE)
    assert case.dtype == "bfloat16" and case.layer.dtype == "bfloat16"  # type: ignore[attr-defined]
    assert all("failed" not in rival for rival in cell["rivals"].values()), cell["rivals"]
    assert cell["case"]["layer"]["m"] == 64 and cell["case"]["rank"] == 4
