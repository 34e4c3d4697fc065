"""The kernels' memory: scratch of a fixed size for each thread beyond outputs, whatever the weight's size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rl_kernels as rl
from rl_kernels import functional as F
from rl_kernels._extension import EXTENSION
from rl_kernels.testing import peak_memory

MEBI = 1 << 20

# By resident memory, which sees what no allocator reports. Run in a process of its own, whose peak nothing has raised.
SCRIPT = """
import json, sys
from pathlib import Path

import torch

import rl_kernels as rl
from rl_kernels import functional as F

kind, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
if kind == "linear":
    x, weights = torch.randn(64, 4096), [torch.randn(4096, 4096) for _ in range(2)]
    call = F.mixed_linear
else:
    x, weights = torch.randn(1, 1536, 7, 7), [torch.randn(1536, 1536, 3, 3) for _ in range(2)]
    call = lambda *a: F.mixed_conv2d(*a, padding=1)
coefficients = torch.tensor([0.5, 0.25], requires_grad=True)
x.requires_grad_()


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


with rl.use_backend("cpu"):
    small = [torch.randn(4, 4, requires_grad=True) for _ in range(2)]
    F.mixed_linear(torch.randn(2, 4), small, coefficients).sum().backward()  # what a first call loads
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call(x, weights, coefficients).square().sum().backward()  # dx, and <G, W_j> without G
print(json.dumps({"grown": status("VmHWM") - before, "weight": weights[0].nbytes}))
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_resident_memory(kind: str, threads: int) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of resident memory can be reset on Linux only")
    command = [sys.executable, "-c", SCRIPT, kind, str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    # y, dy and dx are of a few MiB together; each thread has its scratch, and a stack.
    allowed = 4 * MEBI * threads + 8 * MEBI
    assert found["weight"] > 3 * allowed
    assert found["grown"] <= allowed, f"grew by {found['grown'] / MEBI:.1f} MiB"


def test_scratch_is_under_four_mebibytes_a_thread() -> None:
    assert EXTENSION.module.build_info()["workspace_bytes_a_thread"] <= 4 * MEBI


@pytest.mark.parametrize("wanted", ["all", "coefficients"])
@pytest.mark.parametrize("kind", ["linear", "conv", "pointwise", "small filters"])
def test_what_the_allocator_sees(kind: str, wanted: str) -> None:
    """Beyond the outputs: the sums of <G, W_j>, and partial sums where threads share out the pixels."""
    shapes = {
        "linear": ((32, 4096), (4096, 4096)),
        "conv": ((1, 1536, 7, 7), (1536, 1536, 3, 3)),
        "pointwise": ((1, 2048, 7, 7), (2048, 2048, 1, 1)),
        "small filters": ((64, 16, 16, 16), (16, 16, 3, 3)),
    }
    x_shape, weight_shape = shapes[kind]
    x = torch.randn(x_shape)
    weights = [torch.randn(weight_shape, requires_grad=wanted == "all") for _ in range(2)]
    coefficients = torch.tensor([0.5, 0.25], requires_grad=True)
    inputs = [coefficients, *weights] if wanted == "all" else [coefficients]
    with rl.use_backend("cpu"):
        if kind == "linear":
            y = F.mixed_linear(x, weights, coefficients)
        else:
            y = F.mixed_conv2d(x, weights, coefficients, padding=weight_shape[2] // 2)
        dy = torch.ones_like(y)
        grown = peak_memory(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True))
    assert grown - sum(tensor.nbytes for tensor in inputs) <= MEBI
