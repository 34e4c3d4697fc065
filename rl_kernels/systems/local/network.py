"""A network in modules that learn for themselves: how it is made, what it computes, and its step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rl_kernels.systems.contract import Engine, Plain
from rl_kernels.systems.local.auxiliary import AuxiliaryNet
from rl_kernels.systems.local.chain import Chain
from rl_kernels.systems.local.cutting import has_batch_statistics, has_running_statistics
from rl_kernels.systems.local.heads import Decoder, contrast
from rl_kernels.systems.local.methods import Method

Context = contextlib.AbstractContextManager[Any]


class Judged(NamedTuple):
    """What a judge says of a module's output: logits or a projection, and a reconstruction's logits or None."""

    scores: Tensor
    rebuilt: Tensor | None


class Judge(nn.Module):
    """An auxiliary net, if any, and a head; a decoder beside them, if wanted.

    With ``patches`` the scores are the mean of those of the image's ``patches x patches`` parts (HPFF).
    """

    def __init__(self, auxiliary: AuxiliaryNet | None, head: nn.Module, decoder: Decoder | None, patches: int = 1):
        super().__init__()
        self.auxiliary, self.head, self.decoder, self.patches = auxiliary, head, decoder, patches

    def forward(self, x: Tensor) -> Judged:
        rebuilt = None if self.decoder is None else self.decoder(x)
        parts = self.patches**2 if x.ndim == 4 else 1
        if parts > 1:
            high, wide = x.shape[2] // self.patches, x.shape[3] // self.patches
            cells = x[:, :, : high * self.patches, : wide * self.patches].unflatten(3, (self.patches, wide))
            x = cells.unflatten(2, (self.patches, high)).permute(2, 4, 0, 1, 3, 5).flatten(0, 2)
        scores = self.head(x if self.auxiliary is None else self.auxiliary(x))
        return Judged(scores.unflatten(0, (parts, -1)).mean(0) if parts > 1 else scores, rebuilt)


class LocalNetwork(nn.Module):
    """A model cut into K modules, each with what judges it. Calling it computes what the model does.

    ``model`` is the model itself, which knows nothing of this: its layers are what the modules run on.

    Made by :func:`split`.

    Attributes:
        model: that was cut.
        starts: the first unit of every module, and the number of units.
        heads: judges of single modules, by the module's number, where ``method.independent``.
        judges: of cascades, by the number of the last module in it; the last of all has none.
        first_token: tokens are judged by the first of them, not by their mean.
        image: shape of the input that it was cut for.
    """

    def __init__(
        self,
        chain: Chain,
        starts: Sequence[int],
        method: Method,
        heads: Mapping[int, Judge],
        judges: Mapping[int, Judge],
        first_token: bool,
        image: tuple[int, ...],
    ):
        super().__init__()
        self.units, self.image = [unit.path for unit in chain.units], image
        self.model, self.method, self.starts = chain.model, method, tuple(starts)
        self.first_token = first_token
        self.heads = nn.ModuleDict({str(index): head for index, head in heads.items()})
        self.judges = nn.ModuleDict({str(index): judge for index, judge in judges.items()})
        # Lists: their modules are the model's, and not registered a second time.
        self._parts: list[nn.Module] = [chain.part(first, end) for first, end in pairwise(starts)]
        self.running: list[nn.Module] = self.pieces()
        self.pixels = (torch.zeros(1), torch.ones(1))

    @property
    def modules_count(self) -> int:
        """K."""
        return len(self._parts)

    @property
    def span(self) -> int:
        """k, which K bounds."""
        return min(self.method.span, self.modules_count)

    def pieces(self) -> list[nn.Module]:
        """Return what a step calls: modules, then heads, then judges. Each may be compiled or wrapped by itself."""
        return [*self._parts, *self.heads.values(), *self.judges.values()]

    def wrap(self, pieces: Sequence[nn.Module]) -> None:
        """Have steps and calls run through these wrappers of :meth:`pieces` (DDP, say)."""
        expected = len(self.pieces())
        if len(pieces) != expected:
            raise ValueError(f"pieces: got {len(pieces)}, expected {expected}, one for each of pieces()")
        self.running = list(pieces)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.running[: self.modules_count]:
            x = part(x)
        return x

    def features(self, x: Tensor) -> Iterator[Tensor]:
        """Yield what each module returns."""
        for part in self.running[: self.modules_count]:
            x = part(x)
            yield x

    def auxiliary_parameters(self) -> int:
        """Return how many numbers heads and auxiliary nets hold, moving averages included."""
        return sum(p.numel() for module in (self.heads, self.judges) for p in module.parameters())

    @torch.no_grad()
    def follow(self) -> None:
        """Move the moving averages of all auxiliary nets: after every update."""
        for module in self.judges.modules():
            if isinstance(module, AuxiliaryNet):
                module.follow()

    def step(self, images: Tensor, targets: Tensor, *, engine: Engine | None = None, smoothing: float = 0.0) -> Tensor:
        """Add every module's gradients to its parameters', freeing each graph at once.

        Args:
            images: ``(B, ...)``, as the model takes them.
            targets: int64 ``(B,)``, or probabilities ``(B, classes)``.
            engine: differentiates, and may wait with the average over processes
                (``rl_kernels.systems.contract.Engine``); None for torch's own backward.
            smoothing: of labels.

        Returns:
            The cross-entropy of the whole network, without graph.

        Raises:
            TypeError: targets of another kind.
            ValueError: in training a batch of one where statistics are the batch's; probabilities where a loss needs
                labels; images of another size than :func:`split` was told, of which a reconstruction is wanted; nothing
                that is trained.
        """
        if not isinstance(targets, Tensor) or not (targets.dtype == torch.int64 or targets.ndim > 1):
            got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
            raise TypeError(f"targets: got {got}, expected a tensor of int64 labels or of probabilities")
        if self.training and len(images) < 2 and has_batch_statistics(self) and not self.method.end_to_end:
            raise ValueError(f"images: got a batch of {len(images)}, expected at least 2: statistics are the batch's")
        if self.method.contrastive and targets.ndim > 1:
            raise ValueError("targets: got probabilities with a contrastive loss, expected labels (no mixup)")
        if self.method.reconstruction and images.shape[1:] != torch.Size(self.image[1:]):
            raise ValueError(f"images: got shape {tuple(images.shape)}, expected {self.image[1:]} each, to be rebuilt")
        return _Step(self, images, targets, engine or Plain(), smoothing).go()

    def read_pixels(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Tell by which means and deviations of channels images are standardised, for reconstructions of pixels.

        Without it images are taken for pixels, from 0 to 1.

        Raises:
            ValueError: another number of them than channels, or a deviation of zero.
        """
        channels = self.image[1]
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise ValueError(f"{name}: got {len(values)} numbers, expected {channels}, one a channel")
        if not all(value > 0 for value in std):
            raise ValueError(f"std: got {list(std)}, expected positive numbers")
        first, second = (torch.tensor(each).reshape(1, -1, 1, 1) for each in (mean, std))
        self.pixels = first, second

    def extra_repr(self) -> str:
        """The first and the last unit of each module."""
        named = [unit or "stem" for unit in self.units]
        ends = [(named[first], named[end - 1]) for first, end in pairwise(self.starts)]
        return "modules: " + ", ".join(first if first == last else f"{first} to {last}" for first, last in ends)


