"""Kernels that an older ptxas lets race: seen, refused, and assembled by a newer one where Triton has one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no package for this platform")

from triton import knobs

from rl_kernels.backends import Case, registered
from rl_kernels.backends.gpu import disassembler, hazards
from rl_kernels.backends.gpu.heuristics import Config, use_config
from rl_kernels.backends.triton import assembler, configs, linear, offline
from rl_kernels.commands import inspect
from rl_kernels.ops.values import Recipe
from rl_kernels.qualify import correctness, problems

RACES, SERIALISED = Config(128, 128, 32, 8, 4), Config(64, 64, 32, 4, 4)
"""Of linear forward, by every ptxas before 13.3 and by every Triton that is supported."""
SIZE = 4096


def older_ptxas() -> str:
    path: str = vars(type(knobs.nvidia))["ptxas"].default_path
    if assembler.version_of(path) >= assembler.FIXED:
        pytest.skip("Triton's package has no ptxas that lets kernels race")
    return path


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[None]:
    """Nothing is compiled yet."""
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        linear.product_kernel.device_caches.clear()
        yield
        linear.product_kernel.device_caches.clear()


@pytest.fixture
def older(fresh: None) -> Iterator[None]:
    """Triton assembles with the older ptxas of its package, as if the user had said so."""
    path = older_ptxas()
    assembler.sound_configs.cache_clear()
    with knobs.nvidia.scope():
        knobs.nvidia.ptxas = knobs.nvidia.ptxas_blackwell = path
        yield
    assembler.sound_configs.cache_clear()


def multiply(config: Config = RACES, refusing: bool = False) -> Any:
    """Compile linear forward for Hopper."""
    x, weight = torch.empty(SIZE, SIZE, dtype=torch.bfloat16), torch.empty(SIZE, SIZE, dtype=torch.bfloat16)
    with use_config(config), offline.compiling_only("sm_90") as found:
        assembler._refuses = refusing
        linear.mixed_linear(x, Recipe([weight] * 2, torch.empty(2), [torch.empty(SIZE, dtype=torch.bfloat16)] * 2))
    return found[0][1]


def findings(compiled: Any) -> hazards.Findings:
    (found,) = hazards.check(disassembler.disassemble(compiled.asm["cubin"]))
    return found


@pytest.mark.usefixtures("older")
def test_an_older_ptxas_is_seen_to_let_a_kernel_race() -> None:
    compiled = multiply()
    assert findings(compiled).hazards
    assert "product_kernel: a hazard in its machine code" in str(assembler.why_unsafe(compiled))
    assert not assembler.is_sound()


@pytest.mark.usefixtures("older")
def test_a_kernel_that_races_is_refused_every_time() -> None:
    for _ in range(2):
        with pytest.raises(assembler.RacingKernel, match=r"product_kernel: a hazard.*ptxas 12\.\d+"):
            multiply(refusing=True)
    assert findings(multiply(SERIALISED, refusing=True)).hazards == ()


@pytest.mark.usefixtures("fresh")
def test_a_newer_ptxas_is_taken_and_what_the_older_one_made_is_not() -> None:
    path = older_ptxas()
    with knobs.nvidia.scope():
        knobs.nvidia.ptxas = knobs.nvidia.ptxas_blackwell = path
        assert findings(multiply()).hazards
    linear.product_kernel.device_caches.clear()
    if not assembler.is_sound():
        pytest.skip("Triton's package has no ptxas that is free of it")
    hook = knobs.runtime.add_stages_inspection_hook
    assert findings(multiply(refusing=True)).hazards == ()
    assert knobs.runtime.add_stages_inspection_hook is hook
    assert knobs.nvidia.ptxas.path == path  # Triton's own choice for other kernels is as it was.


@pytest.mark.usefixtures("older")
def test_the_ptxas_that_a_user_names_stays() -> None:
    assert assembler.newer_assembler() is None


@pytest.mark.usefixtures("older")
def test_tiles_that_race_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    hopper = torch.device("cuda", 0)
    for usual in configs.PRODUCT_CONFIGS, configs.CONV_CONFIGS:
        left = assembler.sound_configs(usual, hopper)
        assert RACES not in left and SERIALISED in left and set(left) < set(usual)
        assert assembler.sound_configs(usual, torch.device("cpu")) == usual
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assembler.sound_configs.cache_clear()
    assert assembler.sound_configs(usual, hopper) == usual


@pytest.mark.usefixtures("fresh")
def test_a_driver_of_cuda_12_gets_no_code_of_cuda_13(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembler, "_driver_loads_cuda_13", lambda: False)
    assert assembler.newer_assembler() is None


@pytest.mark.usefixtures("older")
def test_a_serialised_kernel_is_what_ptxas_warns_of(tmp_path: Path) -> None:
    compiled = multiply(SERIALISED)
    source, made = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    source.write_text(re.sub(r"\.version \d+\.\d+", ".version 8.7", compiled.asm["ptx"]))
    arguments = ("-v", "--regAllocOptLevel=2", "--gpu-name=sm_90a", source, "-o", made)
    said = disassembler.run_tool(Path(older_ptxas()), *arguments, errors_too=True)
    assert re.search(r"C75\d\d.*wgmma.mma_async instructions are serialized", said)
    (found,) = hazards.check(disassembler.disassemble(made.read_bytes()))
    assert found.serialised and found.verdict == "serialised"
    assert not findings(multiply(RACES)).serialised


def test_inspect_shows_them() -> None:
    of_none = offline.Kernel("product_kernel", "op", "first", "sm_90", 1, 0, 0, "HGMMA", True, 0, 16, (), False, {})
    racing = replace(of_none, config="second", hazards=("one", "another"))
    serialised = replace(of_none, config="third", serialised=True)
    kernels = [of_none, racing, serialised, replace(of_none, products="HMMA"), replace(of_none, register_a=False)]
    lines = inspect.table(kernels).splitlines()
    where = next(line for line in lines if "hazards" in line).index("hazards")
    shown = {row: next(line for line in lines if row in line)[where:].split()[0] for row in ("second", "third")}
    assert shown == {"second": "2", "third": "serialised"}
    line = "ptxas 13.3: 4 kernels with HGMMA, 3 of them with A in registers; 1 have hazards, 1 are serialised"
    assert inspect.summary(kernels, "ptxas 13.3") == [line]
    assert inspect.summary(kernels[3:4], "") == []


# Qualification.


def qualified(config: Config) -> list[str]:
    """What is wrong with linear forward, by the checks of ``qualify``, run on a CPU but compiled for Hopper."""
    backend = next(each for each in registered() if each.name == "triton")
    run = backend.kernel

    class Offline(type(backend)):  # type: ignore[misc]
        def kernel(self, op: str) -> Any:
            def compile_and_refer(*operands: Any) -> Any:
                run(op)(*operands)
                return next(each for each in registered() if each.name == "reference").kernel(op)(*operands)

            return compile_and_refer

        def watched(self) -> AbstractContextManager[list[str]]:
            return watched()

    def watched() -> AbstractContextManager[list[str]]:
        return assembler.watching()

    problem = problems.Problem(256, 256, 256)
    trial = correctness.Trial(problem, "planted configuration", nullcontext)
    case = Case("mixed_linear", "cpu", torch.bfloat16)
    with offline.compiling_only("sm_90"), use_config(config):
        return list(correctness.failures(Offline(), [trial], case, torch.device("cpu")))


@pytest.mark.usefixtures("older")
def test_a_configuration_that_races_does_not_qualify(monkeypatch: pytest.MonkeyPatch) -> None:
    (failure,) = qualified(RACES)
    assert failure.startswith("planted configuration, ") and "a hazard in its machine code: " in failure
    assert qualified(SERIALISED) == []


@pytest.mark.usefixtures("fresh")
def test_nothing_qualifies_that_nobody_can_disassemble(monkeypatch: pytest.MonkeyPatch) -> None:
    assert qualified(SERIALISED) == []
    disassembler.disassemble.cache_clear()
    monkeypatch.setattr(disassembler, "_folders", lambda: iter(()))
    (failure,) = qualified(SERIALISED)
    assert "cannot be checked for hazards: no nvdisasm or cuobjdump" in failure
