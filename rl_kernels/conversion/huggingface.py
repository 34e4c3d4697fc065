"""What a saved model of transformers has beside its weights, its configuration; and how a model is built from it.

Saving imports nothing of transformers, which is there where a model of it is.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from rl_kernels.conversion.folder import CONFIG, GENERATION_CONFIG
from rl_kernels.conversion.zoo import import_transformers


def is_huggingface(model: object) -> bool:
    """Whether ``model`` is one of transformers', or a class of these."""
    known = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if known is None:
        return False
    return issubclass(model, known) if isinstance(model, type) else isinstance(model, known)


def named(model: nn.Module) -> tuple[str, str]:
    """The class of ``model`` and its module, past the class that FSDP2 derives from it."""
    kind = next(base for base in type(model).__mro__ if not base.__module__.startswith("torch.distributed.fsdp"))
    return kind.__module__, kind.__qualname__


def write_configs(model: Any, folder: Path) -> None:
    """Write the configurations of a model of transformers, as its own ``save_pretrained`` does."""
    config = copy.deepcopy(model.config)
    config.architectures = [named(model)[1]]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def build_by_config(folder: Path, build: Any = None) -> Any:
    """The plain model of the configuration in ``folder``.

    Args:
        folder: of a saved model.
        build: a class of transformers' models, or of its ``Auto`` classes; the class that was saved by default.

    Raises:
        ValueError: no configuration there, or a class that transformers does not have.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"build: got {'none' if build is None else build.__name__}, and {folder} has no {CONFIG} of transformers; "
            "expected a function that makes the plain model, or that model"
        )
    transformers = import_transformers()
    if build is None:
        build = _saved_class(transformers, path)
    config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    model = build.from_config(config) if hasattr(build, "from_config") else build(config)
    if (folder / GENERATION_CONFIG).is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    return model


def _saved_class(transformers: Any, path: Path) -> Any:
    names = json.loads(path.read_text(encoding="utf-8")).get("architectures") or [None]
    found = getattr(transformers, str(names[0]), None)
    if not is_huggingface(found):
        raise ValueError(
            f"build: got none, and transformers has no model {names[0]}, which {path} names; expected a function that "
            "makes the plain model, or that model"
        )
    return found
