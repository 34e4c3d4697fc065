"""The folder of a saved model: its files, how they take the place of an older save's, and how they are read."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

RECORD = "rl_kernels.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_OURS = re.compile(rf"{_WEIGHTS.pattern}|{re.escape(INDEX)}")
_TEMPORARY = ".rl_kernels-"
_BEFORE = "before"


def safetensors(part: str) -> Any:
    """The package of that name or a module of it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return import_module(part)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "safetensors":
            raise
        raise ImportError(
            "save_pretrained and load_pretrained need the package safetensors: pip install safetensors"
        ) from error


@contextmanager
def exchanged(folder: Path) -> Iterator[Path]:
    """A new folder to write into: at the end its files are moved into ``folder``, in place of an older save's.

    Whatever else ``folder`` holds stays. Where writing or moving fails, it is as it was before. A process that is
    killed while files are moved leaves a folder without record, which does not load, and the older save within it.

    Raises:
        OSError: it cannot be written.
    """
    there = folder.exists()
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder))
        yield temporary
        _move(folder, temporary)
    except (OSError, safetensors("safetensors").SafetensorError) as error:
        state = "it holds what it held before" if there else "there is none, as before"
        if temporary is not None and _holds_files(temporary / _BEFORE):
            state = f"what it held is in {temporary / _BEFORE}"
        raise OSError(f"folder: {folder} could not be written, and {state}: {error}") from error
    finally:
        # What could not be put back is all that is left of the older save.
        if temporary is not None and not _holds_files(temporary / _BEFORE):
            shutil.rmtree(temporary, ignore_errors=True)
        if not there:
            with suppress(OSError):  # Not empty: all went well.
                folder.rmdir()


def _move(folder: Path, new: Path) -> None:
    before = new / _BEFORE
    coming = sorted((path.name for path in new.iterdir()), key=lambda name: (name == RECORD, name))
    ours = {*coming, RECORD, *_written(folder)}
    going = sorted(name for name in os.listdir(folder) if name in ours or _OURS.fullmatch(name))
    going.sort(key=lambda name: name != RECORD)  # First, and last to come: without it a folder does not load.
    for name in going:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{name} is a folder there")
    before.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for source, target, names in ((folder, before, going), (new, folder, coming)):
            for name in names:
                os.replace(source / name, target / name)
                moved.append((source / name, target / name))
    except BaseException:
        for source_path, target_path in reversed(moved):
            os.replace(target_path, source_path)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _written(folder: Path) -> set[str]:
    """The configurations that the older save in ``folder`` wrote, which a newer one need not have."""
    try:
        files = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
        return {CONFIG, GENERATION_CONFIG} & set(files)
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def write_weights(folder: Path, tensors: Mapping[str, Tensor], shard_size: int, metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` to one file, or to several of at most ``shard_size`` bytes with their index: as Hugging Face's.

    A tensor that is larger has a file to itself.
    """
    save_file = safetensors("safetensors.torch").save_file
    shards: list[list[str]] = [[]]
    room = shard_size
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and size > room:
            shards.append([])
            room = shard_size
        shards[-1].append(name)
        room -= size
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(_apart({name: tensors[name] for name in names}), folder / file, metadata={"format": "pt", **metadata})
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each dense and by itself in memory, as a file needs them."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().cpu().contiguous()
        memory = dense.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != dense.numel() * dense.element_size():
            dense = dense.clone()
        seen.add(dense.untyped_storage().data_ptr())
        found[name] = dense
    return found


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write ``fields`` as JSON."""
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def write_record(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write the record, which names the other files; and let all be read by whom it can be read by."""
    others = sorted(path.name for path in folder.iterdir())
    write_json(folder / RECORD, {**fields, "files": others})
    mode = (folder / RECORD).stat().st_mode
    for name in others:
        os.chmod(folder / name, mode)  # safetensors makes files for their owner alone.


def read_record(folder: Path) -> dict[str, Any]:
    """The record of the model that is saved in ``folder``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none of this package's.
    """
    path = folder / RECORD
    if not path.is_file():
        broken = next((found for found in folder.glob(f"{_TEMPORARY}*/{_BEFORE}") if _holds_files(found)), None)
        where = "" if broken is None else f" (a save was cut short there: {broken} holds what was there before)"
        raise FileNotFoundError(
            f"folder: got {folder} without {RECORD}{where}, expected what rl_kernels.save_pretrained wrote"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"folder: got {path}, which is no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"folder: got {path}, which is no record of a saved model")
    return fields


def weight_files(folder: Path, files: Iterable[object]) -> list[Path]:
    """Those of a record's ``files`` that hold weights.

    Raises:
        FileNotFoundError: one is missing.
    """
    names = [name for name in files if isinstance(name, str) and _WEIGHTS.fullmatch(name)]
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder: got {folder} without {name}, which {RECORD} names")
    return [folder / name for name in names]


def read_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, one after the other.

    Raises:
        ValueError: the file is damaged.
    """
    module = safetensors("safetensors")
    try:
        with module.safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
    except module.SafetensorError as error:
        raise ValueError(f"folder: got {path}, which is no whole safetensors file: {error}") from error
