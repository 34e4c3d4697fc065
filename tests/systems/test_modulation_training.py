"""Tasks learnt by the runner of all systems."""

import signal

import pytest
import torch
from torch.nn import functional as F

from rl_kernels.systems.contract import ImageShape
from rl_kernels.systems.matrices import Matrix, carry_out
from rl_kernels.systems.modulation.system import PRESETS
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

SYSTEM = system("modulation")


def train(config, folder, of=SYSTEM):
    return training.train(of, config, folder, show=False)


@pytest.fixture
def base(tiny, tmp_path):
    folder = tmp_path / "base"
    train(tiny("every=null"), folder, system("replacement"))
    return folder


@pytest.mark.parametrize(
    "kind",
    [
        "outer",
        "lora",
        "none",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("channel", "gate", "mixout", "mlp")),
    ],
)
def test_a_task_is_learnt_on_a_frozen_network(kind, base, tiny, folder):
    settings = (f"weights={base}", f"kind={kind}", "limit=160", "epochs=3", "weight_decay=0", "warmup=0")
    metrics = train(tiny(*settings, of="modulation"), folder)
    before, after = weights(base), weights(folder)
    names = [name.replace(".base_layer", "").replace(".base.", ".") for name in after]
    found = {name: value for name, value in zip(names, after.values(), strict=True) if name in before}
    assert found.keys() == before.keys()
    frozen = {name for name in before if "head" not in name}
    assert_equal_weights({name: found[name] for name in frozen}, {name: before[name] for name in frozen})
    losses = [line["train_loss"] for line in log(folder) if "train_loss" in line]
    assert losses[0] > losses[-1]
    assert metrics["base_parameters"] == sum(
        v.numel() for k, v in before.items() if "running" not in k and "num_" not in k
    )
    assert metrics["task_share"] == metrics["task_parameters"] / metrics["base_parameters"]
    assert ("task_bytes" in metrics) == (kind != "lora")
    assert training.evaluate(folder)["accuracy"] == metrics["accuracy"]


def test_the_whole_network_is_the_run_of_a_plain_one(tiny, tmp_path):
    as_plain = ("weight_decay=0.05", "warmup=0.2")
    metrics = train(tiny("kind=full", *as_plain, of="modulation"), tmp_path / "full")
    train(tiny("every=null"), tmp_path / "plain", system("replacement"))
    assert_equal_weights(weights(tmp_path / "full"), weights(tmp_path / "plain"))
    assert (
        metrics["task_parameters"] == metrics["parameters"] - 90 and metrics["base_parameters"] == metrics["parameters"]
    )


def test_what_is_unfrozen_learns(base, tiny, folder):
    train(tiny(f"weights={base}", "kind=none", "unfrozen=[blocks.11]", of="modulation"), folder)
    before, after = weights(base), weights(folder)
    for block, learns in ((0, False), (11, True)):
        name = f"blocks.{block}.conv1.weight"
        assert torch.equal(before[name], after[name]) != learns


def test_a_linear_probe_is_one(base, tiny, folder):
    """Neither norms nor statistics move."""
    metrics = train(tiny(f"weights={base}", "kind=none", "norms=frozen", of="modulation"), folder)
    assert metrics["task_parameters"] == 0 and metrics["trainable_parameters"] == 8 * 10 + 10
    before, after = weights(base), weights(folder)
    for name in (name for name in before if "running" in name):
        stem, _, last = name.rpartition(".")
        assert torch.equal(before[name], after[f"{stem}.base.{last}"])


@pytest.mark.slow  # The runner's own test kills one of another system.
def test_a_killed_run_goes_on_to_the_same_end(tiny, tmp_path):
    settings = ("width=4", "limit=320", "epochs=3", "batch_size=32", "checkpoint_steps=4")
    settings = (*settings, *(each for each in OPTIONS if not each.startswith(("limit", "granularity"))))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with started(broken, *settings, "accelerator=cpu", of="modulation") as process:
        wait_for_lines(process, broken, 13)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (broken / files.METRICS).exists()
    resumed = training.resume(broken, show=False)
    expected = train(tiny(*settings, of="modulation"), whole)
    assert_equal_weights(weights(whole), weights(broken))
    assert log(whole) == log(broken) and resumed["accuracy"] == expected["accuracy"]


