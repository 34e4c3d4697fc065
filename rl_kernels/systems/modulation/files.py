"""What a task is, as a dictionary of tensors or a file: all that is stored, or sent, beside the shared network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rl_kernels.conversion.folder import safetensors
from rl_kernels.systems.modulation.modulating import (
    NORMS,
    Options,
    attach,
    check_layers,
    check_model,
    check_name,
    layers_of,
    make_parts,
    options_of,
    parts_of,
)
from rl_kernels.systems.modulation.modulators import KINDS
from rl_kernels.systems.modulation.switched import Own, Switched

FORMAT = "rl_kernels task 1"
"""Of a task's file."""


def task_state_dict(model: nn.Module, task: str) -> dict[str, Tensor]:
    """Return what a task holds: tensors by the path of the layer and a name, as ``layer1.0.conv1.left``.

    Raises:
        ValueError: the model has no such task.
    """
    return _state(parts_of(model, task))


def _state(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path, part in parts.items():
        kept = part.state_dict()
        if isinstance(part, Own) and not part.statistics:
            kept = {name: value.detach() for name, value in part.named_parameters()}
        state |= {f"{path}.{name}": value for name, value in kept.items()}
    return state


def load_task_state_dict(model: nn.Module, state: Mapping[str, Tensor], task: str) -> None:
    """Copy what :func:`task_state_dict` returned into a task that the model has.

    Raises:
        ValueError: tensors that are missing, too many, or of other shapes, as those of another rank; nothing is
            copied.
    """
    _fill(parts_of(model, task), state)


def _fill(parts: Mapping[str, nn.Module], state: Mapping[str, Tensor], where: str = "") -> None:
    mine = _state(parts)
    missing, strange = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
    if missing or strange:
        what = f"no {missing[0]!r}" if missing else f"{strange[0]!r}, which the task has not"
        raise ValueError(f"state: {where}got {what}, expected the {len(mine)} tensors of the task, and only those")
    for name, value in mine.items():
        if state[name].shape != value.shape:
            raise ValueError(
                f"state: {where}got shape {tuple(state[name].shape)} of {name!r}, expected {tuple(value.shape)}"
            )
    with torch.no_grad():
        for name, value in mine.items():
            value.copy_(state[name])


def save_task(model: nn.Module, task: str, path: str | Path) -> None:
    """Write a task to a file of safetensors, with what it was made of and the hash of the base that it belongs to.

    The file is written beside and renamed: there is the old or the new one, never half of it.

    Raises:
        ValueError: the model has no such task.
        ImportError: safetensors is not installed.
        RunError: the file cannot be written.
    """
    from rl_kernels.systems.runner.folder import write_whole

    options = options_of(model, task)
    about = {
        "format": FORMAT,
        "task": task,
        "base": base_hash(model, options),
        "options": json.dumps(options._asdict()),
    }
    state = {name: value.detach().cpu().contiguous() for name, value in task_state_dict(model, task).items()}
    content = safetensors("safetensors.torch").save(state, about)
    write_whole(Path(path), lambda file: file.write(content))


def load_task(model: nn.Module, path: str | Path, task: str | None = None) -> str:
    """Give the model a task of a file that :func:`save_task` wrote, and choose it.

    Args:
        model: the base, as it was before it had any task, or with other tasks.
        path: of the file.
        task: its name; None for the one that it was saved by.

    Returns:
        The task's name.

    Raises:
        ValueError: no such file, one of another base, or with other tensors than it says; the model is as it was.
        ImportError: safetensors is not installed.
    """
    check_model(model)
    about, state = _read(Path(path))
    options = _options(Path(path), about, state)
    name = about["task"] if task is None else task
    check_name(model, name)
    layers = dict(layers_of(model))
    missing = [each for each in options.replaced if each not in layers]
    if missing:
        raise ValueError(f"path: {path} is a task of another base: this model has no {missing[0]!r}")
    check_layers(layers, options.replaced)
    found = base_hash(model, options)
    if found != about["base"]:
        raise ValueError(
            f"path: {path} is a task of another base: of the weights it runs on the sha256 is {about['base'][:16]}..., "
            f"this model's is {found[:16]}..."
        )
    parts = make_parts(model, options)
    _fill(parts, state, f"{path}: ")
    attach(model, parts, name)
    return str(name)


def base_hash(model: nn.Module, options: Options) -> str:
    """The sha256 of the base's tensors that a task runs on, with their names: all but its norms' and its classifier's.

    Those that a task has of its own do not count, so that a base with another classifier is the same base to it.
    """
    layers = dict(layers_of(model))
    own = {layers[options.classifier]} if options.classifier is not None else set()
    if options.norms == "own":
        own |= {layer for layer in layers.values() if isinstance(layer, NORMS)}
    # A layer in several places has as many names in a state_dict.
    everywhere = list(model.named_modules(remove_duplicate=False))
    places = {path for path, module in everywhere if isinstance(module, Switched)}
    replaced = [f"{path}." for path, module in everywhere if (module.base if path in places else module) in own]
    total = hashlib.sha256()
    for key, value in model.state_dict().items():
        parts = key.split(".")
        at = next((n for n in range(len(parts)) if ".".join(parts[:n]) in places), None)
        if at is not None:
            if parts[at] != "base":
                continue
            del parts[at]
        name = ".".join(parts)
        if name.startswith(tuple(replaced)) or not isinstance(value, Tensor):
            continue
        raw = value.detach().cpu().contiguous()
        total.update(f"{name} {raw.dtype} {tuple(raw.shape)}\n".encode())
        total.update(raw.reshape(-1).view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    return total.hexdigest()


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise ValueError(f"path: {path} is no file")
    package = safetensors("safetensors")
    try:
        with package.safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except package.SafetensorError as error:
        raise ValueError(f"path: {path} is no file of safetensors: {error}") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"path: {path} has format {about.get('format')!r}, expected {FORMAT!r} as save_task writes")
    missing = [name for name in ("task", "base", "options") if name not in about]
    if missing:
        raise ValueError(f"path: {path} does not say its {missing[0]!r}, expected a file that save_task wrote")
    return about, state


def _options(path: Path, about: Mapping[str, str], state: Mapping[str, Tensor]) -> Options:
    largest = max((size for value in state.values() for size in value.shape), default=0)
    try:
        read: Any = json.loads(about["options"])
        options = Options(**{**read, "layers": tuple(read["layers"])})
        if options.kind not in (None, *KINDS):
            raise ValueError(f"kind {options.kind!r}")
        if not isinstance(options.rank, int) or options.rank < 1:
            raise ValueError(f"rank {options.rank!r}")
        # Before anything of that size is made.
        for name, size in (
            ("rank", options.rank if options.kind is not None else 1),
            ("classes", options.classes or 1),
        ):
            if size > max(largest, 1):
                raise ValueError(f"{name} {size}, of which its tensors have no more than {largest}")
        return options
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: {path} does not say what its task is made of: {error}") from error
