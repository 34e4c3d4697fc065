"""Local learning, trained by the runner of all systems."""

import json
import signal

import pytest
import torch

import rl_kernels as rl
from rl_kernels.systems.contract import ImageShape, Plain
from rl_kernels.systems.local.system import PRESETS
from rl_kernels.systems.registry import system
from rl_kernels.systems.runner import folder as files
from rl_kernels.systems.runner import training
from tests.systems.test_training import (
    OPTIONS,
    WITHOUT_BATCH_STATISTICS,
    assert_close_weights,
    assert_equal_weights,
    log,
    started,
    train_on_two,
    wait_for_lines,
    weights,
)

SYSTEM = system("local")
SMALL = ("head_width=8", "modules=3")


def train(config, folder, of=SYSTEM):
    return training.train(of, config, folder, show=False)


def test_one_module_is_the_run_of_a_whole_network(tiny, tmp_path):
    train(tiny("modules=1", of="local"), tmp_path / "local")
    train(tiny("every=null"), tmp_path / "whole", system("replacement"))
    mine = {key.removeprefix("model."): value for key, value in weights(tmp_path / "local").items()}
    assert_equal_weights(mine, weights(tmp_path / "whole"))
    assert log(tmp_path / "local") == log(tmp_path / "whole")


def test_the_peak_counts_gradients(tiny, tmp_path):
    """Of a network that is large beside its images."""
    small = ("width=16", "batch_size=4", "limit=8", "epochs=1")
    local = train(tiny("modules=1", *small, of="local"), tmp_path / "local")
    whole = train(tiny("every=null", *small), tmp_path / "whole", system("replacement"))
    assert local["peak_bytes"] == pytest.approx(whole["peak_bytes"], rel=0.01)


def test_a_run_leaves_its_figures(tiny, folder):
    metrics = train(tiny(*SMALL, "limit=320", "epochs=3", "probe=true", of="local"), folder)
    whole = SYSTEM.build(tiny("modules=1", of="local"), ImageShape(1, 8, 10)).model
    assert metrics["parameters"] == sum(p.numel() for p in whole.model.parameters())
    assert metrics["auxiliary_parameters"] > 0 and metrics["step_flops"] > 0
    assert len(metrics["probe_accuracies"]) == 3 and metrics["probe_accuracies"][-1] == pytest.approx(
        metrics["accuracy"]
    )
    losses = [line["train_loss"] for line in log(folder) if line["event"] == "epoch"]
    assert losses[0] > losses[-1]
    assert training.evaluate(folder)["accuracy"] == metrics["accuracy"]


def test_a_killed_run_goes_on_to_the_same_end(tiny, tmp_path):
    """Averages and heads, too, with mixed precision, accumulated parts and an average of the weights."""
    settings = ("width=4", "limit=320", "epochs=3", "batch_size=32", "checkpoint_steps=4", *SMALL)
    options = (each for each in OPTIONS if not each.startswith(("limit", "granularity")))
    settings = (*settings, *options)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with started(broken, *settings, "accelerator=cpu", of="local") as process:
        wait_for_lines(process, broken, 13)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (broken / files.METRICS).exists()
    resumed = training.resume(broken, show=False)
    expected = train(tiny(*settings, of="local"), whole)
    assert any(".average." in key for key in weights(whole))
    assert_equal_weights(weights(whole), weights(broken))
    assert log(whole) == log(broken) and resumed["accuracy"] == expected["accuracy"]


@pytest.mark.parametrize(
    "method", ["mlaan", *(pytest.param(name, marks=pytest.mark.slow) for name in ("greedy", "checkpointing"))]
)
def test_two_processes_are_one(method, tiny, folder):
    """Of a network without batch norm, whose statistics are of a process."""
    settings = (*WITHOUT_BATCH_STATISTICS, "modules=4", f"method={method}", "supervise_first=true")
    train_on_two(folder / "two", *settings, of="local")
    train(tiny(*settings, of="local"), folder / "one")
    assert_close_weights(weights(folder / "one"), weights(folder / "two"))
    two = json.loads((folder / "two" / files.METRICS).read_text())
    assert two["accuracy"] == training.evaluate(folder / "one")["accuracy"]


def test_flops_are_those_of_an_update(tiny, tmp_path):
    whole, parts = (
        train(tiny("method=bp", "epochs=1", "limit=32", f"accumulate={n}", of="local"), tmp_path / str(n))
        for n in (1, 4)
    )
    assert whole["step_flops"] == parts["step_flops"]


def test_a_replaced_network_learns_in_modules(tiny, folder):
    metrics = train(tiny(*SMALL, "every=4", of="local"), folder)
    model = SYSTEM.build(tiny(*SMALL, "every=4", of="local"), ImageShape(1, 8, 10)).model
    replaced = [module for module in model.model.modules() if isinstance(module, rl.nn.ReplacementLayer)]
    assert replaced and metrics["coefficients"] >= 4


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == "paper-like-resnet110"))
        for name in PRESETS
        if not name.startswith("imagenet")
    ],
)
def test_presets_take_two_steps(preset, tiny, random_data, folder):
    shape = (3, 32, 10) if "paper" in preset else (1, 8 if "digits" in preset else 28, 10)
    random_data(*shape)
    small = ("batch_size=4", "epochs=1", "limit=8", f"width={24 if 'vit' in preset else 4}", "head_width=4")
    assert train(tiny(f"preset={preset}", *small, of="local"), folder)["steps"] == 2


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("imagenet")])
def test_presets_of_imagenet_differentiate_without_memory(preset, tiny):
    with torch.device("meta"):
        config = tiny(f"preset={preset}", "width=null", "batch_size=2", "data.size=64", of="local")
        model = SYSTEM.build(config, ImageShape(3, 64, 1000)).model
        SYSTEM.step(config, model, torch.empty(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64), Plain())
    assert model.span == 3 and len(model.judges) == 1 and not model.heads.keys() - {"2"}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_compiled_modules_train(tiny, tmp_path, monkeypatch):
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled(module, backend="aot_eager"))
    for name, chosen in (("eager", "false"), ("compiled", "true")):
        settings = (f"compile={chosen}", "epochs=1", "limit=32", "method=dgl", *SMALL)
        train(tiny(*settings, of="local"), tmp_path / name)
    (left,), (right,) = ([x["loss"] for x in log(tmp_path / n) if x["event"] == "step"] for n in ("eager", "compiled"))
    assert right == pytest.approx(left, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("method=mlan",), "local.method: got 'mlan'"),
        (("strategy=fsdp2",), "runtime.strategy: got 'fsdp2'"),
        (("method=infopro-contrast", "mixup=0.2"), "data.mixup: got mixed images with a contrastive loss"),
        (("recognition=[1.0]",), r"method.recognition: got \(1.0,\), expected two numbers"),
        (("modules=0",), "local.modules: got 0, expected at least 1"),
        (("copy_momentum=2",), "local.copy_momentum: got 2"),
        (("method=bp", "mixing=sum"), "local.mixing: got a value with method=bp"),
        (("method=dgl", "mixing=weights"), "local.mixing: got 'weights' with copies=0"),
        (("span=9",), "local.span: got 9, expected at most 4, the modules"),
        (("patches=9",), "method: module 1 returns .* with patches=9"),
        (("batch_size=2", "accumulate=2"), "batch_size: got one image at a time"),
        (("modules=99",), "modules: got 99, expected at least 1 and at most 13, of which each can be one"),
    ],
)
def test_bad_configs_are_refused(settings, said, tiny, folder):
    with pytest.raises(ValueError, match=said):
        train(tiny(*settings, of="local"), folder)
    assert not folder.exists()