@pytest.mark.slow
def test_two_processes_are_one(tiny, folder):
    settings = (*WITHOUT_BATCH_STATISTICS, "targets=linear")
    train_on_two(folder / "two", *settings, of="modulation")
    train(tiny(*settings, of="modulation"), folder / "one")
    assert_close_weights(weights(folder / "one"), weights(folder / "two"))


def test_a_base_of_other_classes(base, tiny, random_data, folder):
    """Its classifier is left out; a file of weights does as well as a run."""
    random_data(1, 8, 3)
    torch.save(weights(base), folder.parent / "weights.pt")
    runs = []
    for name, where in (("run", base), ("file", folder.parent / "weights.pt")):
        train(tiny(f"weights={where}", "limit=8", "batch_size=4", "epochs=1", of="modulation"), folder / name)
        runs.append(weights(folder / name))
    assert_equal_weights(*runs)
    assert runs[0]["head.base.weight"].shape[0] == 3


LARGE = ("resnet34", "resnet50")


@pytest.mark.parametrize("preset", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in PRESETS])
def test_presets_take_two_steps(preset, tiny, random_data, folder):
    large = preset.startswith("resnet")
    random_data(3 if large or "cifar" in preset else 1, 32 if large else 28, 10)
    small = ("batch_size=4", "epochs=1", "limit=8", "data.size=32", f"width={'null' if large else 4}")
    assert train(tiny(f"preset={preset}", *small, of="modulation"), folder)["steps"] == 2


def test_runs_of_a_matrix_begin_with_a_base_that_is_not_compared(tmp_path):
    tiny = ("limit=64", "epochs=1", "batch_size=32", "width=4", "accelerator=cpu", "threads=1")
    matrix = Matrix(
        "?",
        "modulation",
        "digits",
        1,
        {"outer": ("weights={base}",), "probe": ("weights={base}", "kind=none", "norms=frozen")},
        tiny,
        {"base": ("kind=full",)},
    )
    folders = carry_out(matrix, tmp_path, 1)
    assert [folder.name for folder in folders] == ["outer", "probe"]
    trained = weights(tmp_path / "base" / "seed-0")["blocks.0.conv1.weight"]
    of_task = weights(tmp_path / "outer" / "seed-0")
    assert torch.equal(of_task["blocks.0.conv1.base.weight"], trained)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("kind=outre",), "modulation.kind: got 'outre'"),
        (("rank=0",), "modulation.rank: got 0, expected at least 1"),
        (("kind=full", "unfrozen=[head]"), "modulation.unfrozen: got .* with kind='full'"),
        (("unfrozen=[blocks.99]",), "modulation.unfrozen: got 'blocks.99', which the model has not"),
        (("targets=all", "kind=gate", "preset=digits-vit"), "preset: got 'digits-vit'"),
        (("model.name=digits_vit", "width=8", "kind=gate", "targets=linear"), "targets: got the linear layer"),
    ],
)
def test_bad_configs_are_refused(settings, said, tiny, folder):
    with pytest.raises(ValueError, match=said):
        train(tiny(*settings, of="modulation"), folder)
    assert not folder.exists()


def test_the_network_of_a_run_takes_its_task(base, tiny, folder):
    """What a run learnt is a task for the network that it began with."""
    from rl_kernels.systems.modulation import load_task, save_task
    from rl_kernels.systems.networks import build

    shape = ImageShape(1, 8, 10)
    config = tiny(f"weights={base}", of="modulation")
    train(config, folder)
    trained = SYSTEM.build(config, shape).model
    trained.load_state_dict(weights(folder))
    save_task(trained, "task", folder / "task.safetensors")
    network = build("digits_resnet", shape, 4)
    network.load_state_dict(weights(base))
    load_task(network, folder / "task.safetensors")
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(network.eval()(x), trained.eval()(x))
    assert F.cross_entropy(network(x), torch.zeros(3, dtype=torch.int64)) > 0
