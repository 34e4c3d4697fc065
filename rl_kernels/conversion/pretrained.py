"""Replaced models saved to a folder, and loaded from it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rl_kernels._version import __version__
from rl_kernels.conversion import folder as files
from rl_kernels.conversion.checking import check
from rl_kernels.conversion.checkpoints import rehearse
from rl_kernels.conversion.huggingface import build_by_config, is_huggingface, named, write_configs
from rl_kernels.conversion.inventory import Inventory, bare, make_anew, take
from rl_kernels.conversion.memory import parse_bytes
from rl_kernels.nn import Coefficients, ReplacementLayer
from rl_kernels.nn.adapters import full_name, has_adapters

_FORMAT = 2
"""1 knows whole sources, and the granularities "scalar" and "channel". What it can say is written so."""

Build = Callable[[], nn.Module] | nn.Module | type | None

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def save_pretrained(model: nn.Module, folder: str | Path, *, max_shard_size: int | str = "5 GB") -> None:
    """Save a replaced model to a folder, from which ``load_pretrained`` makes it again. Nothing is pickled.

    The folder gets ``model.safetensors`` (or several with an index, as Hugging Face names them): what the model's
    ``state_dict`` holds, coefficients included, tied tensors once; and ``rl_kernels.json``: what is replaced and by
    which layers, as the model is now and not as it was planned, and the versions that wrote it. A model of transformers
    adds its ``config.json`` and ``generation_config.json``: such a folder goes to a hub with
    ``huggingface_hub.upload_folder``, and ``AutoConfig`` reads it.

    What ``torch.compile`` and ``DistributedDataParallel`` put around a model is left out (of the latter, rank 0 alone
    writes). A model sharded by FSDP2 or tensor parallelism is gathered on the CPU of rank 0: all ranks call this, that
    one writes, and the others return before it is done.

    All is written beside and moved into place at the end. Other files in the folder stay; an older save there is
    replaced whole, or stays as it is where something fails.

    Args:
        model: after ``rl_kernels.replace``, or with layers wired by hand.
        folder: where to; made if it is not there.
        max_shard_size: the most bytes of weights a file, as an integer or text such as ``"5 GB"``.

    Raises:
        TypeError: another type of model.
        ValueError: a model without replaced layers, or with weights that are no plain tensors in memory: on the meta
            device, offloaded, quantised, with adapters; the message says which.
        RuntimeError: what a replaced layer runs on has left the model.
        OSError: the folder cannot be written. It is as it was then.
        ImportError: safetensors is not installed.
    """
    files.safetensors("safetensors")
    size = parse_bytes("max_shard_size", max_shard_size)
    inner = _unwrapped(model)
    _check_replaced(inner)
    check(inner)
    kept = inner.state_dict(keep_vars=True)
    _check_plain_tensors(inner, kept)
    inventory = take(inner)
    tied = _tied(kept)
    tensors = _gathered(inner, kept)
    if not _is_writer(model, tensors):
        return
    record = {
        "format": _FORMAT if inventory.is_newer else 1,
        "versions": {"rl_kernels": __version__, "torch": str(torch.__version__)},
        "model": ":".join(named(inner)),
        "replaced": inventory.as_dict(),
        "tied": tied,
        "unsaved_buffers": _unsaved_buffers(inner),
    }
    with files.exchanged(Path(folder)) as new:
        files.write_weights(new, {bare(key): tensors[key] for key in tensors if bare(key) not in tied}, size, tied)
        if is_huggingface(inner):
            write_configs(inner, new)
        files.write_record(new, record)


def load_pretrained(
    folder: str | Path,
    build: Build = None,
    *,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a model that ``save_pretrained`` saved: make the plain model, replace as it was, load the weights strictly.

    The model is in the mode, training or evaluation, that ``build`` makes it in, and so is what is trainable in it;
    coefficients are trainable where a parameter of their layers was. Buffers that are in no ``state_dict`` have the
    values that ``build`` gives them. Tied weights are tied. Nothing in the folder is executed or imported, but for the
    class of transformers that its ``config.json`` names.

    Args:
        folder: where it was saved, or what ``huggingface_hub.snapshot_download`` returns.
        build: a function without arguments that makes the plain model, as its class is one; or that model, which is
            changed in place. For a folder with transformers' ``config.json`` also a class of its models, or an ``Auto``
            class; None for the class that was saved. A model on the meta device is filled, which saves the
            initialisation of a large one; buffers that are in no ``state_dict`` must hold values.
        device: where to; where ``build`` makes it by default.
        dtype: of parameters and buffers of floating-point numbers; as they were saved by default. Coefficients stay in
            float32 where it is shorter.

    Returns:
        The model.

    Raises:
        FileNotFoundError: the folder, or a file in it, is not there; or a save was cut short.
        ValueError: a damaged file, one of a newer version, no way to build the model, a built model that is replaced
            already or that what was saved does not fit. The message names layers and keys; a model that is given has
            no weights changed then.
        TypeError: ``build`` makes something else.
        ImportError: safetensors is not installed.
    """
    files.safetensors("safetensors")
    _check_options(build, device, dtype)
    path = Path(folder)
    saved = _Saved.read(path)
    weights = files.weight_files(path, saved.files)
    found = {key: tensor.to("meta") for file in weights for key, tensor in files.read_weights(file)}
    model = _built(path, build)
    try:
        make_anew(model, saved.inventory)
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix("model: ")
        raise ValueError(f"build: got {type(model).__name__}, expected the model saved in {path}: {reason}") from error
    _check_keys(model, path, _with_tied(found, saved.tied))
    _tie(model, saved.tied)
    _make_room(model, found, device, dtype)
    for file in weights:
        model.load_state_dict(_with_tied(dict(files.read_weights(file)), saved.tied), strict=False)
    _cast_unsaved(model, saved.unsaved_buffers if dtype is None else {})
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta and (device is None or torch.device(device).type != "meta"):
            raise ValueError(f"build: got a model with {name} on the meta device, which is in no file: build it there")
    return model if device is None else model.to(device)


