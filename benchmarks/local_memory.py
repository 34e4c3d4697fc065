"""Peak memory of locally supervised ResNet-110s, beside InfoPro's published figures; nothing is allocated.

``python -m benchmarks.local_memory``: one step of batch 1024, 3x32x32, float32, on the meta device, where every tensor
that torch's allocator would hold is counted (``rl_kernels.testing.peak_memory``), parameters and gradients included.
What a GPU takes besides (its context, cuDNN's workspaces, what the allocator cannot use) is in the published figures,
"the minimally required GPU memory" of InfoPro's authors, and not in these.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.record import git_state
from rl_kernels._machine import versions
from rl_kernels.systems.local import LocalNetwork, split
from rl_kernels.systems.models import DigitsResNet
from rl_kernels.testing import peak_memory

BATCH, SIZE = 1024, 32
# Method, K, where it is cut; what Table 3 of InfoPro (arXiv 2101.10832) says of it in GB, if it does.
CASES: tuple[tuple[str, int, str, float | None], ...] = (
    ("bp", 1, "blocks", 9.40),
    ("checkpointing", 2, "memory", 3.91),
    ("checkpointing", 4, "memory", 3.91),
    ("checkpointing", 8, "memory", 3.91),
    ("infopro-contrast", 2, "memory", 5.38),
    ("infopro-contrast", 3, "memory", 4.22),
    ("infopro-contrast", 4, "memory", 3.52),
    ("dgl", 2, "blocks", None),
    ("dgl", 4, "blocks", None),
    ("dgl", 16, "blocks", None),
    ("dgl", 55, "blocks", None),
    ("hilo", 16, "blocks", None),
    ("man++", 16, "blocks", None),
    ("mlaan", 16, "blocks", None),
)


def peak(method: str, modules: int, cut: Any, *, batch: int = BATCH, depth: int = 18, width: int = 16) -> int:
    """Return the bytes that one step holds at most, with parameters and gradients, without an optimizer's state.

    Args:
        method: of local learning.
        modules: K.
        cut: where the network is cut.
        batch: images.
        depth: blocks of each of three stages: 18 in ResNet-110.
        width: channels of the first stage.
    """
    with torch.device("meta"):
        model = DigitsResNet(width, (depth,) * 3, 10, 3)
        net: LocalNetwork = split(model, modules, shape=(2, 3, SIZE, SIZE), method=method, cut=cut)
        images, targets = torch.empty(batch, 3, SIZE, SIZE), torch.zeros(batch, dtype=torch.int64)
        held = sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers(), images, targets))
        return held + peak_memory(lambda: net.step(images, targets), "meta")


@click.command()
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write a record as well.")
def main(output: Path | None) -> None:
    """Print GB (10^9 bytes) of every case."""
    cells = []
    for method, modules, cut, published in CASES:
        found = peak(method, modules, cut) / 1e9
        cells.append({"method": method, "modules": modules, "cut": cut, "gigabytes": found, "published": published})
        beside = "" if published is None else f"  published {published:.2f}, {100 * (found / published - 1):+.0f} %"
        print(f"{method:<18} K={modules:<3} by {cut:<7} {found:6.2f} GB{beside}", flush=True)
    if output is not None:
        about: dict[str, Any] = {"created": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        about |= {"versions": versions(), "git": git_state(), "network": "ResNet-110", "batch": BATCH, "unit": "GB"}
        output.write_text(json.dumps(about | {"cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
