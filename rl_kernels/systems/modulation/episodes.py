"""Many tasks of few images: what a network's modulators begin with is learnt, so that a few steps on a task suffice.

An episode is N classes with K labelled images each, and others that are to be told apart. An inner loop adapts some of
the parameters to the labelled ones by plain gradient descent, an outer one (Adam) moves what it begins with. Which
parameters either loop moves makes the method: MAML (arXiv 1703.03400), ANIL (arXiv 1909.09157), or a frozen network
with modulators or norms. The inner loop's settings for modulators are options: those of arXiv 2203.15297 could not be
read.

Norms take the statistics of the batch: of labelled images alone, then of the others, which so know of each other.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from rl_kernels.conversion.options import at_least, one_of
from rl_kernels.systems.data import sets
from rl_kernels.systems.data.loading import mixed_seed
from rl_kernels.systems.models import DigitsResNet
from rl_kernels.systems.modulation.modulating import find_classifier, modulate, new_classifier, task_parameters
from rl_kernels.systems.modulation.modulators import KINDS

METHODS = ("maml", "anil", "norms", *(kind for kind in KINDS if kind != "mlp"))
"""``maml``: both loops move everything. ``anil``: the inner one the classifier. Else both loops move the classifier
with the norms' affine parameters, or with modulators of that kind, and the rest is frozen. (What ``mlp`` computes twice
torch.func does not differentiate.)"""


@dataclass(frozen=True)
class FewShot:
    """How episodes are made and learnt from.

    Attributes:
        method: one of ``METHODS``.
        ways: N, classes of an episode.
        shots: K, labelled images of each.
        queries: others of each.
        inner_steps: of gradient descent on the labelled images.
        inner_rate: its learning rate.
        second_order: the outer loop differentiates through the inner one's gradients; without, it takes them as given.
        steps: of the outer loop.
        meta_batch: episodes of such a step.
        outer_rate: Adam's learning rate.
        rank: of ``outer`` and ``mixout``.
        learn_base: the outer loop moves the network, too.
        evaluated: episodes of classes that were never trained on.
        width: of the residual network, of three blocks.
        size: pixels a side.
        base_steps: of ordinary training on the training classes, which all methods begin with; 0 begins at random.
        seed: of everything random but the split of the classes.
    """

    method: str = "outer"
    ways: int = 5
    shots: int = 5
    queries: int = 10
    inner_steps: int = 5
    inner_rate: float = 0.1
    second_order: bool = True
    steps: int = 200
    meta_batch: int = 4
    outer_rate: float = 1e-3
    rank: int = 4
    learn_base: bool = False
    evaluated: int = 600
    width: int = 16
    size: int = 14
    base_steps: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        for name in ("ways", "shots", "queries", "meta_batch", "rank", "width"):
            at_least(name, getattr(self, name), 1)
        at_least("size", self.size, 4)
        at_least("evaluated", self.evaluated, 2)
        for name in ("inner_steps", "steps", "base_steps", "seed"):
            at_least(name, getattr(self, name), 0)
        for name in ("inner_rate", "outer_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a number above 0")
        if self.learn_base and self.method in ("maml", "anil"):
            raise ValueError(f"learn_base: got True with method={self.method!r}, which learns the network anyway")


class Classes(NamedTuple):
    """Standardised images ``(n, channels, size, size)`` of each class."""

    training: Sequence[Tensor]
    test: Sequence[Tensor]


class Episode(NamedTuple):
    """Labelled images ``(B, N * K, ...)``, others ``(B, N * Q, ...)``, and the labels of each, ``(N * K,)``."""

    support: Tensor
    query: Tensor
    support_labels: Tensor
    query_labels: Tensor


def load_classes(names: Sequence[str], size: int) -> Classes:
    """Read data sets whose images have as many channels; of each, three classes in five are trained on.

    The split of the classes is the same for every run.

    Raises:
        ValueError: no name, or sets of other channels.
        FileNotFoundError, ImportError: as of ``data.sets.load``.
    """
    if not names:
        raise ValueError("data: got no name, expected one or more data sets")
    training: list[Tensor] = []
    test: list[Tensor] = []
    for name in names:
        data = sets.load(name)
        parts = (data.train, data.test)
        if any(part.pixels is None for part in parts):
            raise ValueError(f"data: got {name!r}, whose images are files, expected a set in memory")
        if training and training[0].shape[1] != data.channels:
            raise ValueError(
                f"data: {name} has {data.channels} channels, expected {training[0].shape[1]} as {names[0]}"
            )
        pixels = torch.cat([part.pixels for part in parts]).float() / 255  # type: ignore[misc]
        labels = torch.cat([part.labels for part in parts])
        pixels = F.interpolate(pixels, (size, size), mode="area")
        pixels = (pixels - pixels.mean()) / pixels.std()
        order = torch.randperm(len(data.classes), generator=torch.Generator().manual_seed(sets.SPLIT_SEED)).tolist()
        border = math.ceil(0.6 * len(order))
        training += [pixels[labels == label] for label in order[:border]]
        test += [pixels[labels == label] for label in order[border:]]
    return Classes(training, test)


def episodes(images: Sequence[Tensor], wanted: FewShot, count: int, seed: int) -> Iterator[Episode]:
    """Yield batches of ``count`` episodes without end, a function of the seed.

    There must be as many classes, and images of each, as :func:`run` makes sure of.
    """
    each = wanted.shots + wanted.queries
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(wanted.ways).repeat_interleave(n) for n in (wanted.shots, wanted.queries))
    support_labels, query_labels = labels
    while True:
        support, query = [], []
        for _ in range(count):
            chosen = torch.randperm(len(images), generator=generator)[: wanted.ways].tolist()
            drawn = [images[c][torch.randperm(len(images[c]), generator=generator)[:each]] for c in chosen]
            support.append(torch.cat([one[: wanted.shots] for one in drawn]))
            query.append(torch.cat([one[wanted.shots :] for one in drawn]))
        yield Episode(torch.stack(support), torch.stack(query), support_labels, query_labels)


class Learner:
    """A network whose parameters are moved by an inner and an outer loop, or by neither.

    Args:
        network: its norms take batch statistics.
        wanted: what is moved.

    Attributes:
        fast: what the inner loop begins with, by name.
        slow: the rest.
        trained: what the outer loop moves.
    """

    def __init__(self, network: nn.Module, wanted: FewShot):
        self.wanted = wanted
        self.model = network = copy.deepcopy(network)
        classifier = find_classifier(network)
        if wanted.method in ("maml", "anil"):
            parent, _, name = classifier.rpartition(".")
            setattr(network.get_submodule(parent), name, new_classifier(network.get_submodule(classifier), wanted.ways))
            named = dict(network.named_parameters())
            inner = named if wanted.method == "maml" else [name for name in named if name.startswith(classifier)]
            self.trained = [*named.values()]
        else:
            kind: Any = wanted.method if wanted.method in KINDS else None
            norms: Any = "affine" if kind is None else "frozen"
            modulate(network, kind, wanted.rank, norms=norms, head=wanted.ways)
            task = [*task_parameters(network, "task")]
            known = {id(parameter) for parameter in task}
            named = dict(network.named_parameters())
            inner = [name for name, parameter in named.items() if id(parameter) in known]
            if wanted.learn_base:
                network.requires_grad_(True)
            self.trained = [p for p in named.values() if p.requires_grad]
        self.fast: Mapping[str, Tensor] = {name: named[name] for name in inner}
        self.slow: Mapping[str, Tensor] = {name: value for name, value in named.items() if name not in self.fast}
        with torch.no_grad():
            for name, parameter in self.fast.items():
                if name.startswith(classifier):  # No class is more likely than another at the start.
                    parameter.zero_()
        network.train()

    def logits(self, fast: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """What the network says, with these in place of its own."""
        return functional_call(self.model, {**self.slow, **fast}, (images,))

    def adapt(self, support: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
        """The parameters after the inner loop on labelled images ``(N * K, ...)``."""
        wanted, fast = self.wanted, dict(self.fast)

        def loss(fast: Mapping[str, Tensor]) -> Tensor:
            return F.cross_entropy(self.logits(fast, support), labels)

        for _ in range(wanted.inner_steps):
            gradients = grad(loss)(fast)
            for name, gradient in gradients.items():
                fast[name] = fast[name] - wanted.inner_rate * (gradient if wanted.second_order else gradient.detach())
        return fast

    def after(self, episode: Episode) -> Tensor:
        """Logits ``(B, N * Q, N)`` of the other images, each episode by a network adapted to its labelled ones."""

        def one(support: Tensor, query: Tensor) -> Tensor:
            return self.logits(self.adapt(support, episode.support_labels), query)

        if torch.is_grad_enabled():
            # Under vmap the second derivatives of batch_norm with weights of each sample are wrong (torch 2.13).
            return torch.stack([one(*each) for each in zip(episode.support, episode.query, strict=True)])
        return vmap(one)(episode.support, episode.query)

    def learn(self, batches: Iterator[Episode], watch: Callable[[int, float], None] | None = None) -> None:
        """Carry the outer loop out."""
        if not self.wanted.steps:
            return
        optimizer = torch.optim.Adam(self.trained, self.wanted.outer_rate)
        for step in range(self.wanted.steps):
            episode = next(batches)
            logits = self.after(episode)
            labels = episode.query_labels.expand(len(logits), -1)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if watch is not None:
                watch(step, float(loss))

    def accuracies(self, batches: Iterator[Episode], count: int) -> list[float]:
        """Of each of ``count`` episodes, the share of the other images that is told right."""
        found: list[float] = []
        while len(found) < count:
            episode = next(batches)
            with torch.no_grad():
                right = self.after(episode).argmax(-1) == episode.query_labels
            found += right.float().mean(1).tolist()
        return found[:count]


def run(wanted: Sequence[FewShot], classes: Classes) -> list[dict[str, Any]]:
    """Train and evaluate several methods of one seed that begin with the same network.

    Raises:
        ValueError: too few classes, or too few images of one; before anything is trained.

    Returns:
        Of each: the settings, ``accuracy`` (the mean over episodes), ``interval`` (half of that of 95 % of this mean),
        ``parameters`` that the inner loop moves, and ``seconds`` of the outer loop and of the evaluation.
    """
    for each in wanted:
        for images in classes:
            _check(each, images)
    network: nn.Module | None = None
    begun: Any = None
    found = []
    for each in wanted:
        start = (each.seed, each.width, each.base_steps)
        if network is None or start != begun:
            network, begun = base(each, classes.training), start
        torch.manual_seed(mixed_seed(each.seed, 3))
        learner = Learner(network, each)
        started = time.perf_counter()
        learner.learn(episodes(classes.training, each, each.meta_batch, mixed_seed(each.seed, 1)))
        between = time.perf_counter()
        batches = episodes(classes.test, each, each.meta_batch, mixed_seed(each.seed, 2))
        accuracies = learner.accuracies(batches, each.evaluated)
        found.append(
            {
                **vars(each),
                "accuracy": statistics.fmean(accuracies),
                "interval": 1.96 * statistics.stdev(accuracies) / math.sqrt(len(accuracies)),
                "parameters": sum(value.numel() for value in learner.fast.values()),
                "learning_seconds": between - started,
                "evaluation_seconds": time.perf_counter() - between,
            }
        )
    return found


def _check(wanted: FewShot, images: Sequence[Tensor]) -> None:
    if len(images) < wanted.ways:
        raise ValueError(f"ways: got {wanted.ways}, expected at most {len(images)}, the classes that there are")
    each, fewest = wanted.shots + wanted.queries, min(map(len, images))
    if fewest < each:
        raise ValueError(f"shots: got {each} with queries, expected at most {fewest}, the images of a class")


def base(wanted: FewShot, images: Sequence[Tensor]) -> nn.Module:
    """A residual network that tells the training classes apart, its norms on the statistics of the batch."""
    torch.manual_seed(mixed_seed(wanted.seed, 0))
    network = DigitsResNet(wanted.width, (1, 1, 1), len(images), images[0].shape[1])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    pixels = torch.cat(list(images))
    labels = torch.arange(len(images)).repeat_interleave(torch.tensor([len(each) for each in images]))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(wanted.base_steps):
        some = torch.randint(len(pixels), (128,))
        optimizer.zero_grad()
        F.cross_entropy(network(pixels[some]), labels[some]).backward()
        optimizer.step()
    return network
