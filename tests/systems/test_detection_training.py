"""A detector, trained by the runner of all systems."""

import signal

import pytest
import torch

import rl_kernels as rl
from rl_kernels.systems import config as configs
from rl_kernels.systems.contract import ImageShape
from rl_kernels.systems.detection import data as sets
from rl_kernels.systems.detection.images import BoxImages, BoxSet
from rl_kernels.systems.detection.system import PRESETS
from rl_kernels.systems.registry import system
from rl_kernels.systems.runner import folder as files
from rl_kernels.systems.runner import training
from tests.systems.test_training import assert_equal_weights, log, weights

SYSTEM = system("detection")
SMALL = ("epochs=2", "batch_size=4", "accelerator=cpu", "data.size=64", "learning_rate=0.002")


def images(count, size=64):
    """A bright square each, of one of two colours, and one image without any."""
    generator = torch.Generator().manual_seed(count)
    pixels = torch.full((count, 3, size, size), 60, dtype=torch.uint8)
    boxes, labels = [], []
    for number in range(count - 1):
        x, y = torch.randint(0, size - 32, (2,), generator=generator).tolist()
        pixels[number, number % 2, y : y + 28, x : x + 28] = 250
        boxes.append(torch.tensor([[x, y, x + 28, y + 28]], dtype=torch.float32))
        labels.append(torch.tensor([number % 2]))
    return BoxImages((*boxes, torch.zeros(0, 4)), (*labels, torch.zeros(0, dtype=torch.int64)), pixels)


@pytest.fixture(autouse=True)
def squares(monkeypatch):
    made = BoxSet("squares", ("red", "green"), images(12), images(5), "0" * 64)
    monkeypatch.setattr(sets, "load", lambda *_, **__: made)


def config(*settings, preset="scenes"):
    return configs.resolve(SYSTEM.config, SYSTEM.presets, preset, None, [*SMALL, *settings])


def train(told, folder):
    return training.train(SYSTEM, told, folder, show=False)


def test_a_run_leaves_its_figures(folder):
    metrics = train(config("box=mean", "scm=weights", "gom=gam"), folder)
    assert {"map", "map_50", "map_75", "mar_100", "map_50_by_class"} <= metrics.keys()
    assert len(metrics["map_50_by_class"]) == 2 and metrics["steps"] == 6
    losses = [line["train_loss"] for line in log(folder) if "train_loss" in line]
    assert losses[1] < losses[0]
    again = training.evaluate(folder)
    assert again["map"] == metrics["map"] and again["images"] == 5


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path, monkeypatch):
    """Every option of training together; stopped by a signal in the middle of an epoch."""
    told = config(
        "ema=0.9", "accumulate=2", "validation=0.2", "precision=bf16-mixed", "checkpoint_steps=1", "channels_last=true"
    )
    train(told, tmp_path / "whole")
    step, taken = SYSTEM.step, []

    def stopping(*arguments):
        taken.append(None)
        if len(taken) == 6:  # Of two parts each: the third step.
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(SYSTEM, "step", stopping)
    with pytest.raises(training.Stopped):
        train(told, tmp_path / "broken")
    monkeypatch.setattr(SYSTEM, "step", step)
    assert not (tmp_path / "broken" / files.METRICS).exists()
    training.resume(tmp_path / "broken", show=False)
    assert_equal_weights(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert log(tmp_path / "whole") == log(tmp_path / "broken")


def test_replaced_blocks_in_the_backbone_learn(folder):
    """Of a depth at which there are chains of equal blocks."""
    told = config("detection.scale=m", "every=3", "epochs=1", "limit=4")
    model = SYSTEM.build(told, ImageShape(3, 64, 2))
    assert model.plan is not None and any(isinstance(m, rl.nn.ReplacementLayer) for m in model.model.modules())
    assert train(told, folder)["coefficients"] >= 2


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build(preset):
    told = configs.resolve(SYSTEM.config, SYSTEM.presets, preset, None, [])
    with torch.device("meta"):
        model = SYSTEM.build(told, ImageShape(3, 640, 80)).model
    assert sum(p.numel() for p in model.parameters()) > 1_000_000
    norms = {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert norms == {told.detection.norm_momentum}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("detection.scale=x",), "detection.scale: got 'x'"),
        (("gom=both",), "detection.gom: got 'both'"),
        (("box=aiou",), "detection.box: got 'aiou'"),
        (("data.size=100",), "data.size: got 100, expected a multiple of 32"),
        (("mixup=0.2",), "data.mixup: got 0.2, expected 0"),
        (("data.augmentation=crop",), "data.augmentation: got 'crop', expected detection.augment"),
        (("strategy=fsdp2",), "runtime.strategy: got 'fsdp2'"),
        (("norm_momentum=0",), "detection.norm_momentum: got 0"),
        (("weights=here",), "model.weights: got a path"),
        (("mosaic=2",), "mosaic: got 2"),
        (("batch_size=64",), "batch_size: got 64, expected at most 12"),
    ],
)
def test_bad_configs_are_refused(settings, said, folder):
    with pytest.raises(ValueError, match=said):
        train(config(*settings), folder)
    assert not folder.exists()
