"""Records that no machine made."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.cases import CASES, Case
from benchmarks.measure import Settings, summary
from benchmarks.record import Record
from benchmarks.run import modes_of

OURS = "rl_kernels[cpu]"
RIVALS = ("ceiling", "naive", "add", "compile", "two_products", "parametrize", OURS)
SLOWDOWN = {"naive": 2.2, "add": 1.9, "compile": 1.6, "two_products": 2.0, "parametrize": 2.4, OURS: 1.07}


def rival(
    ratio: float, noise: float = 0.02, seconds: float = 1e-3, extra: int = 1 << 20, **facts: Any
) -> dict[str, Any]:
    """A rival at ``ratio`` times the baseline's ``seconds``, its p20 and p80 ``noise`` away."""

    def around(value: float) -> dict[str, float]:
        return {"median": value, "p20": value * (1 - noise), "p80": value * (1 + noise)}

    return {
        "error": 1e-7,
        "peak_extra_bytes": extra,
        "rss_extra_bytes": None,
        "seconds": around(ratio * seconds),
        "ratio": around(ratio),
        "roofline": 0.5,
        "calls": 2,
        "rounds": 9,
        **facts,
    }


def cells_of(cases: Sequence[Case], shake: Callable[[], float]) -> list[dict[str, Any]]:
    cells = []
    for case in cases:
        model = case.group == "model"
        names = ("end-to-end", OURS) if model else RIVALS
        for mode in modes_of(case):
            facts = {"parameters": 464154, "optimizer_bytes": 1 << 21, "held_bytes": 1 << 22, "peak_bytes": 3 << 26}
            rivals = {
                name: rival(
                    SLOWDOWN.get(name, 1.0) * shake(), extra=int(shake() * (20 << 20)), **facts if model else {}
                )
                for name in names
            }
            rivals[names[0]] |= {"ratio": summary([1.0])}
            cells.append({"case": case.as_record(), "mode": mode, "baseline": names[0], "rivals": rivals})
    return cells


def record(cases: Sequence[Case] = CASES, seed: int | None = None, **changes: Any) -> Record:
    """A whole record; with a ``seed``, times and memory vary from case to case."""
    generator = random.Random(seed)
    made = Record.begin(["run", "--device", "cpu"], Settings())
    made.cells = cells_of(cases, lambda: 1.0 if seed is None else generator.uniform(0.7, 1.6))
    made.git = {"commit": "0123456789abcdef", "dirty": False}
    made.complete = True
    for name, value in changes.items():
        setattr(made, name, value)
    return made
