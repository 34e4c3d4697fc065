"""Checks against other versions of what the package builds on, each in an environment of its own: ``nox``.

Every session names what it pins anew; all else is pinned by constraints.txt, but for what torch brings by itself.
"""

from __future__ import annotations

import re
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"

# The oldest that are supported, as rl_kernels/_supported.py and backends/triton/backend.py state them. A torch for CUDA
# brings the Triton that it was made with; a torch for CPUs none.
OLDEST_TORCH = "torch==2.11.0"
OLDEST_TRITON = "triton==3.6.0"
# Of the oldest Triton the interpreter breaks on newer numpys.
OLDEST_NUMPY = "numpy<2.4"
# Each torch demands its own of these.
TORCHS_OWN = re.compile(r"torch|torchvision|triton|setuptools|sympy|networkx|cuda-.*|nvidia-.*")

TESTS = ("pytest", "-n", "2", "--ignore", "tests/emulated", "tests")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def install(session: nox.Session, *pins: str, build: bool = True) -> None:
    """Install torch and this package, with ``pins`` in place of those of constraints.txt."""
    ours = {re.split(r"[<=>]", pin)[0] for pin in pins}
    kept = []
    for line in Path("constraints.txt").read_text().splitlines():
        name = line.split("=")[0]
        if name not in ours and not TORCHS_OWN.fullmatch(name):
            kept.append(line)
    constraints = Path(session.create_tmp(), "constraints.txt")
    constraints.write_text("\n".join([*kept, *pins]) + "\n")
    constrained = ("--constraint", str(constraints))
    # torch demands a setuptools of its own below some version; without this one the build would fetch another.
    session.install(*constrained, *pins, "setuptools>=77", "wheel", "ninja")
    wanted = {"USE_CPP": "1" if build else "0", "USE_CUDA": "0"}
    session.install(*constrained, "--no-build-isolation", "--editable", ".[test,emulated]", env=wanted)
    session.run("python", "-m", "rl_kernels", "doctor")


@nox.session
def oldest_torch(session: nox.Session) -> None:
    """The whole suite with the oldest torch that is supported, and the kernels built for it."""
    install(session, OLDEST_TORCH, OLDEST_TRITON, OLDEST_NUMPY)
    session.run(*TESTS, env=ONE_THREAD)


@nox.session
def newest_torch(session: nox.Session) -> None:
    """The whole suite with the newest torch that there is."""
    install(session, "torch")
    session.run(*TESTS, env=ONE_THREAD)


def run_triton_tests(session: nox.Session) -> None:
    """The Triton kernels interpreted, compiled for every architecture, and executed as PTX."""
    session.run("pytest", "-n", "2", "tests/interpreter", env={"TRITON_INTERPRET": "1", **ONE_THREAD})
    session.run("pytest", "-n", "2", "tests/offline", env=ONE_THREAD)
    # Of Triton's own kernels, which the interpreter of PTX is tried on, the newest are enough.
    session.run("pytest", "-n", "2", "tests/emulated/test_kernels.py", env=ONE_THREAD)
    ours = ("tests/emulated/test_hopper_kernels.py", "-k", "test_linear or test_conv")
    session.run("pytest", "-n", "2", *ours, env=ONE_THREAD)


@nox.session
def oldest_triton(session: nox.Session) -> None:
    """The Triton kernels with the oldest Triton."""
    install(session, "torch", OLDEST_TRITON, OLDEST_NUMPY, build=False)
    run_triton_tests(session)


@nox.session
def newest_triton(session: nox.Session) -> None:
    """The Triton kernels with the newest Triton, and the torch of constraints.txt where that admits it."""
    install(session, "torch", "triton", build=False)
    run_triton_tests(session)
