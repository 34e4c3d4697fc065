import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence

import pytest
import torch

from building.cuda import find_nvcc
from building.steps import CannotBuild

os.environ["RL_KERNELS_CACHE"] = os.devnull  # What was qualified on this machine decides no test.

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import rounding

    rounding.install()

try:
    find_nvcc()
except CannotBuild:
    collect_ignore = ["emulated"]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from one seed."""
    torch.manual_seed(0)
    yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what ``thinned`` leaves out."""
    tests: dict[tuple[str, str], list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("thinned") is not None:
            tests[str(item.path), item.originalname].append(item)
    for cases in tests.values():
        marker = cases[0].get_closest_marker("thinned")
        assert marker is not None
        for number in left_out([values_of(case) for case in cases], marker.args[0]):
            cases[number].add_marker("slow")


def values_of(case: pytest.Function) -> set[tuple[int, ...]]:
    """What a case is given by each of its ``parametrize``, as the identities of the values."""
    found = set()
    for number, marker in enumerate(case.iter_markers("parametrize")):
        names = marker.args[0].split(",") if isinstance(marker.args[0], str) else marker.args[0]
        found.add((number, *(id(case.callspec.params[name.strip()]) for name in names)))
    return found


def left_out(cases: Sequence[set[tuple[int, ...]]], one_in: int) -> list[int]:
    """The numbers of cases without which each value still comes; one in so many are kept, or as many as that takes."""
    size = len(cases)
    # In steps of the golden section, so that what is kept lies in no row of the product.
    step = next(step for step in range(round(0.618 * size), 2 * size) if math.gcd(step, size) == 1)
    order = [step * index % size for index in range(size)]
    kept: set[int] = set()
    seen: set[tuple[int, ...]] = set()
    for number in order:
        if not cases[number] <= seen:
            kept.add(number)
            seen |= cases[number]
    for number in order:
        if len(kept) < size // one_in:
            kept.add(number)
    return [number for number in range(size) if number not in kept]
