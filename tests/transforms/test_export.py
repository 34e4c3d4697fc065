"""Models that leave Python: torch.export, AOTInductor, torch.jit."""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import rl_kernels as rl
from tests.transforms.common import KINDS, gradients, images, net, problem, tracing

OPS = ("rl_kernels.mixed_conv.default", "rl_kernels.mixed_linear.default")


def exported(model: nn.Module, strict: bool = False) -> ExportedProgram:
    return export(model, (images(),), strict=strict, dynamic_shapes=({0: Dim("batch", min=2)},))


def ours(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "rl_kernels" in str(node.target)]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_a_converted_model(strict: bool) -> None:
    """For every batch size, with the parameters' own names, and again from a file."""
    model, x = net(), images(5)
    program = exported(model, strict)
    assert ours(program) == list(OPS)
    assert ours(program.run_decompositions()) == list(OPS)
    assert sorted(program.state_dict) == sorted(model.state_dict())
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for made in (program, torch.export.load(file)):
        torch.testing.assert_close(made.module()(x), model(x))


def test_an_exported_model_trains() -> None:
    model, x = net(), images(5)
    module = exported(model).module()
    torch.testing.assert_close(gradients(module, module(x)), gradients(model, model(x)))


def test_a_merged_model_holds_torchs_ops_alone() -> None:
    model, x = net(), images(5)
    expected = model(x)
    program = exported(rl.merge(model))
    assert ours(program) == []
    torch.testing.assert_close(program.module()(x), expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles with g++")
def test_aot_inductor(tmp_path: Path) -> None:
    model, x = net().eval(), images(5)
    package = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(exported(model), package_path=package)
    with torch.no_grad():
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model(x))


@tracing
def test_jit_trace() -> None:
    model, x = net(), images(5)
    traced: Any = torch.jit.trace(model, (images(),))
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert kinds.count("rl_kernels::mixed_conv") == kinds.count("rl_kernels::mixed_linear") == 1
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    again: Any = torch.jit.load(file)
    for made in (traced, again):
        torch.testing.assert_close(made(x), model(x))
        torch.testing.assert_close(gradients(made, made(x)), gradients(model, model(x)))


@tracing
def test_a_traced_function_has_its_sources_as_inputs() -> None:
    """Other sources than those it was traced with."""
    for kind in KINDS:
        mixed, naive, arguments = problem(kind)
        traced: Any = torch.jit.trace(mixed, arguments, check_trace=False)
        others: tuple[Tensor, ...] = tuple(torch.randn_like(a) for a in arguments)
        torch.testing.assert_close(traced(*others), naive(*others))
