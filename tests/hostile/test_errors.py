"""What torch's convolutions refuse is refused with a message that says more than torch's."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

from rl_kernels.backends import selection
from tests.hostile import BACKENDS, MIXED, PLAIN, SPATIAL, using

# What torch's own message speaks of, as the argument that ours must name.
CULPRITS = {
    "should be the same": "dtype",
    "non-positive stride is not supported": "stride",
    "negative padding is not supported": "padding",
    "dilation should be greater than zero": "dilation",
    "non-positive groups is not supported": "groups",
    "expected weight to be at least 3 at dimension 0": "groups",
    "weight should have at least three dimensions": "weights[0]",
    "3-dimensional input for 3-dimensional weight": "weights[0]",
    "4-dimensional input for 4-dimensional weight": "weights[0]",
    "padding='same' is not supported for strided convolutions": "padding",
}
MESSAGE = re.compile(r"(?P<name>[\w\[\]]+): got (?P<got>.+), expected .+")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [kind for kind in SPATIAL if kind != "linear"])
def test_torchs_error_inputs(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*args: Any) -> None:
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr(selection, "run", computed)
    (info,) = (info for info in op_db if info.name == f"nn.functional.{kind}")
    seen = set()
    for error in info.error_inputs("cpu"):
        sample = error.sample_input
        (torchs,) = (words for words in CULPRITS if words in error.error_regex.replace("\\", ""))
        with pytest.raises(error.error_type, match=error.error_regex):
            PLAIN[SPATIAL[kind]](sample.input, *sample.args, **sample.kwargs)
        weight, *rest = sample.args
        options = dict(sample.kwargs)
        bias = rest.pop(0) if rest else options.pop("bias", None)
        assert not rest
        with using(backend), pytest.raises(error.error_type) as raised:
            MIXED[SPATIAL[kind]](sample.input, [weight], [1.0], None if bias is None else [bias], **options)
        said = MESSAGE.fullmatch(str(raised.value))
        assert said is not None, raised.value
        name, got = said["name"], said["got"]
        if CULPRITS[torchs] == "dtype":
            wrong = weight if not weight.is_floating_point() else bias
            assert name in ("weights[0]", "biases[0]") and got == f"dtype {wrong.dtype}"
        elif CULPRITS[torchs] == "weights[0]":
            assert name == "weights[0]" and got == f"shape {tuple(weight.shape)}"
        else:
            assert name == CULPRITS[torchs]
            value = options[name]
            value = value[0] if isinstance(value, tuple) else value
            assert str(value) in got
        seen.add(torchs)
    assert len(seen) >= 6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SPATIAL)
def test_a_fault_in_any_source_is_named(kind: str, backend: str) -> None:
    spatial = SPATIAL[kind]
    x, weight = torch.randn(2, 4, *(5,) * spatial), torch.randn(3, 4, *(2,) * spatial)
    faults = {
        "dtype torch.float64": weight.double(),
        f"shape {tuple(weight[:2].shape)}": weight[:2],
        f"shape {(*weight.shape, 1)}": weight[..., None],
        "device meta": weight.to("meta"),
    }
    for place in (0, 1, 2):
        for got, faulty in faults.items():
            weights = [weight, weight, weight]
            weights[place] = faulty
            # Where the first differs from the others, it is the second that is named.
            message = rf"weights\[{place}\]: got {re.escape(got)}, expected " if place else r"weights\[1\]: got .+, exp"
            with using(backend), pytest.raises(RuntimeError, match=message):
                MIXED[spatial](x, weights, (1.0, 2.0, 3.0))
