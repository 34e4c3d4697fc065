"""What the mark ``thinned`` leaves out of a product of parameters."""

import itertools

import pytest

from tests.conftest import left_out


@pytest.mark.parametrize("sizes", [(2, 13), (3, 3, 6), (2, 16), (1,), (5, 5)])
@pytest.mark.parametrize("one_in", [1, 2, 4])
def test_every_value_still_comes(sizes, one_in):
    cases = [set(enumerate(values)) for values in itertools.product(*map(range, sizes))]
    kept = [case for number, case in enumerate(cases) if number not in left_out(cases, one_in)]
    assert set().union(*kept) == set().union(*cases)
    assert len(cases) // one_in <= len(kept) <= max(len(cases) // one_in, sum(sizes))
    assert left_out(cases, one_in) == left_out(cases, one_in)
