import pytest
import torch

from rl_kernels.backends import Case, registered


@pytest.fixture(autouse=True)
def _only_backends_of_this_machine(request: pytest.FixtureRequest) -> None:
    """Skips the cases of a backend that cannot serve here, with its reason."""
    callspec = getattr(request.node, "callspec", None)
    name = None if callspec is None else callspec.params.get("backend")
    for backend in registered():
        if backend.name == name:
            reason = backend.why_not(Case("mixed_linear", "cpu", torch.float32))
            if reason is not None:
                pytest.skip(f"{name}: {reason}")
