"""Parts of layers, and layers repeated, as sources: so that layers of other sizes are mixed.

A ``SourceView`` is what a user says of one source. The layer keeps the source itself, and its ``Cut`` as data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rl_kernels.nn.adapters import full_name, parameter_of

_VIEWED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Cut(NamedTuple):
    """What of a source's parameters is mixed: see ``SourceView``."""

    out: tuple[int, int] = (0, 1)
    in_: tuple[int, int] = (0, 1)
    repeats: tuple[int, int] = (1, 1)


WHOLE = Cut()


class SourceView:
    """A part of a layer, or a layer repeated, in the place of a source: for layers of other sizes.

    The weight of ``module``, ``(out, in)`` or ``(out, in, *kernel)``, is cut into blocks; the one that is meant is
    repeated. Nothing is copied: a call reads the module's parameters, and gradients reach them. The bias is cut and
    repeated along ``out``, so that blocks beside one another have the same. A depthwise convolution has one row of the
    weight for each channel: it is cut and repeated along ``out`` alone, and its channels with it.

    The paper (arXiv 2410.01239) mixes layers of one size. This is an option beyond it: what its successor RepL (arXiv
    2605.19533) does between sizes could not be read.

    Args:
        module: ``nn.Linear`` or ``nn.Conv1d``, ``2d``, ``3d`` without groups, or depthwise.
        out: ``(part, parts)``: into how many parts of equal size the rows are cut, and which is meant, from 0.
        in_: the same of the columns, the input features or channels.
        repeats: how often the block is repeated one below the other, and side by side.

    Raises:
        TypeError: another kind of module, or no integers.
        ValueError: a part that there is not, parts that do not divide the weight; or groups.
    """

    __slots__ = ("cut", "module")

    def __init__(
        self,
        module: nn.Module,
        out: tuple[int, int] = (0, 1),
        in_: tuple[int, int] = (0, 1),
        *,
        repeats: tuple[int, int] = (1, 1),
    ):
        if not isinstance(module, _VIEWED):
            expected = ", ".join(kind.__name__ for kind in _VIEWED)
            raise TypeError(f"module: got {full_name(module)}, expected one of {expected}")
        for name, numbers in (("out", out), ("in_", in_), ("repeats", repeats)):
            _check_two(name, numbers)
        depthwise = is_depthwise(module)
        groups = 1 if isinstance(module, nn.Linear) else module.groups
        cut = Cut(*map(tuple, (out, in_, repeats)))  # type: ignore[arg-type]
        along_out = cut.in_ == (0, 1) and cut.repeats[1] == 1
        if groups > 1 and not (depthwise and along_out) and cut != WHOLE:
            cuts = f"in_={tuple(in_)}, repeats={tuple(repeats)}"
            raise ValueError(
                f"module: got {groups} groups with {cuts}, expected 1, or a depthwise one cut by out alone"
            )
        shape = parameter_of(module, "weight").shape
        for dim, (name, (part, parts)) in enumerate((("out", out), ("in_", in_))):
            if not 0 <= part < parts or shape[dim] % parts:
                expected = f"a part below a number of parts that divides {shape[dim]}"
                raise ValueError(f"{name}: got {(part, parts)}, expected {expected}")
        if min(repeats) < 1:
            raise ValueError(f"repeats: got {tuple(repeats)}, expected at least 1")
        self.module = module
        self.cut = cut

    @property
    def weight(self) -> Tensor:
        """The weight as it is mixed, evaluated at each access."""
        return repeated(cut_once([parameter_of(self.module, "weight")], [self.cut])[0], self.cut)

    @property
    def bias(self) -> Tensor | None:
        """The bias as it is mixed, evaluated at each access; None where there is none."""
        bias = parameter_of(self.module, "bias")
        return None if bias is None else repeated(cut_once([bias], [self.cut])[0], self.cut)

    def __getattr__(self, name: str) -> Any:
        """A size of the layer that the view stands for, or a setting of the module."""
        if name.startswith("_") or name in SourceView.__slots__:
            raise AttributeError(name)
        rows = {"out_features", "out_channels"} | ({"in_channels", "groups"} if is_depthwise(self.module) else set())
        found = getattr(self.module, name)
        if name in rows:
            return found // self.cut.out[1] * self.cut.repeats[0]
        return found // self.cut.in_[1] * self.cut.repeats[1] if name in ("in_features", "in_channels") else found

    def __repr__(self) -> str:
        cut = self.cut
        return f"SourceView({self.module}, out={cut.out}, in_={cut.in_}, repeats={cut.repeats})"


