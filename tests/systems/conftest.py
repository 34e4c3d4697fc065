"""The systems need packages of their own (``make systems``): where one is missing, none of these tests is collected."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

NEEDED = (
    "torchvision",
    "timm",
    "lightning_fabric",
    "torchmetrics",
    "jsonargparse",
    "mlxtend",
    "animal_mnist",
    "skimage",
    "deepforest",
    "faster_coco_eval",
)
if missing := [name for name in NEEDED if find_spec(name) is None]:
    collect_ignore_glob = ["test_*.py"]
else:
    from rl_kernels.systems import config as configs
    from rl_kernels.systems.config import Config
    from rl_kernels.systems.data import sets
    from rl_kernels.systems.data.sets import Images, ImageSet
    from rl_kernels.systems.registry import system

    TINY = ("preset=digits", "width=4", "limit=96", "epochs=2", "batch_size=32", "accelerator=cpu")

    def random_images(shape: tuple[int, int, int], count: int) -> ImageSet:
        """Random pixels of ``(channels, size, classes)``."""
        channels, size, classes = shape
        generator = torch.Generator().manual_seed(0)

        def images() -> Images:
            pixels = torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
            return Images(torch.arange(count) % classes, pixels)

        names = tuple(f"class {index}" for index in range(classes))
        return ImageSet("random", names, images(), images(), channels, size, "0" * 64)


@pytest.fixture
def tiny():
    """A config of the smallest run: three steps an epoch, two epochs; settings come on top."""

    def make(*settings: str, of: str = "replacement") -> "Config":
        chosen = system(of)
        told = [each for each in (*TINY, *settings) if not each.startswith("preset=")]
        preset = next(each.partition("=")[2] for each in (*settings, *TINY) if each.startswith("preset="))
        return configs.resolve(chosen.config, chosen.presets, preset, None, told)

    return make


@pytest.fixture
def random_data(monkeypatch):
    """Stand-ins for data sets: whatever is asked for is random images of this shape."""

    def install(channels: int, size: int, classes: int, count: int = 8) -> None:
        made = random_images((channels, size, classes), count)
        monkeypatch.setattr(sets, "load", lambda *_, **__: made)

    return install


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"
