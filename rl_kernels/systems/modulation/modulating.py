"""A model becomes the frozen base of tasks; which task it runs is switched, by batch or by sample."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from rl_kernels.conversion.options import at_least, one_of
from rl_kernels.nn import ReplacementLayer
from rl_kernels.nn.adapters import HOOKS
from rl_kernels.systems.modulation.modulators import CONVOLUTIONS, KINDS, LAYERS, Kind, Modulator, is_convolution
from rl_kernels.systems.modulation.switched import Own, Switched

Norms = Literal["own", "affine", "frozen"]
TARGETS: dict[str, tuple[type[nn.Module], ...]] = {"conv": CONVOLUTIONS, "linear": (nn.Linear,), "all": LAYERS}
"""Names of what is modulated."""
NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


class Options(NamedTuple):
    """What :func:`modulate` was told of a task, the model aside.

    Attributes:
        kind: of modulators; None for none.
        rank: of what has one.
        layers: paths of what is modulated.
        norms: whose they are.
        classifier: path of the layer that the task has a classifier of its own for; None for the base's.
        classes: of that.
    """

    kind: Kind | None
    rank: int
    layers: tuple[str, ...]
    norms: Norms
    classifier: str | None
    classes: int | None

    @property
    def replaced(self) -> tuple[str, ...]:
        """Paths of the layers, norms aside, that a part of the task stands in for."""
        return self.layers if self.classifier is None else (*self.layers, self.classifier)


def modulate(
    model: nn.Module,
    kind: Kind | None = "outer",
    rank: int = 4,
    targets: str | Collection[str] = "conv",
    norms: Norms = "own",
    head: int | None = None,
    task: str = "task",
    *,
    classifier: str | None = None,
) -> nn.Module:
    """Give a model a task of its own, and choose it. Called again with another name it adds another one.

    The model's own parameters are frozen, and all tasks share them. A task holds modulators, biases of the modulated
    layers, norms, a classifier: whatever still asks for a gradient is the chosen task's or another one's. Before it has
    learnt anything the task computes what the model does, its classifier aside.

    Args:
        model: changed in place: its layers of these kinds stand in a ``Switched`` afterwards, as ``base``.
        kind: ``"channel"``, ``"outer"``, ``"gate"``, ``"mixout"``, ``"mlp"`` (see ``modulators.py``), or None: no layer
            is modulated, and only norms and the classifier are the task's.
        rank: of ``outer`` and ``mixout``.
        targets: ``"conv"``, ``"linear"``, ``"all"`` (both), or paths of single layers. Subclasses of torch's layers and
            transposed convolutions are passed over; the task's classifier is never modulated.
        norms: ``"own"``: scale, shift and running statistics are the task's; ``"affine"``: scale and shift;
            ``"frozen"``: nothing.
        head: classes of a new classifier, at random; None keeps the base's.
        task: its name, as one of a ``ModuleDict``.
        classifier: path of the layer that ``head`` stands in for; None for the model's last ``nn.Linear``.

    Returns:
        The model.

    Raises:
        ValueError, TypeError: an option that cannot be, a model without a layer to modulate, a name that is taken; the
            model is as it was.
    """
    options = _checked(model, kind, rank, targets, norms, head, classifier)
    check_name(model, task)
    attach(model, make_parts(model, options), task)
    return model


def make_parts(model: nn.Module, options: Options) -> dict[str, nn.Module]:
    """What a task by ``options`` begins with, by the paths of the layers it belongs to. The model stays as it is."""
    layers = dict(layers_of(model))
    parts: dict[str, nn.Module] = {}
    if options.kind is not None:
        parts |= {path: KINDS[options.kind](layers[path], options.rank) for path in options.layers}
    if options.classifier is not None:
        assert options.classes is not None
        parts[options.classifier] = Own(new_classifier(layers[options.classifier], options.classes))
    if options.norms != "frozen":
        for path, layer in layers.items():
            if isinstance(layer, NORMS):
                parts[path] = Own(copy.deepcopy(layer).requires_grad_(True), statistics=options.norms == "own")
    return parts


def new_classifier(old: Any, classes: int) -> nn.Linear:
    """A linear layer at random in the place of ``old``, of another number of classes."""
    return nn.Linear(old.in_features, classes, old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)


def attach(model: nn.Module, parts: Mapping[str, nn.Module], task: str) -> None:
    """Give the model a task of these parts, and choose it; what is not a task's is frozen."""
    # A norm that stays the base's is switched as well: statistics of the base follow no task.
    norms = [path for path, layer in layers_of(model) if isinstance(layer, NORMS)]
    _switch(model, {*parts, *norms})
    places = switched(model)
    for place in places.values():
        place.known.append(task)
    for path, part in parts.items():
        part.train(model.training)
        places[path].tasks[task] = part
    learnt = {parameter for place in places.values() for parameter in place.tasks.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in learnt)
        if parameter not in learnt:
            parameter.grad = None  # What is left of one would move the base in an optimizer's next step.
    set_task(model, task)


