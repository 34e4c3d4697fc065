"""The Triton kernels compiled for GPUs that are not here: what their machine code holds."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton has no package for this platform")

from rl_kernels.backends.triton import assembler, offline
from rl_kernels.backends.triton.configs import CONV_CONFIGS, FLOAT32_CONFIGS, PRODUCT_CONFIGS
from rl_kernels.ops.schema import OPS

SHARED_STORES = {"sm_80": 8, "sm_90": 16, "sm_100": 16}
"""In the main loop of products at most: the mixed tile's trip through shared memory. A rise is a regression."""
RESIDENT_STORES = 16
"""The same where a filter stays on chip: in a loop over pixels, for all of its taps."""
SPILLED = 24
"""Bytes, at most, that wait beside a main loop, which itself moves none: an address or two, kept for the epilogue."""
PRODUCTS = ("product_kernel", "correlate_kernel", "resident_kernel", "wgrad_kernel")
MATRIX_INSTRUCTION = {"sm_80": ("HMMA",), "sm_90": ("HGMMA", "HMMA"), "sm_100": ("UTCHMMA", "HMMA")}


NAMES = {
    "linear": {"product_kernel", "reduce_product_kernel", "wgrad_kernel", "sum_tokens_kernel"},
    "conv": {
        *("correlate_kernel", "reduce_product_kernel", "resident_kernel", "wgrad_kernel"),
        *("depthwise_kernel", "depthwise_wgrad_kernel"),
    },
}


# Each takes ptxas minutes: Hopper's linear layers are looked at every time, all others by make test-slow.
CASES = [
    pytest.param(kind, arch, marks=[pytest.mark.slow] * ((kind, arch) != ("linear", "sm_90")))
    for kind in NAMES
    for arch in offline.DEVICES
]


@pytest.mark.parametrize(("kind", "arch"), CASES)
def test_machine_code(kind: str, arch: str) -> None:
    kernels = list(offline.kernels(arch, [op for op in OPS if kind in op]))
    float32 = {"x".join(map(str, config)) for config in FLOAT32_CONFIGS}
    found = {kernel.name for kernel in kernels}
    assert found == NAMES[kind] | {"reduce_wgrad_kernel", "finish_coefficients_kernel", "sum_shares_kernel"}
    products = PRODUCT_CONFIGS if kind == "linear" else CONV_CONFIGS
    refused = {"x".join(map(str, config)) for config in {*products} - {*assembler.without_racing(products)}}
    if arch == "sm_90":
        assert sum(kernel.register_a and kernel.products == "HGMMA" for kernel in kernels) > 10
    for kernel in kernels:
        # A configuration that is not chosen, as there is no ptxas that is free of the defect, may race.
        if "wgrad" in kernel.variant or kernel.config not in refused:
            assert kernel.hazards == (), kernel
        assert kernel.spilled_bytes <= SPILLED, kernel
        assert kernel.spills_in_loop == 0, kernel
        assert kernel.shared_bytes <= offline.DEVICES[arch].shared_bytes, kernel
        if kernel.name in PRODUCTS and kernel.config not in float32:
            assert kernel.products in MATRIX_INSTRUCTION[arch], kernel
            most = RESIDENT_STORES if kernel.name == "resident_kernel" else SHARED_STORES[arch]
            assert kernel.shared_stores <= most, kernel
            # A channel's coefficients are read one by one where they run along the sum; and 32-bit operands that lie
            # across the sum are turned while they are copied, as the matrix instructions turn 16-bit ones only.
            scattered = "dgrad" in kernel.variant and "per channel" in kernel.variant
            scattered = scattered or ("wgrad" in kernel.variant and "TF32" in kernel.variant)
            # A vector of Outer coefficients has no more elements than a program has threads.
            scattered = scattered or ("rank" in kernel.variant and "wgrad" not in kernel.variant)
            assert kernel.load_bytes >= (4 if scattered else 16), kernel


def test_nothing_is_launched() -> None:
    """Compiling leaves Triton as it was."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    before = JITFunction.run, driver._active
    with offline.compiling_only("sm_80"):
        assert JITFunction.run is not before[0]
    assert (JITFunction.run, driver._active) == before
