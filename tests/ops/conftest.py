import pytest
import torch

from rl_kernels.backends import Case, registered
from rl_kernels.backends.selection import why_not


@pytest.fixture(autouse=True)
def _only_backends_of_this_machine(request: pytest.FixtureRequest) -> None:
    """Skips the cases of a backend that cannot serve them here, with its reason."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or "backend" not in callspec.params:
        return
    op = "mixed_conv" if "conv" in request.node.name else "mixed_linear"
    dtype = next((value for value in callspec.params.values() if isinstance(value, torch.dtype)), torch.float32)
    for backend in registered():
        if backend.name == callspec.params["backend"]:
            reason = why_not(backend, Case(op, "cpu", dtype))
            if reason is not None:
                pytest.skip(f"{backend.name}: {reason}")
