"""What version 0.1.0 wrote loads, and its names still work, with a warning.

The files beside this were written by 0.1.0 for five blocks of a linear layer and a norm, every second replaced.
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import rl_kernels as rl
from rl_kernels import _moved
from rl_kernels.backends.records import Record
from rl_kernels.conversion.plans import KeptPart
from rl_kernels.nn import ReplacementLinear

FOLDER = Path(__file__).parent / "version_0_1_0"


def test_a_plan_in_json() -> None:
    plan = rl.Plan.load(FOLDER / "plan.json")
    assert [block.path for block in plan.replaced] == ["1", "3"]
    assert plan.replaced[0].kept == (KeptPart("1", "LayerNorm", 16, "norms='own'"),)
    assert rl.Plan.from_json(plan.to_json()) == plan
    with pytest.warns(DeprecationWarning, match=r"ReplacedBlock\.own is ReplacedBlock\.kept now"):
        assert plan.replaced[0].own == plan.replaced[0].kept


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pickled_plan() -> None:
    assert pickle.loads((FOLDER / "plan.pickle").read_bytes()) == rl.Plan.load(FOLDER / "plan.json")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pickled_model() -> None:
    found = torch.load(FOLDER / "model.pt", weights_only=False)
    model = found["model"]
    torch.testing.assert_close(model(found["x"]), found["y"])
    layer = model[1][0]
    assert isinstance(layer, ReplacementLinear) and layer.sources == (model[0][0], model[2][0])
    assert layer._holders == ((model[0], "0"), (model[2], "0"))
    layer.rebind(model[0][0], model[2][0])
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(found["x"]), found["y"])


def test_a_record() -> None:
    record = Record.from_json((FOLDER / "record.json").read_text())
    assert record.points[0].won and record.verdicts[0].passed


@pytest.mark.parametrize("old", _moved.MODULES)
def test_a_module_that_has_moved(old: str) -> None:
    names = {
        "rl_kernels.nn.sources": "parameter_of",
        "rl_kernels.conversion.records": "Options",
        "rl_kernels.recipes": "models",
    }
    module = importlib.import_module(old)
    importlib.import_module("rl_kernels.systems.models")
    module.__dict__.pop("models", None)  # Where the module of that name was imported before.
    new = [importlib.import_module(name) for name in _moved.MODULES[old]]
    name = names.get(old) or next(name for name in vars(new[0]) if not name.startswith("_"))
    with pytest.warns(DeprecationWarning, match=rf"{old}\.{name} is "):
        value: Any = getattr(module, name)
    assert any(value is getattr(found, name, None) for found in new)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018


def test_names_that_have_changed() -> None:
    with pytest.warns(DeprecationWarning, match=r"rl_kernels\.backends\(\) is rl_kernels\.services\(\) now"):
        assert str(rl.backends("cpu")) == str(rl.services("cpu"))
    with pytest.warns(DeprecationWarning, match=r"Coefficients is rl_kernels\.functional\.CoefficientsLike"):
        assert rl.functional.Coefficients is rl.functional.CoefficientsLike
    with pytest.warns(DeprecationWarning, match="OwnPart"):
        assert importlib.import_module("rl_kernels.conversion.plans").OwnPart is KeptPart


def test_nothing_warns_by_itself(recwarn: pytest.WarningsRecorder) -> None:
    importlib.reload(rl)
    assert not [w for w in recwarn if issubclass(w.category, DeprecationWarning) and "rl_kernels" in str(w.message)]
