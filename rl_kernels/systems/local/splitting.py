"""From a model to a network in modules: the one call that cuts it and gives each module what judges it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

import rl_kernels as rl
from rl_kernels.conversion.options import at_least, one_of
from rl_kernels.nn import ReplacementLayer
from rl_kernels.systems.local.auxiliary import AuxiliaryNet, Statistics, deeper_units
from rl_kernels.systems.local.chain import Chain
from rl_kernels.systems.local.cutting import CUTS, Cost, Cut, costs, cuts
from rl_kernels.systems.local.heads import Decoder, make_head
from rl_kernels.systems.local.methods import METHODS, Method
from rl_kernels.systems.local.network import Judge, LocalNetwork

Foreign = Literal["detach", "refuse"]
PROJECTION = 128  # What InfoPro's code contrasts.
FIRST_TOKENS = ("class_token", "cls_token")


def split(
    model: nn.Module,
    modules: int,
    *,
    shape: Sequence[int],
    method: str | Method = "dgl",
    cut: Cut = "blocks",
    momentum: float = 0.995,
    statistics: Statistics = "own",
    patches: int = 1,
    supervise_first: bool = False,
    head_width: int = 128,
    foreign: Foreign = "detach",
) -> LocalNetwork:
    """Cut a model into modules that learn for themselves.

    The model is not changed, but for ``foreign``: it is the network for inference, before, during and after training.
    Modules run on the layers that it has now: replace or exchange them before. Hooks of the model itself, not of its
    layers, are not called by its modules. Heads have the device and the dtype of the module that they judge.

    Args:
        model: a chain of blocks, from one tensor to logits ``(B, classes)``: an ``nn.Sequential``, a ResNet or ViT of
            torchvision or timm, with replaced layers or without. Outputs of four dimensions are taken for images
            ``(B, C, H, W)``, of three for tokens ``(B, T, C)``.
        modules: K.
        shape: of the input, a batch of at least two: ``(2, 3, 32, 32)``. Only sizes are computed from it.
        method: what modules learn from: a key of ``METHODS``, or settings of one's own.
        cut: where: ``"blocks"``, as many in each module, ``"flops"`` or ``"memory"``, as much of it in each.
        momentum: of moving averages in auxiliary nets (MAN: 0.995).
        statistics: batch statistics of these: their ``"own"``, or ``"copied"`` from the model.
        patches: judge so many parts of an image's height and width, and average (HPFF: 2).
        supervise_first: the first k - 1 modules, which no cascade ends with, are judged alone as well.
        head_width: of the heads (128 in public code).
        foreign: a replaced layer whose source stands in another module: ``"detach"``: it gives that source no
            gradient, so that modules stay apart; ``"refuse"``: an error that names it.

    Returns:
        The network. ``step(images, targets)`` computes and differentiates all losses; after ``optimizer.step()``
        follows ``follow()``.

    Raises:
        TypeError: ``model`` is no module, or an option of another kind.
        ValueError: an option that cannot be, a model without a chain of blocks, or more modules than units.
    """
    chosen = _method(method)
    for name, value, known in (
        ("cut", cut, CUTS),
        ("statistics", statistics, ("own", "copied")),
        ("foreign", foreign, ("detach", "refuse")),
    ):
        one_of(name, value, known)
    for name, number in (("modules", modules), ("patches", patches), ("head_width", head_width)):
        at_least(name, number, 1)
    if not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
        raise ValueError(f"momentum: got {momentum!r}, expected at least 0 and less than 1")
    if not isinstance(supervise_first, bool):
        raise TypeError(f"supervise_first: got {supervise_first!r}, expected True or False")
    image = _checked_shape(shape)
    chain = Chain(model)
    found = costs(chain, image)
    starts = cuts(chain, modules, cut, found)
    if modules > 1 and not chosen.end_to_end:
        _keep_apart(chain, starts, foreign)
    builder = _Builder(chain, starts, chosen, found, image, momentum, statistics, patches, head_width)
    final = modules - 1
    span = min(chosen.span, modules)
    alone = range(0 if supervise_first else span - 1, final) if chosen.independent else range(0)
    cascades = range(0) if chosen.end_to_end else range(span - 1, final)
    heads = {index: builder.judge(index, copies=0) for index in alone}
    judges = {index: builder.judge(index, copies=chosen.copies) for index in cascades}
    settings = chosen if modules > 1 else Method(end_to_end=True)
    return LocalNetwork(chain, starts, settings, heads, judges, builder.first_token, image)


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    whole = all(isinstance(size, int) and size >= 1 for size in sizes)
    if len(sizes) < 2 or not whole or sizes[0] < 2:
        raise ValueError(f"shape: got {shape!r}, expected that of a batch of at least two, as (2, 3, 32, 32)")
    return sizes


def _method(method: str | Method) -> Method:
    if isinstance(method, Method):
        return method
    one_of("method", method, METHODS)
    return METHODS[method]


class _Builder:
    """Makes what judges the modules of a chain."""

    def __init__(
        self,
        chain: Chain,
        starts: Sequence[int],
        method: Method,
        found: Sequence[Cost],
        image: tuple[int, ...],
        momentum: float,
        statistics: Statistics,
        patches: int,
        width: int,
    ):
        self.chain, self.starts, self.method, self.costs, self.image = chain, starts, method, found, image
        self.momentum, self.statistics, self.patches, self.width = momentum, statistics, patches, width
        # A last unit that ends with its block is the classifier.
        self.copied = found if chain.units[-1].tail else found[:-1]
        self.first_token = any(name.rpartition(".")[2] in FIRST_TOKENS for name, _ in chain.model.named_parameters())

    @cached_property
    def plain(self) -> nn.Module:
        """A copy of the model, in which replaced layers are the plain ones that compute the same."""
        made = copy.deepcopy(self.chain.model)
        return rl.merge(made) if any(isinstance(each, ReplacementLayer) for each in made.modules()) else made

    def judge(self, index: int, copies: int) -> Judge:
        """Return what judges module ``index``."""
        last = self.starts[index + 1] - 1
        shape = self.costs[last].returns
        units = deeper_units(self.copied, last, copies) if copies else []
        mixing = self.method.mixing
        auxiliary = None
        if units:
            auxiliary = AuxiliaryNet(self.chain, self.plain, units, mixing, self.momentum, self.statistics)
        decoder = None
        if self.method.reconstruction:
            if len(shape) != 4 or len(self.image) != 4:
                raise ValueError(
                    f"method: got reconstruction with outputs of shape {shape} of module {index}, expected images"
                )
            decoder = Decoder(shape[1], self.image)
        head = make_head(
            self.method.head,
            self.costs[units[-1]].shape if units else shape,
            PROJECTION if self.method.contrastive else self.costs[-1].returns[-1],
            last=self.copied[-1].shape,
            width=self.width,
            first_token=self.first_token,
        )
        judge = Judge(auxiliary, head, decoder, self.patches)
        last_layer = next((p for p in self._parameters_of(index) if p.is_floating_point()), None)
        if last_layer is not None:
            judge.to(last_layer.device, last_layer.dtype)
        self._check(judge, index, shape)
        return judge

    def _parameters_of(self, index: int) -> list[nn.Parameter]:
        return list(self.chain.part(self.starts[index], self.starts[index + 1]).parameters())

    def _check(self, judge: Judge, index: int, shape: tuple[int, ...]) -> None:
        """Raise unless the judge can take what its module returns."""
        twin = copy.deepcopy(judge).to("meta")
        dtype = next(twin.parameters()).dtype
        try:
            twin(torch.empty(shape, device="meta", dtype=dtype))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"method: module {index} returns {shape}, which what judges it cannot take, with patches="
                f"{self.patches}: {str(error).splitlines()[0]}"
            ) from error


def _keep_apart(chain: Chain, starts: Sequence[int], foreign: Foreign) -> None:
    """Detach the sources of replaced layers that stand in other modules than theirs, or refuse them by name."""
    module_of = {
        id(inner): index
        for index, (first, end) in enumerate(pairwise(starts))
        for inner in chain.part(first, end).modules()
    }
    paths = {id(module): path for path, module in chain.model.named_modules()}
    for path, layer in chain.model.named_modules():
        if not isinstance(layer, ReplacementLayer):
            continue
        for number, other in enumerate(layer.runs_on):
            if module_of.get(id(other)) == module_of.get(id(layer)):
                continue
            name = f"{path} runs on {paths.get(id(other), 'a layer outside of it')}"
            if foreign == "refuse" or number >= len(layer.sources):
                raise ValueError(
                    f"model: got modules {module_of.get(id(layer))} and {module_of.get(id(other))} that are not apart: "
                    f"{name}; expected sources in the module of the layer"
                )
            if number not in layer.detach:
                layer.detach_sources((*layer.detach, number))
