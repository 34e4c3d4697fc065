"""The memory of local learning, counted without any: as the allocator's own, and falling with the modules."""

import pytest
import torch

from benchmarks.local_memory import peak
from rl_kernels.systems.local import split
from rl_kernels.systems.models import DigitsResNet
from rl_kernels.testing import peak_memory


# Not "greedy": a mean's gradient is expanded, and the CPU's batch norm copies such a one inside its backward.
@pytest.mark.parametrize(("method", "modules"), [("bp", 1), ("mlaan", 2), ("mlaan", 3)])
def test_the_meta_device_counts_what_the_cpu_allocates(method, modules):
    found = {}
    for device in ("cpu", "meta"):
        with torch.device(device):
            net = split(DigitsResNet(8, (2, 2, 2)), modules, shape=(2, 1, 28, 28), method=method, head_width=8)
            images, targets = torch.zeros(32, 1, 28, 28), torch.zeros(32, dtype=torch.int64)
        net.step(images, targets)  # Gradients are there from now on.
        found[device] = peak_memory(lambda net=net, i=images, t=targets: net.step(i, t), device)
    assert found["meta"] == pytest.approx(found["cpu"], rel=0.05)


def test_what_is_freed_is_not_held():
    def chain():
        x = torch.empty(1000, device="meta")
        for _ in range(5):
            x = x + 1
        return x

    assert peak_memory(chain, "meta") == 2 * 4096
    kept = torch.empty(1000, device="meta")
    assert peak_memory(lambda: kept.add_(1).view(10, 100), "meta") == 0, "what was there before, and views of it"
    assert peak_memory(lambda: [torch.empty(1, device="meta") for _ in range(3)], "meta") == 3 * 512


def test_more_modules_hold_less():
    small = {"batch": 8, "depth": 3, "width": 4}
    whole, two, four = (peak("greedy", modules, "memory", **small) for modules in (1, 2, 4))
    assert whole > two > four > 0
