"""How many instructions the main loops execute: an upper limit for each, so that none grows unnoticed.

Counted are the PTX instructions that a warp executes for a step of 32 of the sum, in 16 bits and the largest
configuration, all operands copied 16 bytes at a time. ptxas makes less of some of them, nothing of others (`mov`), and
more than one of 64-bit additions.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from building.cuda import ELEMENTS, SOURCES
from rl_kernels.backends.cuda import configs
from rl_kernels.backends.gpu.heuristics import Config, use_config
from rl_kernels.qualify.problems import Problem
from tests.emulated import backend
from tests.emulated.compilers import compiled_files
from tests.emulated.machine.machine import Warp
from tests.emulated.problems import BF16, call_of, execute
from tests.emulated.resources import resources, table

of_file = backend.ptx_of
PRODUCT, WGRAD = configs.PRODUCTS[0], configs.WGRADS[0]
SHORT, LONG = 128, 192
"""Of the sum: what is executed for one and not for the other is two steps."""


def linear(depth: int) -> Problem:
    return Problem(256, 128, depth, biased=False)


def linear_dgrad(depth: int) -> Problem:
    return Problem(256, depth, 128, biased=False)


def linear_wgrad(depth: int) -> Problem:
    return Problem(depth, 128, 128, biased=False)


def conv(depth: int) -> Problem:
    """256 channels, of two taps or four, so that going to the next tap counts; one tap is a linear layer's."""
    kernel = (1, 2) if depth == SHORT else (1, 4)
    return Problem(1, 128, 256, kernel, (16, 15 + kernel[1]), biased=False, layout="channels_last")


def conv_dgrad(depth: int) -> Problem:
    kernel = (1, 2) if depth == SHORT else (1, 4)
    return Problem(1, 256, 128, kernel, (16, 16), biased=False, layout="channels_last")


def conv_wgrad(depth: int) -> Problem:
    return Problem(depth // 64, 128, 128, (1, 1), (8, 8), biased=False, layout="channels_last")


LIMITS = {
    "linear_forward_pair": (linear, "mixed_linear", PRODUCT, 2, 284),  # once 666, 82 of them mov
    "linear_dgrad_pair": (linear_dgrad, "mixed_linear_dgrad", PRODUCT, 2, 289),  # 642, 81
    "linear_wgrad": (linear_wgrad, "mixed_linear_wgrad", WGRAD, 2, 86),  # 270, 11
    "conv_forward_pair": (conv, "mixed_conv", PRODUCT, 16, 313),  # about 950
    "conv_dgrad_pair": (conv_dgrad, "mixed_conv_dgrad", PRODUCT, 16, 315),  # about 915
    "conv_wgrad": (conv_wgrad, "mixed_conv_wgrad", WGRAD, 2, 245),  # 397, 25
}
"""Of each kernel: problems, the op, the configuration, how many steps there are between the problems, the limit.

What they once were is with addresses computed anew for each copy. 64 `mov` of the first two and the convolutions' were
casts from an integer to a float register, which ptxas drops: they are no longer in the PTX, and that is no gain.
"""


def ptx_of(name: str, arch: str = "80", edit: backend.Edit | None = None) -> str:
    """The PTX of one kernel alone: the others of its file take minutes to compile."""
    if name.startswith("finish_"):
        return of_file(name, arch, edit)
    kind, size = name.removesuffix("_bf16").rsplit("_", 1)
    layer = "Pixels" if "conv" in kind else "Rows"
    kernel = (
        f"WgradKernel<ElementType, WgradTile{size}, {layer}>"
        if "wgrad" in kind
        else f"ProductKernel<ElementType, Tile{size}, {layer}, {str('dgrad' in kind).lower()}, Pair>"
    )
    files = {path.name: path.read_text() for path in sorted(SOURCES.iterdir()) if path.is_file()}
    files["one.cu"] = f"""
        #include "kernels_sm80.cuh"
        using namespace rl_kernels::cuda;
        ELEMENT_KERNEL({kind}_{size}, {kernel});
    """
    flags = "-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-DRL_ELEMENT={ELEMENTS['bf16']}"
    return compiled_files(files, "one.cu", "80", *flags)


def executed(kernel: str, op: str, problem: Problem, config: Config, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often all warps of a launch execute an instruction, by its first name."""
    counted: Counter[str] = Counter()
    step = Warp.step

    def counting(warp: Warp, code: list[Any]) -> None:
        counted[code[warp.pc].source.opcode.split(".")[0]] += 1
        step(warp, code)

    call = call_of(op, problem, BF16)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "ptx_of", ptx_of)
        patch.setattr(Warp, "step", counting)
        with use_config(config._replace(stages=3), 1), backend.emulated(0, True) as launched:
            execute(call)
    # What finishes the coefficients' gradients does the same for a short sum as for a long one.
    name = f"{kernel}_{config.rows}x{config.columns}_bf16"
    assert [each for each in launched if not each.startswith("finish_")] == [name], launched
    return counted


@pytest.mark.parametrize("kernel", LIMITS)
def test_instructions_of_a_step(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, op, config, steps, limit = LIMITS[kernel]
    short, long = (executed(kernel, op, problem(depth), config, monkeypatch) for depth in (SHORT, LONG))
    each = {name: (count - short[name]) / steps / config.warps for name, count in long.items() if count != short[name]}
    total = sum(each.values())
    listed = ", ".join(f"{name} {count:.1f}" for name, count in sorted(each.items(), key=lambda one: -one[1]))
    print(f"{kernel}: {total:.1f}: {listed}")
    assert total <= limit, listed


@pytest.mark.parametrize("kernel", LIMITS)
def test_registers(kernel: str) -> None:
    """As many blocks on a multiprocessor as the table says, and nothing spilled; ptxas's versions differ by a few."""
    config = LIMITS[kernel][2]
    name = f"{kernel}_{config.rows}x{config.columns}_bf16"
    expected = table()[name]
    found = resources(ptx_of(name))[name]
    assert found.spilled == expected.spilled == 0
    assert found.blocks == expected.blocks == config.resident
    assert found.registers <= expected.registers + 8
