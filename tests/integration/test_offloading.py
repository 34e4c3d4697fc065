"""accelerate's offloading, which leaves a module's parameters on the meta device between its calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rl_kernels as rl

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")


def block(kind: str) -> nn.Module:
    layer = nn.Linear(8, 8) if kind == "linear" else nn.Conv1d(3, 3, 3, padding=1)
    return nn.Sequential(layer, nn.ReLU(), nn.LayerNorm(8))


@pytest.mark.parametrize("way", ["cpu", "disk", "dispatched"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_offloaded_sources_are_fetched(kind: str, way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(block(kind) for _ in range(5))).eval()
    rl.replace(model, rl.plan(model, every=2))
    x = torch.randn(2, 3, 8)
    expected = model(x).detach()
    if way == "cpu":
        accelerate.cpu_offload(model, execution_device=CPU)
    elif way == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=CPU)
    else:
        places = {str(i): "cpu" if i % 2 else "disk" for i in range(5)}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert next(model[0].parameters()).is_meta
    torch.testing.assert_close(model(x), expected)
    assert next(model[0].parameters()).is_meta
    torch.testing.assert_close(rl.merge(model)(x), expected)


def test_attention_fails_as_torchs_own() -> None:
    """It reads the parameters of its output projection past that module's call, for which alone they are fetched."""
    plain: Any = nn.Sequential(*(nn.MultiheadAttention(8, 2) for _ in range(3)))
    accelerate.cpu_offload(plain, execution_device=CPU)
    with pytest.raises(RuntimeError, match="meta"):
        plain[1](*[torch.randn(3, 1, 8)] * 3)