Source = nn.Module | SourceView


def _check_two(name: str, numbers: Any) -> None:
    two = isinstance(numbers, Sequence) and len(numbers) == 2
    if not two or not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise TypeError(f"{name}: got {numbers!r}, expected two integers")


def is_depthwise(module: Any) -> bool:
    """Whether each channel of a convolution has a filter of its own."""
    return getattr(module, "groups", 1) > 1 and module.groups == module.in_channels == module.out_channels


def module_of(source: Source) -> nn.Module:
    """The module behind a source."""
    return source.module if isinstance(source, SourceView) else source


def view_of(module: nn.Module, cut: Cut) -> Source:
    """``module`` itself where all of it is mixed, else its view."""
    return module if cut == WHOLE else SourceView(module, cut.out, cut.in_, repeats=cut.repeats)


def shapes_of(source: Source) -> dict[str, tuple[int, ...]]:
    """The shapes of a source's parameters, by name."""
    if not isinstance(source, SourceView):
        return {name: tuple(parameter.shape) for name, parameter in source.named_parameters()}
    parameters = {"weight": source.weight, "bias": source.bias}
    return {name: tuple(parameter.shape) for name, parameter in parameters.items() if parameter is not None}


def both_as_seen(source: Any, other: Any) -> tuple[Any, Any]:
    """Two sources to be compared: both as views where one is, so that a parametrised layer is like a plain one."""
    if isinstance(source, SourceView) == isinstance(other, SourceView):
        return source, other
    return as_view(source), as_view(other)


def as_view(source: Any) -> SourceView:
    """``source``, all of it as a view where it is none."""
    return source if isinstance(source, SourceView) else SourceView(source)


class Cuts(NamedTuple):
    """What of each of a layer's sources is mixed."""

    each: tuple[Cut, ...]
    like: tuple[int, ...]
    """For each source the first that is the same and is cut into as many parts: they are cut once."""
    repeat: bool
    """Whether some source is repeated."""

    @classmethod
    def of(cls, sources: Sequence[Source], detach: Collection[int]) -> Cuts | None:
        """What ``sources`` say, of which some are detached; None where they are whole."""
        each = tuple(source.cut if isinstance(source, SourceView) else WHOLE for source in sources)
        modules = enumerate(map(module_of, sources))
        keys = [(id(module), each[j].out[1], each[j].in_[1], j in detach) for j, module in modules]
        like = tuple(keys.index(key) for key in keys)
        return None if set(each) == {WHOLE} else cls(each, like, any(cut.repeats != (1, 1) for cut in each))

    def cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The parts that are meant of the sources' ``tensors``, not repeated."""
        return cut_once(tensors, self.each, self.like)

    def repeated(self, tiles: Sequence[Tensor]) -> list[Tensor]:
        """What ``cut`` made, each part as often as it is mixed."""
        return list(map(repeated, tiles, self.each))


def cut_once(tensors: Sequence[Tensor], cuts: Sequence[Cut], like: Sequence[int] | None = None) -> list[Tensor]:
    """The part of each tensor that its cut means, not repeated, as a view of it.

    Args:
        tensors: weights, or biases, which have no columns.
        cuts: one each.
        like: for each tensor the first that is the same and cut into as many parts; each by itself otherwise.
    """
    made: dict[int, list[Sequence[Tensor]]] = {}
    found = []
    for j, (tensor, (out, in_, _)) in enumerate(zip(tensors, cuts, strict=True)):
        columns = in_[1] if tensor.dim() > 1 else 1
        first = j if like is None else like[j]
        if first not in made:
            # Not slices: in the backward each would fill a tensor as large as the whole with zeros.
            rows = tensor.unflatten(0, (out[1], -1)).unbind(0) if out[1] > 1 else (tensor,)
            made[first] = [row.unflatten(1, (columns, -1)).unbind(1) if columns > 1 else (row,) for row in rows]
        found.append(made[first][out[0]][in_[0] if columns > 1 else 0])
    return found


