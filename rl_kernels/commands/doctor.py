"""``python -m rl_kernels doctor``: is this installation sound, and what serves what."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass

import click
import torch
from rich.console import Console
from torch import nn

from rl_kernels._extension import EXTENSION, HOW_TO_BUILD, describe_missing, is_older_than_its_sources
from rl_kernels._machine import machine, versions
from rl_kernels._supported import OF_TORCH
from rl_kernels._tables import simple_table
from rl_kernels.backends import Case, cpu, registered, services
from rl_kernels.backends.cuda import extension as cuda_extension
from rl_kernels.backends.selection import requested, use_backend, why_not
from rl_kernels.conversion import check
from rl_kernels.nn import ReplacementConv2d, ReplacementLinear

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Step:
    """One training step on one backend and device.

    Attributes:
        backend: its name.
        device: its type.
        verdict: ``"passed"``, ``"failed"`` or ``"skipped"``.
        detail: the loss and the time, or what went wrong.
    """

    backend: str
    device: str
    verdict: str
    detail: str


def training_step(backend: str, device: str) -> Step:
    """Train a small network with a replaced convolution and a replaced linear layer for one step."""
    for op in ("mixed_linear", "mixed_conv"):
        case = Case(op, device, torch.float32)
        reason = next(why_not(found, case) for found in registered() if found.name == backend)
        if reason is not None:
            return Step(backend, device, "skipped", reason)
    try:
        return _train(backend, device)
    except Exception as error:  # Whatever breaks is what the doctor is asked to find.
        return Step(backend, device, "failed", f"{type(error).__name__}: {error}")


def _train(backend: str, device: str) -> Step:
    generator = torch.Generator().manual_seed(0)
    convolutions = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)]
    linears = [nn.Linear(128, 128) for _ in range(2)]
    model = nn.Sequential(
        convolutions[0],
        ReplacementConv2d.from_neighbours(*convolutions),
        nn.ReLU(),
        convolutions[1],
        nn.Flatten(),
        linears[0],
        ReplacementLinear.from_neighbours(*linears),
        nn.ReLU(),
        linears[1],
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    check(model, optimizer)
    x, target = (torch.randn(shape, generator=generator).to(device) for shape in ((16, 8, 4, 4), (16, 128)))
    losses = []
    start = time.perf_counter()
    with use_backend(backend):
        for _ in range(2):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
            if missing:
                return Step(backend, device, "failed", f"no finite gradient for {', '.join(missing)}")
            optimizer.step()
            losses.append(loss.item())
    elapsed = time.perf_counter() - start
    if not (math.isfinite(losses[1]) and losses[1] < losses[0]):
        return Step(backend, device, "failed", f"the loss went from {losses[0]:.4f} to {losses[1]:.4f}")
    return Step(backend, device, "passed", f"loss {losses[0]:.4f} to {losses[1]:.4f} in {1e3 * elapsed:.0f} ms")


def describe_extension() -> str:
    """The C++ extension in a line: what was built, or what is lost without it and how to build it."""
    if EXTENSION.missing is None:
        info = cpu.build_info()
        options = f", options: {info['options']}" if info["options"] else ""
        paths = ", ".join(info["capabilities"])
        stale = f"; older than its sources: {HOW_TO_BUILD}" if is_older_than_its_sources() else ""
        return f"built, runs on {info['capability']} (of {paths}; compiler {info['compiler']}{options}){stale}"
    return describe_missing(EXTENSION)


def describe_cuda_extension() -> str:
    """The same of the CUDA extension."""
    found = cuda_extension.EXTENSION
    if found.missing is not None:
        return f"broken: {found.missing}" if found.broken else found.missing
    info = cuda_extension.build_info()
    stale = f"; older than its sources: {HOW_TO_BUILD}" if cuda_extension.is_older_than_its_sources() else ""
    return f"built for compute capability {info['architectures']} (nvcc {info['nvcc']}){stale}"


def diagnose(console: Console) -> bool:
    """Print the whole report; return whether every step passed and no broken extension lies about."""
    about = simple_table("Installation", "what", "found")
    for name, version in versions("triton", "numpy", "torchvision", "timm", "transformers").items():
        about.add_row(name, version)
    for name, value in machine().items():
        about.add_row(name, ", ".join(value) or "none" if isinstance(value, list) else str(value))
    about.add_row("C++ kernels", describe_extension(), style="bold red" if EXTENSION.broken else None)
    if OF_TORCH is not None:
        about.add_row("torch", OF_TORCH, style="bold red")
    cuda_broken = cuda_extension.EXTENSION.broken
    about.add_row("CUDA kernels", describe_cuda_extension(), style="bold red" if cuda_broken else None)
    about.add_row("backend asked for", requested())
    console.print(about)

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for dtype in DTYPES:
            served = simple_table(f"What serves what: {device}, {dtype}", "op", "backend", "why")
            for service in services(device, dtype):
                style = "bold" if service.serves else "dim"
                served.add_row(service.case.op, service.backend, service.reason, style=style)
            console.print(served)

    steps = [training_step(backend.name, device) for device in devices for backend in registered()]
    trained = simple_table("One training step a backend", "backend", "device", "result", "detail")
    for step in steps:
        style = {"passed": "green", "failed": "bold red", "skipped": "dim"}[step.verdict]
        trained.add_row(step.backend, step.device, step.verdict, step.detail, style=style)
    console.print(trained)
    passed = all(step.verdict != "failed" for step in steps) and any(step.verdict == "passed" for step in steps)
    return passed and not EXTENSION.broken and not cuda_broken


@click.command("doctor")
def doctor_command() -> None:
    """Check this installation: versions, devices, what serves what, and one training step on every backend.

    The exit status is 1 if a step fails, or if the C++ or the CUDA extension is there and cannot be used.
    """
    try:
        sound = diagnose(Console())
    except (RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if not sound:
        click.echo("Something is broken: see what failed above.", err=True)
        sys.exit(1)