def set_task(model: nn.Module, task: str | None) -> None:
    """Choose the task that the model runs; None for the base as it was.

    Raises:
        ValueError: there is no such task.
    """
    if task is not None:
        _known(model, task)
    for layer in switched(model).values():
        layer.chosen = task


def tasks_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the tasks that a model's layers know, in the order in which they came.

    They are the same for whatever is around the model, as ``DataParallel``.
    """
    return tuple(dict.fromkeys(task for layer in switched(model).values() for task in layer.known))


def options_of(model: nn.Module, task: str) -> Options:
    """What a task is made of, as :func:`modulate` takes it.

    Raises:
        ValueError: there is no such task.
    """
    parts = parts_of(model, task)
    modulators = {path: part for path, part in parts.items() if isinstance(part, Modulator)}
    first = next(iter(modulators.values()), None)
    kind = None if first is None else first.kind
    rank = 1 if first is None or first.rank is None else first.rank
    norms: Norms = "frozen"
    classifier: str | None = None
    classes: int | None = None
    for path, part in parts.items():
        if isinstance(part, Own) and isinstance(part.own, nn.Linear):
            classifier, classes = path, part.own.out_features
        elif isinstance(part, Own):
            norms = "own" if part.statistics else "affine"
    return Options(kind, rank, tuple(modulators), norms, classifier, classes)


def parts_of(model: nn.Module, task: str) -> dict[str, nn.Module]:
    """What a task has, by the path of the layer that it belongs to.

    Raises:
        ValueError: there is no such task.
    """
    _known(model, task)
    return {path: layer.tasks[task] for path, layer in switched(model).items() if task in layer.tasks}


def remove_task(model: nn.Module, task: str) -> None:
    """Take a task out of a model; where it was chosen the base is.

    Raises:
        ValueError: there is no such task.
    """
    _known(model, task)
    for layer in switched(model).values():
        if task in layer.known:
            layer.known.remove(task)
        if task in layer.tasks:
            del layer.tasks[task]
        if layer.chosen == task:
            layer.chosen = None


def task_parameters(model: nn.Module, task: str) -> Iterator[nn.Parameter]:
    """Yield the parameters of a task, which its optimizer takes.

    Raises:
        ValueError: there is no such task.
    """
    for part in parts_of(model, task).values():
        yield from (parameter for parameter in part.parameters() if parameter.requires_grad)


def run_tasks(model: nn.Module, x: Tensor, tasks: Sequence[str | None]) -> Tensor:
    """Run a batch of which each sample belongs to a task: one call for each of them, in the order of the samples.

    Args:
        model: maps ``(B, ...)`` to ``(B, classes)``, or to any shape that is the same for all tasks.
        x: ``(B, ...)``.
        tasks: B names; None for the base.

    Returns:
        ``(B, classes)``, of the task that has most; beyond a task's own classes stands minus infinity. The task that
        was chosen before is chosen afterwards.

    Raises:
        ValueError: as many names as samples are expected, each of a task.
    """
    if len(tasks) != len(x):
        raise ValueError(f"tasks: got {len(tasks)} names for {len(x)} samples, expected one each")
    for name in {each for each in tasks if each is not None}:
        _known(model, name)
    if not tasks:
        return cast(Tensor, model(x))
    before = {layer: layer.chosen for layer in switched(model).values()}
    samples, outputs = [], []
    try:
        for task in dict.fromkeys(tasks):
            set_task(model, task)
            mine = torch.tensor([i for i, other in enumerate(tasks) if other == task], device=x.device)
            samples.append(mine)
            outputs.append(model(x.index_select(0, mine)))
    finally:
        for layer, chosen in before.items():
            layer.chosen = chosen
    if all(y.dim() == 2 for y in outputs):
        widest = max(y.shape[1] for y in outputs)
        outputs = [nn.functional.pad(y, (0, widest - y.shape[1]), value=-torch.inf) for y in outputs]
    return torch.cat(outputs).index_select(0, torch.cat(samples).argsort())


def merge_task(model: nn.Module, task: str | None) -> nn.Module:
    """A copy of the model in plain torch, which computes what the task does and knows no other; None for the base.

    Its parameters ask for gradients.

    Raises:
        ValueError: there is no such task.
    """
    if task is not None:
        _known(model, task)
    # Without the tasks' parts, which may be many.
    known = {id(layer): layer for layer in switched(model).values()}
    plain: dict[int, Any] = {}
    for key, layer in known.items():
        before, layer.chosen = layer.chosen, task
        plain[key] = layer.plain()
        layer.chosen = before
    merged = copy.deepcopy(model, plain)
    return merged.requires_grad_(True).train(model.training)


# What is found in a model.


def switched(model: nn.Module) -> dict[str, Switched]:
    """Return the layers that know tasks, by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Switched)}


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the base by their paths, as if nothing were switched; each once."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, Switched):
            inside.update(module.modules())
            yield name, module.base
        else:
            yield name, module


