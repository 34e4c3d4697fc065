"""Checks against other versions of what the package builds on, each in an environment of its own: ``nox``."""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
# Of the oldest Triton that is supported the interpreter breaks on newer numpys.
OLDEST_TRITON = {"triton": "triton==3.6.0", "numpy": "numpy<2.4"}


@nox.session
def oldest_triton(session: nox.Session) -> None:
    """The Triton kernels interpreted, compiled for every architecture, and executed as PTX, by the oldest Triton."""
    pins = Path("constraints.txt").read_text().splitlines()
    constraints = Path(session.create_tmp(), "constraints.txt")
    constraints.write_text("\n".join(pin for pin in pins if pin.split("=")[0] not in OLDEST_TRITON))
    session.install("--constraint", str(constraints), *OLDEST_TRITON.values(), "torch", "setuptools", "wheel")
    session.install(
        "--constraint",
        str(constraints),
        *OLDEST_TRITON.values(),
        "--no-build-isolation",
        "--editable",
        ".[test,emulated]",
    )
    session.run("pytest", "-n", "auto", "tests/interpreter", env={"TRITON_INTERPRET": "1"})
    session.run("pytest", "-n", "auto", "tests/offline")
    # Of Triton's own kernels, which the interpreter of PTX is tried on, the newest are enough.
    session.run("pytest", "-n", "auto", "tests/emulated/test_kernels.py")
    session.run("pytest", "-n", "auto", "tests/emulated/test_hopper_kernels.py", "-k", "test_linear or test_conv")