def repeated(tile: Tensor, cut: Cut) -> Tensor:
    """``tile`` as often as the cut says, as one tensor."""
    if cut.repeats == (1, 1):
        return tile
    return tile.repeat(*cut.repeats[: tile.dim()], *(1,) * (tile.dim() - 2))


class Tiles(NamedTuple):
    """A recipe whose sources are repeated, before they are."""

    weights: Sequence[Tensor]
    coefficients: Tensor
    biases: Sequence[Tensor] | None
    repeats: Sequence[tuple[int, int]]


def forward_in_parts(
    call: Callable[[Tensor, Sequence[Tensor], Tensor, Sequence[Tensor] | None, int], Tensor],
    x: Tensor,
    dim: int,
    tiles: Tiles,
    groups: int = 1,
) -> Tensor:
    """The output of a layer whose sources are repeated, without a repeated weight.

    A source that stands side by side r times multiplies the sum of the r parts of ``x``. One that stands r times below
    itself serves r parts of the output, computed apart where anything differs between them.

    Args:
        call: the layer for one recipe: of ``x``, weights, coefficients, biases and groups.
        x: its input.
        dim: the dimension of its channels, also those of the output.
        tiles: the recipe.
        groups: 1, or those of a depthwise convolution, whose sources stand below themselves only.
    """
    rows = tiles.coefficients.unbind(0)
    by_columns: dict[int, list[int]] = {}
    for j, (_, columns) in enumerate(tiles.repeats):
        by_columns.setdefault(columns, []).append(j)
    total: Tensor | None = None
    for columns, members in by_columns.items():
        seen = x.unflatten(dim, (columns, -1)).sum(dim) if columns > 1 else x
        one = len(members) == len(rows)
        coefficients = tiles.coefficients if one else torch.stack([rows[j] for j in members])
        biases = None if tiles.biases is None else [tiles.biases[j] for j in members]
        times = [tiles.repeats[j][0] for j in members]
        y = _rows_of(
            call, seen, dim, Tiles([tiles.weights[j] for j in members], coefficients, biases, ()), times, groups
        )
        total = y if total is None else total + y
    assert total is not None
    return total


def _rows_of(call: Any, x: Tensor, dim: int, tiles: Tiles, times: Sequence[int], groups: int) -> Tensor:
    """The output of sources that all stand side by side as often, each as many ``times`` below itself."""
    weights, coefficients, biases, _ = tiles
    parts = math.lcm(*times)
    if parts == 1:
        return call(x, weights, coefficients, biases, groups)
    if len(set(times)) == 1 and coefficients.dim() == 1 and groups == 1:
        return torch.cat([call(x, weights, coefficients, biases, groups)] * parts, dim)

    def by_part(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The tensors of each part of the output."""
        counts = [parts // count for count in times]
        cut = [t.unflatten(0, (n, -1)).unbind(0) if n > 1 else (t,) for t, n in zip(tensors, counts, strict=True)]
        return [[pieces[part % len(pieces)] for pieces in cut] for part in range(parts)]

    xs = x.unflatten(dim, (parts, -1)).unbind(dim) if groups > 1 else (x,) * parts
    mixes = coefficients.unflatten(1, (parts, -1)).unbind(1) if coefficients.dim() > 1 else (coefficients,) * parts
    bs = [None] * parts if biases is None else by_part(biases)
    found = [call(*args, max(groups // parts, 1)) for args in zip(xs, by_part(weights), mixes, bs, strict=True)]
    return torch.cat(found, dim)