def _switch(model: nn.Module, paths: Collection[str]) -> None:
    """Put the layers at these paths, wherever they stand, into a ``Switched``."""
    made: dict[nn.Module, Switched] = {}
    for path in paths:
        layer = model.get_submodule(path)
        if not isinstance(layer, Switched):
            made[layer] = Switched(layer)
    for parent in list(model.modules()):
        if not isinstance(parent, Switched):
            for name, child in parent._modules.items():
                if child in made:
                    parent._modules[name] = made[child]


# What is refused.


def _known(model: nn.Module, task: str) -> None:
    if not tasks_of(model):
        raise ValueError(f"task: got {task!r}, but the model has no task: give it one by modulate or load_task")
    one_of("task", task, tasks_of(model))


def check_model(model: nn.Module) -> None:
    """Raise unless the model can be the base of tasks."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    if hasattr(model, "_orig_mod"):
        raise ValueError("model: got one that torch.compile made, expected the model inside it: compile afterwards")
    if isinstance(model, (*LAYERS, *NORMS)):
        raise ValueError(f"model: got a single {type(model).__name__}, expected a model around it")
    for path, module in model.named_modules():
        if isinstance(module, ReplacementLayer):
            raise ValueError(
                f"model: {path!r} runs on the weights of others, expected plain layers: call rl.merge first"
            )


def check_layers(layers: Mapping[str, nn.Module], paths: Iterable[str]) -> None:
    """Raise unless a task may stand in for the layers at these paths, which then do not run themselves."""
    for path in paths:
        layer: Any = layers[path]
        if isinstance(layer.weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"model: {path!r} has no weight yet: run the model once before it is modulated")
        hooks = [name for name in HOOKS if "state_dict" not in name and getattr(layer, name, None)]
        if hooks:
            raise ValueError(
                f"model: {path!r} has hooks ({', '.join(hooks)}), which a task would pass over, expected none: take "
                "them off before"
            )


def check_name(model: nn.Module, task: str) -> None:
    """Raise unless a new task of the model can have this name."""
    if not isinstance(task, str):
        raise TypeError(f"task: got {type(task).__name__}, expected a name")
    if not task or "." in task or hasattr(nn.ModuleDict(), task):
        raise ValueError(f"task: got {task!r}, expected a name without dots that is none of ModuleDict's own")
    if task in tasks_of(model):
        raise ValueError(f"task: got {task!r}, which the model has already, expected another name")


def _checked(
    model: nn.Module,
    kind: Any,
    rank: Any,
    targets: Any,
    norms: Any,
    head: Any,
    classifier: Any,
) -> Options:
    check_model(model)
    if kind is not None:
        one_of("kind", kind, KINDS)
    at_least("rank", rank, 1)
    one_of("norms", norms, get_args(Norms))
    if head is not None:
        at_least("head", head, 1)
    elif classifier is not None:
        raise ValueError(f"classifier: got {classifier!r} without head, expected the number of its classes there")
    layers = dict(layers_of(model))
    if head is not None:
        classifier = find_classifier(model, classifier)
    chosen = () if kind is None else chosen_layers(layers, targets, classifier)
    if kind is not None and KINDS[kind].convolutions_only:
        linear = [path for path in chosen if not is_convolution(layers[path])]
        if linear:
            raise ValueError(f"targets: got the linear layer {linear[0]!r} with kind {kind!r}, expected convolutions")
    options = Options(kind, rank, chosen, norms, classifier, head)
    check_layers(layers, options.replaced)
    if not options.replaced and not any(isinstance(layer, NORMS) for layer in layers.values()):
        raise ValueError("kind: got None without head, of a model without norms, which leaves nothing to a task")
    return options


def find_classifier(model: nn.Module, path: str | None = None) -> str:
    """Return the path of the model's last ``nn.Linear``, or of the one that is named.

    Raises:
        ValueError: there is none.
    """
    linear = [name for name, layer in layers_of(model) if type(layer) is nn.Linear]
    if path is not None:
        one_of("classifier", path, linear)
        return path
    if not linear:
        raise ValueError("head: got a number of classes, but the model has no linear layer to be replaced by a new one")
    return linear[-1]


def chosen_layers(layers: Mapping[str, nn.Module], targets: Any, classifier: str | None) -> tuple[str, ...]:
    """Return the paths that ``targets`` of :func:`modulate` stands for, the classifier's aside.

    Raises:
        ValueError: there is none, or one that cannot be modulated.
    """
    if isinstance(targets, str):
        one_of("targets", targets, TARGETS)
        found = [path for path, layer in layers.items() if type(layer) in TARGETS[targets] and path != classifier]
        if not found:
            what = {"conv": "convolution", "linear": "linear layer", "all": "convolution and no linear layer"}[targets]
            beside = f" besides {classifier}, the task's classifier" if targets != "conv" and classifier else ""
            raise ValueError(f"targets: got {targets!r}, but the model has no {what}{beside}")
        return tuple(found)
    found = list(dict.fromkeys(targets))
    if not found:
        raise ValueError("targets: got no path, expected one at least, or kind=None")
    for path in found:
        if type(layers.get(path)) not in LAYERS:
            got = type(layers[path]).__name__ if path in layers else "no module"
            names = ", ".join(kind.__name__ for kind in LAYERS)
            raise ValueError(f"targets: got {path!r}, which is {got}, expected one of {names}")
        if path == classifier:
            raise ValueError(f"targets: got {path!r}, which head={classifier!r} replaces, expected other layers")
    return tuple(found)
