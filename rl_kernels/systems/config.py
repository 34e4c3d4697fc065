"""What a training run is told: frozen dataclasses, filled from a preset, a YAML file and ``--set``, in this order.

jsonargparse checks types and refuses keys that do not exist; what a value must lie between is checked here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from rl_kernels.conversion.options import one_of

C = TypeVar("C", bound="Config")


@dataclass(frozen=True)
class Model:
    """The network.

    Attributes:
        name: of ``rl_kernels.systems.networks``, or of torchvision or timm, as ``torchvision/resnet50``.
        width: channels of the first stage, or of a token; None for the network's own.
        weights: to begin with, of the same network before anything was replaced in it: a run's folder (its last
            checkpoint) or a file of ``torch.save``; None begins at random.
    """

    name: str = "resnet32"
    width: int | None = None
    weights: str | None = None


@dataclass(frozen=True)
class Data:
    """The images.

    Attributes:
        name: of the registry, or a folder of images: ``FOLDER/train/CLASS/*.png`` and ``FOLDER/test`` or ``val``.
        root: where torchvision's sets lie; None for ``$RL_KERNELS_DATA``, or ``~/.cache/rl_kernels/data``.
        download: fetch a set of torchvision's that is not there.
        size: height and width that images are resized to; None leaves those of a set alone, and takes 224 for files
            (of which the middle is taken, at 256/224 of that size, where they are not cropped at random).
        augmentation: of training images: ``"crop"`` (padded by an eighth, moved), ``"crop-flip"``, ``"trivial"``
            (TrivialAugmentWide after crop-flip), ``"resized-crop"`` (ImageNet's, with flips), ``"none"``.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
        validation: share of the training images that is held out, and by which ``best.pt`` is chosen. 0 holds out
            none: ``best.pt`` goes by the test images then, and says nothing about unseen ones.
        limit: train on so many images only, as many of each class as of any other; None for all.
        workers: processes that prepare images; 0 for none.
    """

    name: str = "digits"
    root: str | None = None
    download: bool = False
    size: int | None = None
    augmentation: Literal["none", "crop", "crop-flip", "trivial", "resized-crop"] = "none"
    mixup: float = 0.0
    cutmix: float = 0.0
    validation: float = 0.0
    limit: int | None = None
    workers: int = 0


@dataclass(frozen=True)
class Optimizer:
    """How weights are updated.

    Attributes:
        name: ``"adamw"`` or ``"sgd"`` (Nesterov).
        learning_rate: the highest of the schedule.
        momentum: of SGD.
        weight_decay: of matrices and filters; biases, norms and mixing coefficients have none.
        coefficient_factor: the coefficients' learning rate, in multiples of the others'. (An option: the papers' could
            not be read.)
        clip: norm that all gradients together are clipped to; None for no clipping.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 5e-3
    momentum: float = 0.9
    weight_decay: float = 0.05
    coefficient_factor: float = 1.0
    clip: float | None = None


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves, step by step.

    Attributes:
        name: ``"cosine"`` (to zero), ``"multistep"`` or ``"constant"``.
        warmup: share of all steps in which the rate rises from a hundredth of its highest.
        milestones: shares of all steps at which ``"multistep"`` multiplies the rate by ``decay``.
        decay: see there.
    """

    name: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup: float = 0.2
    milestones: tuple[float, ...] = (0.5, 0.75)
    decay: float = 0.1


@dataclass(frozen=True)
class Runtime:
    """Where and how a run computes, which is not to change what it computes.

    Attributes:
        accelerator: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        devices: processes, one a device.
        strategy: ``"auto"``, ``"ddp"``, or ``"fsdp2"`` (``rl_kernels.distributed.shard``).
        precision: Lightning Fabric's: of numbers, or ``"-mixed"`` by autocast.
        threads: of a process, on a CPU; None for torch's own choice.
        compile: run the model through ``torch.compile``.
        channels_last: keep images and filters in this order.
        deterministic: ask torch for deterministic algorithms, which CUDA needs for runs to be equal.
        checkpoint_steps: write ``last.pt`` after so many steps, besides after every epoch; None for no more.
        tensorboard: write TensorBoard's files, too.
    """

    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 1
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"] = "32-true"
    threads: int | None = None
    compile: bool = False
    channels_last: bool = False
    deterministic: bool = False
    checkpoint_steps: int | None = None
    tensorboard: bool = False


@dataclass(frozen=True)
class Config:
    """A run of any system; a system's own config adds to it.

    Attributes:
        seed: of everything random: initial weights, order of images, augmentation, dropout, held-out images.
        epochs: passes over the training images.
        batch_size: images of an update, over all processes and accumulated parts; what is left of an epoch is dropped.
        accumulate: parts in which a process takes its share of a batch, one after the other.
        label_smoothing: of the cross-entropy.
        ema: decay of an average of the weights that is evaluated beside them; None for none.
    """

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    runtime: Runtime = field(default_factory=Runtime)
    seed: int = 0
    epochs: int = 10
    batch_size: int = 64
    accumulate: int = 1
    label_smoothing: float = 0.0
    ema: float | None = None

    def check(self) -> None:
        """Refuse values that no run can have.

        Raises:
            ValueError: one of them; the message names the field, the value and what was expected.
        """
        for name, least in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("seed", 0)):
            _within(name, getattr(self, name), least)
        _within("runtime.devices", self.runtime.devices, 1)
        _within("data.workers", self.data.workers, 0)
        for name, count in (
            ("model.width", self.model.width),
            ("data.size", self.data.size),
            ("data.limit", self.data.limit),
            ("runtime.threads", self.runtime.threads),
            ("runtime.checkpoint_steps", self.runtime.checkpoint_steps),
        ):
            if count is not None:
                _within(name, count, 1)
        for name, share in (
            ("data.validation", self.data.validation),
            ("schedule.warmup", self.schedule.warmup),
            ("label_smoothing", self.label_smoothing),
            ("ema", 0.0 if self.ema is None else self.ema),
            *((f"schedule.milestones[{i}]", share) for i, share in enumerate(self.schedule.milestones)),
        ):
            if not 0 <= share < 1:
                raise ValueError(f"{name}: got {share}, expected at least 0 and less than 1")
        for name, value in (
            ("optimizer.learning_rate", self.optimizer.learning_rate),
            ("optimizer.coefficient_factor", self.optimizer.coefficient_factor),
            ("optimizer.weight_decay", self.optimizer.weight_decay),
            ("data.mixup", self.data.mixup),
            ("data.cutmix", self.data.cutmix),
        ):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: got {value}, expected a number of at least 0")
        parts = self.runtime.devices * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size: got {self.batch_size}, expected a multiple of runtime.devices * accumulate, {parts}"
            )


def _within(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")


def fields_of(config: type[Config]) -> dict[str, str]:
    """Return the types of all fields of a config by their dotted names, as ``data.name``."""
    return {name: kind for name, kind in _fields(config())}


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{each.name}.")
        else:
            yield prefix + each.name, str(each.type)


def resolve(
    kind: type[C],
    presets: Mapping[str, Mapping[str, Any]],
    preset: str | None = None,
    path: str | Path | None = None,
    settings: Sequence[str] = (),
) -> C:
    """Make a config: its defaults, overlaid by a preset, by a YAML file, by settings.

    Args:
        kind: the system's config.
        presets: the system's, nested as the config is.
        preset: the name of one of them.
        path: of a YAML file, nested as the config is, or with dotted keys.
        settings: ``"key=value"`` each: a dotted name, or the last part of it where only one field has that
            (``learning_rate=0.1``). Values are YAML.

    Returns:
        The config, checked.

    Raises:
        ValueError: an unknown preset, key or value, or a file that is no YAML mapping; the message names it.
        FileNotFoundError: no such file.
    """
    import yaml

    names = list(fields_of(kind))
    flat: dict[str, Any] = {}
    if preset is not None:
        one_of("preset", preset, tuple(presets))
        flat |= flatten(presets[preset])
    if path is not None:
        try:
            read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"config: {path} is no YAML: {_where(error)}") from None
        if not isinstance(read, dict):
            raise ValueError(f"config: {path} holds {type(read).__name__}, expected a mapping of fields to values")
        flat |= {_named(key, names): value for key, value in flatten(read).items()}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"set: got {setting!r}, expected key=value")
        try:
            flat[_named(key.strip(), names)] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"set: {key}: {text!r} is no YAML: {_where(error)}") from None
    return parse(kind, flat)


def parse(kind: type[C], values: Mapping[str, Any]) -> C:
    """Make a config of type ``kind`` from values, nested or by dotted names, and check it.

    Raises:
        ValueError: an unknown key, or a value of another type; the message names it.
    """
    import jsonargparse

    names = list(fields_of(kind))
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "config", fail_untyped=False)
    nested: dict[str, Any] = {}
    for key, value in flatten(values).items():
        *rooms, leaf = _named(key, names).split(".")
        room = nested
        for name in rooms:
            room = room.setdefault(name, {})
        # YAML reads 1e-3 as text, which the parser would not.
        room[leaf] = _number(value)
    try:
        made = cast(C, parser.instantiate(parser.parse_object({"config": nested})).config)
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ValueError(f"config: {_in_words(str(error), kind, values)}") from None
    made.check()
    return made


def as_dict(config: Config) -> dict[str, Any]:
    """Return a config as nested plain values, which :func:`parse` reads."""
    plain = dataclasses.asdict(config)
    plain["schedule"]["milestones"] = list(plain["schedule"]["milestones"])
    return plain


def flat_dict(config: Config) -> dict[str, Any]:
    """Return a config's values by their dotted names."""
    return flatten(as_dict(config))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _named(key: str, names: Sequence[str]) -> str:
    """The dotted name that ``key`` stands for."""
    import difflib

    if key in names:
        return key
    ending = [name for name in names if name.endswith(f".{key}")]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise ValueError(f"config: {key!r} may be {' or '.join(ending)}: write it in full")
    known = dict.fromkeys([*names, *(name.rpartition(".")[2] for name in names)])
    near = difflib.get_close_matches(key, known, n=3)
    hint = f"; near to it: {', '.join(near)}" if near else ""
    raise ValueError(f"config: there is no {key!r}{hint}")


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _where(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: {error.problem}" if mark is not None else str(error)


def _in_words(message: str, kind: type[Config], values: Mapping[str, Any]) -> str:
    """Which field jsonargparse refuses, what came, and what its annotation says."""
    found = re.search(r'Parser key "config\.([\w.]+)"', message)
    types = fields_of(kind)
    if found is None or found[1] not in types:
        return "; ".join(line.strip() for line in message.splitlines() if line.strip()).replace("config.", "")
    given = {_named(key, list(types)): value for key, value in flatten(values).items()}
    return f"{found[1]}: got {given.get(found[1])!r}, expected {types[found[1]]}"