@dataclass(frozen=True)
class _Saved:
    """The record of a saved model."""

    inventory: Inventory
    tied: dict[str, str]
    unsaved_buffers: dict[str, str]
    files: list[str]

    @classmethod
    def read(cls, folder: Path) -> _Saved:
        fields = files.read_record(folder)
        found = fields.get("format")
        if found not in (1, _FORMAT):
            by = fields.get("versions", {}).get("rl_kernels") if isinstance(fields.get("versions"), dict) else None
            raise ValueError(
                f"folder: got {folder}, saved in format {found!r} by rl_kernels {by}, expected format {_FORMAT} or 1: "
                f"this is rl_kernels {__version__}, and a newer one reads it"
            )
        try:
            inventory = Inventory.from_dict(fields["replaced"])
            return cls(inventory, dict(fields["tied"]), dict(fields["unsaved_buffers"]), list(fields["files"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"folder: got {folder / files.RECORD}, which does not read ({problem})") from error


# Saving.


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model within what computes nothing itself."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    while True:
        inner: Any = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _check_replaced(model: nn.Module) -> None:
    name = type(model).__name__
    if isinstance(model, ReplacementLayer):
        raise ValueError(f"model: got a {name} alone, expected a model that holds it")
    for path, module in model.named_modules():
        if has_adapters(module) or type(module).__module__.split(".")[0] == "peft":
            raise ValueError(
                f"model: got one with adapters ({full_name(module)} at {path or 'its root'}), expected them merged "
                "(merge_and_unload), or saved by peft beside the model that they are for"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError("model: got one in FullyShardedDataParallel, expected FSDP2: rl_kernels.distributed.shard")
    if not any(isinstance(module, ReplacementLayer) for module in model.modules()):
        raise ValueError(
            f"model: got {name} without replaced layers, expected one after replace: save a plain or merged model as "
            "any other"
        )


def _check_plain_tensors(model: nn.Module, kept: Mapping[str, Any]) -> None:
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    for key, value in kept.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"model: got {key} of type {type(value).__name__}, expected tensors only in the state_dict"
            )
        if value.is_meta:
            where = " (accelerate has offloaded it)" if offloaded else ""
            raise ValueError(f"model: got {key} on the meta device{where}, expected weights in memory")
        kind = type(value)
        plain = kind in (Tensor, nn.Parameter, nn.Buffer) or _is_distributed(value)
        if not plain or value.is_quantized or value.layout != torch.strided:
            raise ValueError(
                f"model: got {key} as {kind.__module__}.{kind.__qualname__} of {value.dtype} ({value.layout}), "
                "expected a plain tensor: quantise after loading"
            )


def _is_distributed(value: Tensor) -> bool:
    known = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return known is not None and isinstance(value, known)


def _gathered(model: nn.Module, kept: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors; those of a distributed model whole on rank 0, and none on the others."""
    if not any(_is_distributed(value) for value in kept.values()):
        return kept
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]


def _is_writer(model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return torch.distributed.get_rank() == 0
    return bool(tensors)


def _tied(kept: Mapping[str, Tensor]) -> dict[str, str]:
    """The further keys of tensors that have several, each with the first."""
    first: dict[int, str] = {}
    return {bare(key): bare(first[id(value)]) for key, value in kept.items() if first.setdefault(id(value), key) != key}


def _unsaved_buffers(model: nn.Module) -> dict[str, str]:
    """The dtypes of floating-point buffers that are in no ``state_dict``: a model that was cast casts them, too."""
    return {
        bare(f"{path}.{name}" if path else name): str(buffer.dtype).removeprefix("torch.")
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set and buffer.is_floating_point()
    }


# Loading.


def _built(folder: Path, build: Build) -> nn.Module:
    if isinstance(build, nn.Module):
        return build
    automatic = hasattr(build, "from_config") and getattr(build, "__module__", "").split(".")[0] == "transformers"
    if build is None or is_huggingface(build) or automatic:
        return build_by_config(folder, build)
    if not callable(build):
        raise TypeError(f"build: got {type(build).__name__}, expected a function that makes the plain model, or it")
    model = build()
    if not isinstance(model, nn.Module):
        raise TypeError(f"build: got one that makes {type(model).__name__}, expected an nn.Module")
    return model


def _check_options(build: Build, device: Any, dtype: Any) -> None:
    """Raise before anything is read or made."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {dtype!r}, expected a torch.dtype, as torch.bfloat16")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: got {dtype}, expected one of floating-point numbers")
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: got {device!r}, expected a device: {str(error).splitlines()[0]}") from error
    if build is None or isinstance(build, nn.Module) or is_huggingface(build) or hasattr(build, "from_config"):
        return
    try:
        parameters = inspect.signature(build).parameters.values()
    except (TypeError, ValueError):  # It says nothing of what it takes.
        return
    needed = [each.name for each in parameters if each.default is each.empty and each.kind not in _VARIADIC]
    if needed:
        name = getattr(build, "__name__", type(build).__name__)
        raise TypeError(
            f"build: got {name}, which needs {', '.join(needed)}, expected a function without arguments, as "
            f"lambda: {name}(...)"
        )


def _with_tied(found: dict[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    return {**found, **{key: found[first] for key, first in tied.items() if first in found}}


def _check_keys(model: nn.Module, folder: Path, found: Mapping[str, Tensor]) -> None:
    """Raise unless ``found`` is what the model loads: asked of a twin without data, as modules may rename keys."""
    name = type(model).__name__
    try:
        missing, unknown = rehearse(model, found)
    except RuntimeError as error:
        raise ValueError(f"build: got {name}, expected the model saved in {folder}: {error}") from error
    sides = (("has no place for", unknown), ("is not given", missing))
    problems = [f"it {verb} {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}" for verb, keys in sides if keys]
    if problems:
        raise ValueError(f"build: got {name}, expected the model saved in {folder}: {'; '.join(problems)}")


def _tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Let one parameter stand at every place where one stood, also where ``build`` does not tie them."""
    for key, first in tied.items():
        (path, _, name), (first_path, _, first_name) = key.rpartition("."), first.rpartition(".")
        try:
            module, owner = model.get_submodule(path), model.get_submodule(first_path)
        except AttributeError:
            continue
        parameter = owner._parameters.get(first_name)
        if parameter is not None and module._parameters.get(name) is not None:
            _set_parameter(module, name, parameter)


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    if module._parameters[name] is parameter:
        return
    if hasattr(type(module), name):  # A property: nn.Module refuses to shadow it.
        module._parameters[name] = parameter
    else:
        setattr(module, name, parameter)  # Some, as nn.LSTM, take note.


def _make_room(model: nn.Module, found: Mapping[str, Tensor], device: Any, dtype: torch.dtype | None) -> None:
    """Give every tensor that is loaded the dtype and the place that it is to have; it stays the object that it is."""
    coefficients = {
        id(p) for module in model.modules() if isinstance(module, Coefficients) for p in module.parameters()
    }
    keys = {id(tensor): key for key, tensor in reversed(model.state_dict(keep_vars=True).items()) if key in found}
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in list(held.items()):
                if tensor is None or id(tensor) not in keys:
                    continue
                saved = found[keys[id(tensor)]].dtype
                wanted = saved if dtype is None or not saved.is_floating_point else dtype
                if id(tensor) in coefficients and wanted in (torch.float16, torch.bfloat16):
                    wanted = saved
                _put_room(module, name, tensor, wanted, device, made)


def _put_room(
    module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, device: Any, made: dict[int, Tensor]
) -> None:
    where = torch.device(device) if device is not None else tensor.device
    if device is None and where.type == "meta":
        where = torch.device("cpu")
    if id(tensor) not in made:
        if tensor.dtype == dtype and tensor.device == where:
            return
        room = torch.empty_like(tensor, dtype=dtype, device=where)
        if not tensor.is_meta:
            tensor.data = room
            return
        if isinstance(tensor, nn.Parameter):
            room = nn.Parameter(room, tensor.requires_grad)
            vars(room).update(vars(tensor))
        made[id(tensor)] = room
    if isinstance(tensor, nn.Parameter):
        _set_parameter(module, name, made[id(tensor)])  # type: ignore[arg-type]
    else:
        module._buffers[name] = made[id(tensor)]


def _cast_unsaved(model: nn.Module, dtypes: Mapping[str, str]) -> None:
    buffers = dict(model.named_buffers())
    for name, dtype in dtypes.items():
        wanted = getattr(torch, dtype, None)
        buffer = buffers.get(name)
        if buffer is not None and isinstance(wanted, torch.dtype) and buffer.dtype != wanted:
            buffer.data = buffer.data.to(wanted)
