import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import CASES, DTYPES, GPU_CASES, GROUPS, Case, ConvCase, LinearCase, ModulatedCase, select
from benchmarks.contenders import BOTH, FORWARD
from benchmarks.models import MODELS, OPTIMIZERS
from benchmarks.problems import build
from benchmarks.roofline import bound_seconds

SHAPES = {
    *((1, 768, 768), (1, 4096, 4096), (8, 3072, 768), (64, 768, 3072), (64, 4096, 4096), (512, 4096, 4096)),
    *((1576, 2304, 768), (2048, 1024, 1024), (8, 8, 8)),
}


@pytest.mark.parametrize("cases", [CASES, GPU_CASES], ids=["cpu", "gpu"])
def test_names_are_unique_and_groups_are_complete(cases: tuple[Case, ...]) -> None:
    keys = [case.key for case in cases]
    assert len(keys) == len(set(keys))
    assert {case.group for case in cases} == set(GROUPS)
    assert {case.group for case in cases if case.quick} == set(GROUPS)


def test_the_linear_layers() -> None:
    assert {(case.m, case.n, case.k) for case in CASES if isinstance(case, LinearCase)} == SHAPES


def test_every_convolution_comes_in_both_layouts() -> None:
    shapes: dict[str, dict[str, ConvCase]] = {"NCHW": {}, "channels_last": {}}
    for case in CASES:
        if isinstance(case, ConvCase):
            shapes[case.layout][case.name.replace(case.layout, "")] = case
    assert shapes["NCHW"].keys() == shapes["channels_last"].keys()
    assert any(case.groups == case.in_channels for case in shapes["NCHW"].values())
    assert any(case.stride == 2 for case in shapes["NCHW"].values())


def test_a_case_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CASES[0].name = "other"  # type: ignore[misc]


def test_selection_by_group_dtype_and_quick() -> None:
    chosen = select(["linear"], ["float32", "bfloat16"])
    assert {case.group for case in chosen} == {"linear"}
    assert {case.dtype for case in chosen} == {"float32", "bfloat16"}
    assert len(chosen) == 2 * len(SHAPES)
    large = select(["linear"], ["bfloat16"], device="cuda")
    assert [case.name for case in large] == [case.name for case in GPU_CASES if case.group == "linear"]
    quick = select(GROUPS, ["float32"], quick=True)
    assert quick and all(case.quick for case in quick)


def test_the_models_and_dtypes_that_cases_name_exist() -> None:
    for case in select(["model"], ["float32"]):
        assert case.as_record()["model"] in MODELS and case.as_record()["optimizer"] in OPTIMIZERS
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES)


# Of a modulated layer they are the layer's.
SMALL = [c for c in CASES if c.elements and sum(c.elements) < 2e6 and not isinstance(c, ModulatedCase)]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_formulas_agree_with_the_tensors(case: LinearCase) -> None:
    """Elements are those of the tensors, and operations those that torch counts."""
    problem = build(case, "cpu")
    weights = sum(tensor.numel() for tensor in problem.sources[0])
    assert case.elements == (problem.x.numel(), weights, problem.gradient.numel())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        output = problem.plain(problem.x, problem.sources[0])
    assert output.shape == problem.gradient.shape and output.stride() == problem.gradient.stride()
    assert counter.get_total_flops() == case.flops


def test_the_bound_is_the_slower_of_products_and_bytes() -> None:
    case = LinearCase(name="l", group="linear", m=4, n=8, k=16)
    assert case.elements == (64, 136, 32)
    bytes_bound = {"flops_per_second": {"float32": 1e30}, "read_bytes_per_second": 4.0}
    assert bound_seconds(case, FORWARD, 2, bytes_bound) == 64 + 2 * 136 + 32
    # Back: dy, x and the sources read, dx and the sources' gradients written.
    assert bound_seconds(case, BOTH, 2, bytes_bound) == (64 + 2 * 136 + 32) + (32 + 64 + 2 * 136 + 64 + 2 * 136)
    flops_bound = {"flops_per_second": {"float32": 2.0}, "read_bytes_per_second": 1e30}
    assert bound_seconds(case, BOTH, 1, flops_bound) == 3 * 4 * 8 * 16
