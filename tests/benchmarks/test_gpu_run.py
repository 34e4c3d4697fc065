"""The two calls for which a GPU is borrowed, rehearsed without one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import calls
from benchmarks.gpu.session import Session, Stage
from rl_kernels.nn import ReplacementLayer
from tests.gpu.test_kernels import linear_and_conv

ROOT = Path(__file__).parents[2]
FAKE = """#!/bin/sh
echo "NVIDIA H200, 9.0, 580.00, 143771 MiB, 1980 MHz, 3201 MHz"
"""


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "summary.jsonl").read_text().splitlines()]


def statuses(folder: Path) -> dict[str, str]:
    return {line["stage"]: line["status"] for line in lines_of(folder) if "status" in line}


def members(folder: Path) -> list[str]:
    with tarfile.open(folder / "run.tgz") as archive:
        return [member.name for member in archive.getmembers()]


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path / "out", tmp_path / "work", 20)


def test_lines_logs_and_how_each_stage_ended(session: Session) -> None:
    session.run(
        [
            Stage("slow", 10, [python("import time; time.sleep(1); print('built')")], background=True),
            Stage("two", 10, [python(f"print('{{\"cell\": {j}}}'); print('no line')") for j in (1, 2)]),
            Stage("failing", 10, [python("import sys; print('why'); sys.exit(3)")]),
            Stage("cut", 1, [python("import time; print('{\"found\": 1}'); time.sleep(60)")]),
            Stage("after", 5, [python("pass")], needs="slow"),
            Stage("orphan", 5, [python("pass")], needs="failing"),
            Stage("toolless", 5, [python("pass")], lacks="no tool was found"),
        ]
    )
    assert statuses(session.output) == {
        "slow": "done",
        "two": "done",
        "failing": "failed with 3",
        "cut": "cut after 1 s",
        "after": "done",
        "orphan": "not run: failing is not done",
        "toolless": "not run: no tool was found",
    }
    lines = lines_of(session.output)
    assert sorted(line["cell"] for line in lines if "cell" in line) == [1, 2]
    assert [line["stage"] for line in lines if "found" in line] == ["cut"]
    assert {"./two.log", "./two1.log", "./failing.log", "./slow.log"} <= set(members(session.output))
    assert sorted(path.name for path in session.output.iterdir()) == ["run.tgz", "summary.jsonl"]


def test_the_layers_that_gpus_are_tested_with_have_their_sources_there() -> None:
    model = linear_and_conv("meta")
    layers = [layer for layer in model if isinstance(layer, ReplacementLayer)]
    parameters = [parameter for layer in layers for source in layer.sources for parameter in source.parameters()]
    assert len(parameters) == 8 and all(p.is_meta and p.dtype == torch.bfloat16 for p in parameters)
    assert all(layer.coefficients.is_meta for layer in layers)


def test_the_kernels_are_built_with_what_calls_them(tmp_path: Path) -> None:
    """The CUDA backend needs both extensions, and each takes its time to compile."""
    stage = calls.build(calls.Where("cuda", "cuda", "triton", tmp_path))
    assert [command[1:3] for command in stage.commands] == [["USE_CPP=1", "USE_CUDA=0"], ["USE_CPP=0", "USE_CUDA=1"]]


def test_the_deadline_ends_what_runs(tmp_path: Path) -> None:
    session = Session(tmp_path / "out", tmp_path / "work", 2)
    start = time.monotonic()
    session.run([Stage(name, 60, [python("import time; time.sleep(60)")]) for name in ("first", "second")])
    assert time.monotonic() - start < 12
    assert statuses(session.output) == {"first": "cut after 2 s", "second": "not run: no time left"}


def rehearsal(call: int, out: Path, tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir(exist_ok=True)
    (bin_folder / "nvidia-smi").write_text(FAKE)
    (bin_folder / "nvidia-smi").chmod(0o755)
    # Nothing of the PATH is needed but a shell's own programs.
    environment = {"PATH": f"{bin_folder}:/usr/bin:/bin", "PYTHON": sys.executable, "HOME": str(tmp_path)}
    environment |= {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "RL_KERNELS_EXT"))}
    command = ["benchmarks/gpu_run.sh", str(call), str(out), "--rehearse", *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("call", [1, 2])
def test_a_rehearsal(call: int, tmp_path: Path) -> None:
    """The whole script without a GPU, but cut short: two files, a line for each stage, what was found in them."""
    process = rehearsal(call, tmp_path / "out", tmp_path, "--seconds", "25")
    said, _ = process.communicate(timeout=120)
    out = tmp_path / "out"
    assert process.returncode == 0, said
    assert sorted(path.name for path in out.iterdir()) == ["run.tgz", "summary.jsonl"]
    first, *lines = lines_of(out)
    assert first["gpu"]["name"] == "NVIDIA H200" and first["gpu"]["compute_cap"] == "9.0"
    assert first["versions"]["torch"] and "setuptools" in first["versions"]
    stages = {
        1: {"build", "triton linear", "cuda bf16 f16", "cuda tf32", "cells", "triton conv"},
        2: {"build", "streams, graphs, memory", "sanitizer", "qualify cuda", "qualify triton", "cells"},
    }
    assert set(statuses(out)) == stages[call]
    assert all(line["ok"] for line in lines if "ok" in line)
    assert (call == 2) or any("ok" in line for line in lines)
    assert len(said) < 12_000 and "build: " in said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_a_call_that_is_killed_leaves_what_it_had_found(number: int, tmp_path: Path) -> None:
    process = rehearsal(1, tmp_path / "out", tmp_path, "--seconds", "60")
    summary = tmp_path / "out" / "summary.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (summary.exists() and summary.read_text().count("\n") > 2):
        time.sleep(0.2)
    time.sleep(random.Random().uniform(0, 3))
    found = summary.read_text().count("\n")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert found > 2 and len(lines_of(tmp_path / "out")) >= found
    if number == signal.SIGTERM:
        assert "ended by signal 15" in [*statuses(tmp_path / "out").values()][-1]
        assert members(tmp_path / "out")
