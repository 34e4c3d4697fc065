"""Auxiliary nets between a module's output and its head: copies of deeper blocks, the first beside a moving average.

Of MAN (a copy of the next block), MAN++ (scaled) and MLAAN (copies that leap ahead).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from rl_kernels.conversion.blocks import parts
from rl_kernels.conversion.replacing import put
from rl_kernels.nn import ReplacementLayer
from rl_kernels.nn.coefficients import Coefficients
from rl_kernels.systems.local.chain import Chain
from rl_kernels.systems.local.cutting import Cost

Mixing = Literal["sum", "scaled", "weights"]
MIXINGS = ("sum", "scaled", "weights")
Statistics = Literal["own", "copied"]


def deeper_units(costs: Sequence[Cost], after: int, copies: int) -> list[int]:
    """Return which units of a chain an auxiliary net copies.

    Of the units after a module those that change the shape, without which later ones cannot follow, and so many of
    those that do not, after the last of them and evenly up to the chain's end, that there are ``copies``. For ResNet-32
    and 4 copies these are the tables of MLAAN's code for its first two stages.

    Args:
        costs: of the units that can be copied: all but a last one that is the classifier itself.
        after: number of the module's last unit.
        copies: 1 takes the next unit (MAN).
    """
    later = range(after + 1, len(costs))
    if copies == 1:
        return list(later[:1])
    changing = [unit for unit in later if costs[unit].shape != costs[unit - 1].shape]
    chosen = changing[:copies]
    if len(chosen) == len(changing):
        following = [unit for unit in later if unit not in changing and unit > (changing or [after])[-1]]
        wanted = min(copies - len(chosen), len(following))
        chosen += [following[-(-len(following) * (index + 1) // wanted) - 1] for index in range(wanted)]
    return chosen


class Balance(Coefficients):
    """``(s, 2 - s)``, s learned from 1 on (MAN++). Calling it returns both, ``(2,)``."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.constraint = "free"
        self.s = nn.Parameter(torch.ones(()))

    def forward(self) -> Tensor:
        return torch.stack((self.s, 2 - self.s))

    @property
    def shape(self) -> tuple[int, ...]:
        return (2,)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.s)

    def extra_repr(self) -> str:
        return ""


class AuxiliaryNet(nn.Module):
    """Copies of units, one after the other; the first beside the moving average of the model's own.

    Args:
        chain: of the model.
        plain: the model without replaced layers, from which the copies are made.
        units: to copy.
        mixing: of the first copy A and the average E. ``"sum"``: ``A(x) + E(x)`` (MAN, MLAAN). ``"scaled"``:
            ``s A(x) + (2 - s) E(x)`` with a learned s (MAN++). ``"weights"``: one unit, whose weights are
            ``s W_A + (2 - s) W_E``, mixed inside its kernels (ours: half the work, and not equal to ``"scaled"``).
        momentum: m of ``E <- m E + (1 - m) own``.
        statistics: the average's batch statistics: its ``"own"``, or ``"copied"`` from the model.

    Raises:
        ValueError: ``mixing="weights"`` of a layer that cannot be mixed.
    """

    def __init__(
        self,
        chain: Chain,
        plain: nn.Module,
        units: Sequence[int],
        mixing: Mixing,
        momentum: float,
        statistics: Statistics = "own",
    ):
        super().__init__()
        self.momentum, self.statistics, self.mixing = momentum, statistics, mixing
        last = len(chain) - 1
        copies = [copy.deepcopy(chain.part(unit, unit + 1, root=plain, tail=unit != last)) for unit in units]
        self.copies = nn.ModuleList(copies)
        self.average = copy.deepcopy(copies[0]).requires_grad_(False)
        self.balance = None if mixing == "sum" else Balance()
        self.mixed: nn.Module | None = None
        # Not a module of this one: the model's own, whose weights the average follows.
        self._followed = [chain.part(units[0], units[0] + 1, tail=units[0] != last)]
        if mixing == "weights":
            self.mixed = copy.deepcopy(copies[0])
            self._mix(self.mixed, self.balance)

    def _mix(self, mixed: nn.Module, balance: Balance | None) -> None:
        """Let the layers of ``mixed`` run on the weights of the first copy and of the average."""
        owns, layers = {}, {}
        for part in parts(mixed):
            if part.module is None or part.kind is None or part.why_kept:
                why = part.why_kept or f"{part.class_name} has no replacement"
                raise ValueError(f"mixing: got 'weights' with a layer that cannot be mixed, {part.path}: {why}")
            sources = tuple(unit.get_submodule(part.path) for unit in (self.copies[0], self.average))
            place = f"mixed.{part.path}"
            owns[place] = part.module
            layers[place] = part.kind(sources, own=part.module, coefficients=balance)
        put(self, owns, layers, layers)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.copies
        if self.mixed is not None:
            x = self.mixed(x)
        elif self.balance is None:
            x = first(x) + self.average(x)
        else:
            s, rest = self.balance().unbind()
            x = s * first(x) + rest * self.average(x)
        for each in others:
            x = each(x)
        return x

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average towards the model's weights: after every update."""
        own = dict(_plain_tensors(self._followed[0], self.statistics == "copied"))
        averages = dict(_plain_tensors(self.average, self.statistics == "copied"))
        floating = [name for name, tensor in averages.items() if tensor.is_floating_point()]
        torch._foreach_lerp_(
            [averages[name] for name in floating],
            [own[name].to(averages[name].dtype) for name in floating],
            1 - self.momentum,
        )
        for name in averages.keys() - set(floating):
            averages[name].copy_(own[name])


def _plain_tensors(unit: nn.Module, buffers: bool) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a unit by name, those of replaced layers mixed; and its buffers."""
    inside: set[str] = set()
    for path, module in unit.named_modules():
        if isinstance(module, ReplacementLayer):
            inside.add(f"{path}.")
            for name, parameter in module.merged().named_parameters():
                yield f"{path}.{name}", parameter
    for name, tensor in [*unit.named_parameters(), *(unit.named_buffers() if buffers else ())]:
        if not any(name.startswith(path) for path in inside) or not isinstance(tensor, nn.Parameter):
            yield name, tensor