class _Step:
    """One step: cascades of k modules over a stream that trails by k - 1, and a stream in which each is alone."""

    def __init__(self, net: LocalNetwork, images: Tensor, targets: Tensor, engine: Engine, smoothing: float):
        self.net, self.method, self.engine = net, net.method, engine
        self.images, self.targets, self.smoothing = images, targets, smoothing
        self.count, self.span = net.modules_count, net.span
        running = iter(net.running)
        self.parts = [next(running) for _ in range(self.count)]
        self.heads = {int(key): next(running) for key in net.heads}
        self.judges = {int(key): next(running) for key in net.judges}
        self.found = torch.zeros((), device=images.device)

    def go(self) -> Tensor:
        if self.method.end_to_end:
            self._end_to_end()
            return self.found
        # Alone, a module takes the output of the one before; a cascade that of the one before its first.
        alone = trailing = self.images
        learnt = False
        for index in range(self.count):
            losses: list[Tensor] = []
            if self.method.independent:
                alone = self._alone(alone, index, losses)
            if index >= self.span - 1:
                trailing = self._cascade(trailing, index, losses)
            # A module that is frozen, with what judges it, has nothing to learn.
            learning = [loss for loss in losses if loss.requires_grad]
            if learning:
                self.engine.backward(learning[0] if len(learning) == 1 else learning[0] + learning[1])
            learnt = learnt or bool(learning)
        if not learnt:
            raise ValueError("model: got one in which nothing requires a gradient, expected something to train")
        return self.found

    def _end_to_end(self) -> None:
        x = self.images
        for index, part in enumerate(self.parts):
            if self.method.checkpoint and index < self.count - 1:
                with self.engine.unsynchronised(part, False):
                    x = checkpoint(part, x, use_reentrant=False, context_fn=partial(_second_time, part))
            else:
                x = self._called(part, x)
        loss = self._cross_entropy(x)
        self.engine.backward(loss)
        self.found = loss.detach()

    def _run(self, index: int, x: Tensor, at: int) -> Tensor:
        """Module ``index`` in the step of module ``at``: gradients are averaged in the last step that reaches it."""
        last = min(index + self.span - 1, self.count - 1)
        return self._called(self.parts[index], x, waiting=at < last)

    def _called(self, piece: nn.Module, x: Tensor, waiting: bool = False) -> Any:
        with self.engine.unsynchronised(piece, waiting):
            return piece(x)

    def _alone(self, x: Tensor, index: int, losses: list[Tensor]) -> Tensor:
        output = self._run(index, x, index)
        if index == self.count - 1:
            losses.append(self.method.independent_weight * self._cross_entropy(output))
        elif index in self.heads:
            losses.append(self.method.independent_weight * self._judged(self.heads[index], output, index))
        return output.detach()

    def _cascade(self, x: Tensor, index: int, losses: list[Tensor]) -> Tensor:
        first = index - self.span + 1
        after_first = y = self._run(first, x, index)
        for inner in range(first + 1, index + 1):
            y = self._run(inner, y, index)
        if index == self.count - 1:
            loss = self._cross_entropy(y)
            self.found = loss.detach()
        else:
            loss = self._judged(self.judges[index], y, index)
        losses.append(self.method.cascade_weight * loss)
        return after_first.detach()

    def _judged(self, judge: nn.Module, output: Tensor, index: int) -> Tensor:
        """The loss of what a module returns."""
        judged: Judged = self._called(judge, output)
        rebuild, recognise = self.method.weights(index, self.count - 1)
        contrastive = self.method.contrastive
        loss = contrast(judged.scores, self.targets) if contrastive else self._cross_entropy(judged.scores)
        if judged.rebuilt is None:
            return recognise * loss
        return recognise * loss + rebuild * F.binary_cross_entropy_with_logits(judged.rebuilt, self._pixels())

    def _cross_entropy(self, logits: Tensor) -> Tensor:
        smoothing = self.smoothing if self.targets.ndim == 1 else 0.0
        return F.cross_entropy(logits, self.targets, label_smoothing=smoothing)

    def _pixels(self) -> Tensor:
        """The images as they were before they were standardised, from 0 to 1."""
        mean, std = (each.to(self.images) for each in self.net.pixels)
        return (self.images * std + mean).clamp(0, 1)


def _second_time(part: nn.Module) -> tuple[Context, Context]:
    """For a forward, and for its repetition in the backward: running statistics count the batch once."""
    return contextlib.nullcontext(), _statistics_kept(part)


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    norms = [each for each in module.modules() if has_running_statistics(each)]
    before = [dict(each._buffers) for each in norms]
    for each in norms:
        each._buffers.update({name: None if b is None else b.clone() for name, b in each._buffers.items()})
    try:
        yield
    finally:
        for each, buffers in zip(norms, before, strict=True):
            each._buffers.update(buffers)
