"""Every backend that this machine has, on the one test body, over random cases."""

import os

import pytest
from hypothesis import HealthCheck, assume, given, settings

from rl_kernels.backends import registered, streamed
from tests.ops.body import Case, cases, check

BACKENDS = [backend.name for backend in registered()]
KINDS = {"linear": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3}
# Triton's interpreter runs a kernel's programs one after the other, in Python.
SLOWLY_RUN = {"triton": 25} if os.environ.get("TRITON_INTERPRET") == "1" else {}

quiet = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend(backend: str, kind: str) -> None:
    @settings(quiet, max_examples=SLOWLY_RUN.get(backend, 150))
    @given(case=cases(KINDS[kind]))
    def body(case: Case) -> None:
        check(case, backend)

    body()


def small_panels(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of a few elements, so that small cases have many of them in every direction."""
    monkeypatch.setattr(streamed, "WORKSPACE_BYTES", {"cpu": 16 * elements})
    monkeypatch.setattr(streamed, "_LINEAR_PANEL", {"cpu": elements})
    monkeypatch.setattr(streamed, "_MIN_RUN", dict.fromkeys(streamed._MIN_RUN, 4 if elements == 8 else 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elements", [8, 96])
def test_streamed_in_small_panels(elements: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_panels(elements, monkeypatch)

    @settings(quiet, max_examples=100)
    @given(case=cases(KINDS[kind]))
    def body(case: Case) -> None:
        # A half-precision sum in many pieces rounds at each: only weights of many millions of rows come to that.
        assume(elements == 96 or (case.dtype.itemsize > 2 and not case.half_activation))
        check(case, "streamed")

    body()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_sweep(backend: str, kind: str) -> None:
    @settings(quiet, max_examples=3000, derandomize=False)
    @given(case=cases(KINDS[kind]))
    def body(case: Case) -> None:
        check(case, backend)

    body()
