"""The stages of the two calls, in order of importance: what is right, what is fast; then all that takes longer."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.gpu.session import SUMMARY, Session, Stage
from benchmarks.gpu.tools import describe, gpu
from building.cuda import find_program
from rl_kernels.ops.schema import OPS

SECONDS = {1: 240.0, 2: 330.0}
"""Of each call: with two starts, fifteen minutes in all."""
SHOWN = 10_000
"""Characters of the summary that are printed at the end."""
LINEARS = tuple(op for op in OPS if "linear" in op)
CONVS = tuple(op for op in OPS if "conv" in op)


@dataclass(frozen=True)
class Where:
    """What a call runs on.

    Attributes:
        device: ``"cuda"``; ``"cpu"`` in a rehearsal.
        cuda, triton: the backends; others stand in for them in a rehearsal.
        work: a folder for logs, records and the build.
        rehearsal: whether tiny cells are timed, and nothing is compiled.
    """

    device: str
    cuda: str
    triton: str
    work: Path
    rehearsal: bool = False

    def python(self, *arguments: str) -> list[str]:
        """A command of this Python."""
        return [sys.executable, *arguments]

    def checks(self, backend: str, ops: Sequence[str], *dtypes: str) -> list[list[str]]:
        """Checks of every op, side by side."""
        options = ["--backend", backend, "--device", self.device, *(f"--dtype={dtype}" for dtype in dtypes)]
        return [self.python("-m", "benchmarks.gpu.checks", "--op", op, *options) for op in ops]

    def cells(self, seconds: float, *options: str) -> list[list[str]]:
        """All cells, by one process."""
        backends = [f"--backend={name}" for name in dict.fromkeys((self.cuda, self.triton, "streamed", "reference"))]
        small = ["--small"] if self.rehearsal else []
        rest = [f"--device={self.device}", f"--cell-seconds={seconds}", *small, *options]
        return [self.python("-m", "benchmarks.gpu.cells", *backends, *rest)]

    def tests(self, *arguments: str) -> list[str]:
        """Tests that need a GPU."""
        return self.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu", *arguments)


def build(where: Where) -> Stage:
    """The kernels for this GPU alone, and ``_C``, which calls them; setup.py says what is missing for either.

    They are built side by side, ``_C`` without what makes its own kernels fast: no CPU is timed here, but the host is.
    """
    arch = gpu().get("compute_cap", "")
    environment = {"RL_KERNELS_SCALAR": "1", "RL_KERNELS_QUICK": "1", "RL_KERNELS_CUDA_ARCH_LIST": arch}
    command = where.python("setup.py", "--quiet", "build_ext", "--build-lib", str(where.work / "build"))
    wanted = [("0", "0")] if where.rehearsal else [("1", "0"), ("0", "1")]
    commands = [["env", f"USE_CPP={cpp}", f"USE_CUDA={cuda}", *command] for cpp, cuda in wanted]
    lacks = "" if where.rehearsal or find_program("nvcc") else "NO NVCC WAS FOUND: no CUDA kernel is built or checked"
    return Stage("build", 100, commands, environment, background=True, lacks=lacks)


def first(where: Where) -> list[Stage]:
    """What is right, and what is fast. The CUDA kernels come as soon as they are built; Triton's compile meanwhile."""
    built = "" if where.rehearsal else "build"
    return [
        build(where),
        Stage("triton linear", 60, where.checks(where.triton, LINEARS, "bfloat16")),
        Stage("cuda bf16 f16", 45, where.checks(where.cuda, [*OPS], "bfloat16", "float16"), needs=built),
        Stage("cuda tf32", 15, where.checks(where.cuda, [*OPS], "float32"), needs=built),
        Stage("cells", 90, where.cells(0.1 if where.rehearsal else 1.5)),
        Stage("triton conv", 60, where.checks(where.triton, CONVS, "bfloat16")),
    ]


def second(where: Where) -> list[Stage]:
    """What watches memory and streams, then records that ``auto`` goes by, then what was left of the first call."""
    sanitizer = find_program("compute-sanitizer")
    # Within torch's allocator it sees no bound of a tensor.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    watched = [sanitizer or "compute-sanitizer", "--error-exitcode", "1", *where.tests("-k", "test_small and cuda")]
    lacks = "" if sanitizer else "no compute-sanitizer was found"
    options = ["--dtype", "bfloat16", "--device", where.device, "--output", str(where.work / "records")]
    qualify = [
        where.python("-m", "rl_kernels", "qualify", "--quick", "--backend", name, *options)
        for name in ("cuda", "triton")
    ]
    built = "" if where.rehearsal else "build"
    return [
        build(where),
        Stage("streams, graphs, memory", 50, [where.tests("-k", "not right and not test_small")]),
        Stage("sanitizer", 60, [watched], uncached, lacks=lacks, needs=built),
        Stage("qualify cuda", 90, qualify[:1], needs=built),
        Stage("qualify triton", 90, qualify[1:]),
        Stage("cells", 60, where.cells(0.1 if where.rehearsal else 1.0, "--skip", "0" if where.rehearsal else "7")),
    ]


def shortened(session: Session) -> str:
    """The summary for people: how stages ended, what is wrong, the cells."""
    lines = session.lines
    checks = [line for line in lines if "ok" in line]
    wrong = [line for line in checks if not line["ok"]]
    ended = [f"{line['t']:6.1f} s  {line['stage']}: {line['status']}" for line in lines if "status" in line]
    failures = [f"WRONG {_one(line, 'backend', 'op', 'dtype', 'config', 'problem', 'wrong')}" for line in wrong]
    cells = [_one(line, *(key for key in line if key not in ("t", "stage"))) for line in lines if "cell" in line]
    text = "\n".join([*ended, f"{len(checks)} checks, {len(wrong)} wrong", *failures, *cells])
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}\n... ({SUMMARY} has all of it)"


def _one(line: dict[str, Any], *keys: str) -> str:
    return " ".join(str(line.get(key)) for key in keys)[:400]


@click.command()
@click.argument("call", type=click.Choice(["1", "2"]))
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--rehearse", is_flag=True, help="Without a GPU: other backends in its place, tiny cells, no build.")
@click.option("--seconds", type=float, help="Instead of the call's own.")
def main(call: str, output: Path, rehearse: bool, seconds: float | None) -> None:
    """Run the first or the second CALL; what it finds goes to OUTPUT, in two files."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work = Path(folder, "run")
        names = ("streamed", "reference") if rehearse else ("cuda", "triton")
        where = Where("cpu" if rehearse else "cuda", *names, work, rehearse)
        session = Session(output, work, seconds or SECONDS[int(call)])
        session.note("machine", **describe())
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
        if not rehearse:
            os.environ["RL_KERNELS_EXTENSION"] = str(work / "build" / "rl_kernels")
        try:
            session.run(first(where) if call == "1" else second(where))
        finally:
            print(shortened(session), flush=True)


if __name__ == "__main__":
    main()
