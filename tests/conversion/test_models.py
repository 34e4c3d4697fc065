"""Named models, and the command that prints a plan for one."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import rl_kernels as rl
from rl_kernels.__main__ import main
from rl_kernels.commands import plan
from rl_kernels.conversion import zoo
from tests.conversion.toys import ResNet, ViT


@pytest.fixture
def libraries(monkeypatch):
    """Two libraries of toys, both with a resnet; the third is not installed."""

    def needs_values() -> nn.Module:
        model = ViT()
        assert model.head.weight.sum().item() != 0
        return model

    makers = {
        "torchvision": {"resnet": ResNet},
        "timm": {"resnet": lambda: ResNet((2, 3)), "vit": ViT, "awkward": needs_values},
        "transformers": {},
    }
    for name, made in makers.items():
        library = zoo._Library(lambda made=made: list(made), lambda key, made=made: made[key](), name)
        monkeypatch.setitem(zoo.LIBRARIES, name, library)
    monkeypatch.setattr(zoo, "find_spec", lambda name: None if name == "transformers" else object())


def test_names_are_looked_for_in_order(libraries):
    assert len(zoo.build("resnet").stages) == 4
    assert len(zoo.build("timm/resnet").stages) == 2
    assert isinstance(zoo.build("vit"), ViT)


def test_models_are_built_without_data_where_possible(libraries):
    assert all(parameter.is_meta for parameter in zoo.build("vit").parameters())
    assert not any(parameter.is_meta for parameter in zoo.build("awkward").parameters())


def test_a_library_that_does_not_import_is_passed_by(libraries, monkeypatch):
    def names() -> list[str]:
        raise RuntimeError("made for another torch")

    monkeypatch.setitem(zoo.LIBRARIES, "torchvision", zoo._Library(names, ResNet, ""))
    assert len(zoo.build("resnet").stages) == 2
    with pytest.raises(ValueError, match=r"torchvision does not import: made for another torch"):
        zoo.build("torchvision/resnet")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnett", r"name: got 'resnett', expected a model of torchvision or timm; near it: resnet"),
        ("resnett", r"transformers is not installed: pip install transformers$"),
        ("transformers/bert", r"name: got 'transformers/bert', expected a model\. transformers is not installed"),
        ("timm/bert", r"name: got 'timm/bert', expected a model of timm$"),
        ("keras/vit", r"name: got 'keras/vit', expected it to begin with torchvision/, timm/, transformers/"),
    ],
)
def test_unknown_models_are_named_with_what_is_near(libraries, name, message):
    with pytest.raises(ValueError, match=message):
        zoo.build(name)


def test_torchvision_is_imported_where_its_operators_do_not_load(monkeypatch):
    name = "torchvision"
    calls: list[str] = []

    def import_module(wanted: str) -> types.ModuleType:
        calls.append(wanted)
        if not hasattr(torch.ops.torchvision, "qnms"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return types.ModuleType(wanted)

    if name in sys.modules or importlib.util.find_spec(name):
        pytest.skip("torchvision is here: the integration tests import it")
    monkeypatch.setattr(zoo, "import_module", import_module)
    assert zoo.import_torchvision().__name__ == name and len(calls) == 2
    assert zoo.import_torchvision().__name__ == name and len(calls) == 3


# The command.


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["plan", *arguments])
    return result.exit_code, result.output


def test_the_command_prints_a_plan(libraries, tmp_path):
    code, output = run("resnet", "--every", "4", "--json", str(tmp_path / "plan.json"))
    plan = rl.plan(ResNet(), every=4)
    assert code == 0
    assert output == f"{plan}\n"
    assert rl.Plan.load(tmp_path / "plan.json") == plan


def test_the_command_passes_its_options_on(libraries):
    options = ["--offset", "3", "--strict", "--targets", "attention", "--targets", "norm", "--share", "layer"]
    code, output = run("vit", *options)
    expected = rl.plan(ViT(), 4, offset=3, strict=True, targets=["attention", "norm"], share="layer")
    assert (code, output) == (0, f"{expected}\n")
    code, output = run("vit", "--level", "block", "--norms", "own", "--granularity", "channel")
    assert (code, output) == (0, f"{rl.plan(ViT(), 4, level='block', norms='own', granularity='channel')}\n")


def test_the_command_reports_errors_in_a_sentence(libraries):
    assert run("resnet", "--every", "1") == (1, "Error: every: got 1, expected at least 2\n")
    code, output = run("nothing")
    assert code == 1 and output.startswith("Error: name: got 'nothing', expected a model of torchvision or timm")
    assert run("vit", "--level", "model")[0] == 2


def test_a_terminal_gets_tables_of_its_width(libraries, monkeypatch):
    console = plan.Console
    monkeypatch.setattr(plan, "Console", lambda: console(force_terminal=True, width=60, color_system=None))
    code, output = run("resnet")
    assert code == 0 and max(map(len, output.splitlines())) <= 60 and "layer2.2" in output
