"""The Triton kernels compiled for GPUs that are not here: what their machine code holds."""

from __future__ import annotations

import functools

import pytest

pytest.importorskip("triton", reason="Triton has no package for this platform")

from rl_kernels.backends.triton import offline
from rl_kernels.backends.triton.heuristics import FLOAT32_CONFIGS

SHARED_STORES = {"sm_80": 8, "sm_90": 16, "sm_100": 16}
"""In the main loop of 16-bit products at most: the mixed tile's trip through shared memory. A rise is a regression."""
PRODUCTS = ("product_kernel", "correlate_kernel", "resident_kernel", "wgrad_kernel")
MATRIX_INSTRUCTION = {"sm_80": ("HMMA",), "sm_90": ("HGMMA", "HMMA"), "sm_100": ("UTCHMMA", "HMMA")}


@functools.cache
def compiled(arch: str) -> tuple[offline.Kernel, ...]:
    return tuple(offline.kernels(arch))


@pytest.mark.parametrize("arch", offline.DEVICES)
def test_machine_code(arch: str) -> None:
    kernels = compiled(arch)
    float32 = {"x".join(map(str, config)) for config in FLOAT32_CONFIGS}
    assert {kernel.name for kernel in kernels} == {
        "product_kernel",
        "reduce_product_kernel",
        "wgrad_kernel",
        "reduce_wgrad_kernel",
        "finish_coefficients_kernel",
        "correlate_kernel",
        "depthwise_kernel",
        "depthwise_wgrad_kernel",
        "resident_kernel",
    }
    for kernel in kernels:
        assert kernel.spilled_bytes == 0, kernel
        assert kernel.shared_bytes <= offline.DEVICES[arch].shared_bytes, kernel
        if kernel.name in PRODUCTS and kernel.config not in float32:
            assert kernel.products in MATRIX_INSTRUCTION[arch], kernel
            assert kernel.shared_stores <= SHARED_STORES[arch], kernel
            # A channel's coefficients are read one by one where they run along the sum.
            if "dgrad" not in kernel.variant or "per channel" not in kernel.variant:
                assert kernel.load_bytes == 16, kernel


def test_nothing_is_launched() -> None:
    """Compiling leaves Triton as it was."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    before = JITFunction.run, driver._active
    with offline.compiling_only("sm_80"):
        assert JITFunction.run is not before[0]
    assert (JITFunction.run, driver._active) == before
