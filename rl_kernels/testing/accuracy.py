"""The error rule: against a float64 truth, at most twice plain torch's error on the same input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LIMIT = 2.0
"""How many times plain torch's error is allowed."""

_ROUNDING = {torch.float64: 8.0, torch.float32: 1.0, torch.bfloat16: 0.3, torch.float16: 0.3}
"""RMS error of a product, in eps: one rounding makes 0.29. Half precision rounds once; the others at every step of the
mix, of the product and of its sum; and float64 is held against a truth that is rounded as it is."""

_TF32 = 0.8 * 2**-10
"""The same for float32 whose products are TF32's, of 10 bits: tensor cores may cut them off instead of rounding."""


@dataclass(frozen=True)
class Comparison:
    """One tensor's error.

    Attributes:
        name: of the tensor.
        error: RMS of the difference from the truth, over the RMS of the truth.
        plain: plain torch's, the same way; or what rounding alone would make it, where that is more.
        numel: of the tensor.
        finite: whether it has NaN and infinity where the truth has them, and nowhere else.
    """

    name: str
    error: float
    plain: float
    numel: int
    finite: bool = True

    @property
    def ratio(self) -> float:
        """This error over plain torch's."""
        return self.error / self.plain if self.plain > 0 else (0.0 if self.error == 0 else math.inf)

    @property
    def allowed(self) -> float:
        """The largest ratio that passes: ``LIMIT``, widened by how uncertain an RMS over few elements is."""
        return LIMIT * (1 + 3 / math.sqrt(max(self.numel, 1)))

    @property
    def passes(self) -> bool:
        """Whether the error is within what is allowed."""
        return self.finite and self.ratio <= self.allowed

    def __str__(self) -> str:
        verdict = "" if self.passes else "   <- FAILS" + ("" if self.finite else " (NaN or infinity)")
        return (
            f"{self.name}: RMS ratio {self.ratio:.2f} (error {self.error:.2e}, plain torch {self.plain:.2e}){verdict}"
        )


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0


def compare(
    found: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    spread: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    *,
    tf32: bool = False,
) -> list[Comparison]:
    """Hold tensors against the truth, beside plain torch's.

    Args:
        found: what is judged, by name.
        plain: what plain torch makes of the same input in the same dtype.
        truth: float64.
        spread: by name, the root of the sum of the squared products that an element sums (float64): rounding them
            independently makes an error of the order of eps times that, which is expected of plain torch even where
            it is lucky. By default the truth itself.
        dtype: the coarsest that the products pass through, whose eps that is; by default each tensor's own.
        tf32: whether products of float32 may be TF32's. Plain torch's are not wherever the vendor declines it, as for
            few rows, and are no measure then.

    Raises:
        AssertionError: a name, shape or dtype differs.
    """
    assert found.keys() == plain.keys() == truth.keys(), (
        f"tensors: got {sorted(found)}, expected {sorted(truth)} as the truth (plain torch: {sorted(plain)})"
    )
    rows = []
    for name, value in found.items():
        expected = truth[name]
        assert value.shape == expected.shape, (
            f"{name}: got shape {tuple(value.shape)}, expected {tuple(expected.shape)}"
        )
        assert value.dtype == plain[name].dtype, f"{name}: got dtype {value.dtype}, expected {plain[name].dtype}"
        expected = expected.to(value.device)
        usual = torch.isfinite(expected)
        # A value near the end of a half's range may overflow in plain torch as well.
        reachable = usual & torch.isfinite(plain[name])
        finite = bool((torch.isfinite(value) | ~reachable).all()) and bool((~torch.isfinite(value) | usual).all())
        scale = _rms(expected[reachable])
        product = expected if spread is None else spread[name].to(value.device)
        coarsest = value.dtype if dtype is None else max(value.dtype, dtype, key=lambda d: torch.finfo(d).eps)
        unit = _TF32 if tf32 and coarsest == torch.float32 else _ROUNDING[coarsest] * torch.finfo(coarsest).eps
        rounding = unit * _rms(product[reachable])
        usable = reachable & torch.isfinite(value)
        error = _rms(value.double()[usable] - expected[usable])
        baseline = max(_rms(plain[name].double()[usable] - expected[usable]), rounding)
        if scale == 0:
            scale = 1.0
        rows.append(Comparison(name, error / scale, baseline / scale, value.numel(), finite))
    return rows


def assert_as_accurate(rows: Sequence[Comparison], title: str = "") -> None:
    """Raise AssertionError, with one line a tensor, unless every comparison passes."""
    if not all(row.passes for row in rows):
        raise AssertionError(
            "\n".join([f"{title or 'gradients'}: error above what plain torch makes", *map(str, rows)])
        )
