"""What a ``state_dict`` records of the modules that a replaced layer runs on, and checks when it is loaded.

It stands in the metadata that torch keeps beside a ``state_dict`` and hands to each module: no key more, and a file of
an earlier version, or one without metadata (safetensors), loads as it always did.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

from torch import nn

from rl_kernels.nn.standing import RunsOnOthers, paths_of

KEY = "runs_on"

Way = str | None
"""From a layer to what it runs on, as a path that begins with a dot a step up; None for what is in no model."""


def record(layer: RunsOnOthers, destination: Any, prefix: str) -> None:
    """Write down on what ``layer`` runs, and warn of what the model that is saved does not hold."""
    savers = _callers(nn.Module.state_dict.__code__, lambda variables: variables.get("destination") is destination)
    metadata = getattr(destination, "_metadata", None)
    if not savers or savers[-1] is layer or metadata is None or not layer.runs_on:
        return
    ways = _ways(layer, savers)
    metadata.setdefault(prefix[:-1], {})[KEY] = ways
    missing = _missing(layer, ways)
    if missing:
        warnings.warn(
            f"state_dict: {prefix[:-1] or 'the layer'} ({type(layer).__name__}) runs on {missing} outside "
            f"the {type(savers[-1]).__name__} that is saved: what is loaded from this file will compute something "
            "else. rl_kernels.check(model) names all; rebind the layer, or rl_kernels.merge before the model is cut",
            stacklevel=2,
        )


def compare(layer: RunsOnOthers, prefix: str, recorded: Any) -> str:
    """What stands against loading a layer that was saved with ``recorded``; empty where nothing does."""
    if recorded is None or not layer.runs_on:
        return ""
    loaders = _callers(nn.Module.load_state_dict.__code__, lambda variables: "self" in variables)
    if not loaders or loaders[-1] is layer:
        return ""
    name = prefix[:-1] or "the layer"
    ways = _ways(layer, loaders)
    missing = _missing(layer, recorded)
    if missing:
        warnings.warn(
            f"state_dict: {name} was saved without {missing}, on which it ran: it may compute something else here",
            stacklevel=2,
        )
    differ = len(recorded) != len(ways) or any(
        was != now for was, now in zip(recorded, ways, strict=True) if was is not None and now is not None
    )
    if differ:
        return (
            f"{name}: got a state_dict of a layer that runs on {_listed(recorded)}, expected one that runs on "
            f"{_listed(ways)}, as this one (seen from the layer, a dot a step up)."
        )
    return ""


def _missing(layer: RunsOnOthers, ways: Sequence[Way]) -> str:
    return ", ".join(layer.role(j) for j, way in enumerate(ways) if way is None)


def _listed(ways: Sequence[Way]) -> str:
    return ", ".join(way or "something unknown" for way in ways)


def _ways(layer: RunsOnOthers, holders: Sequence[nn.Module]) -> tuple[Way, ...]:
    """From ``layer`` to what it runs on, within the last of the modules that hold it."""
    standing = layer._standing
    if standing is not None and standing.is_within(holders) and standing.stands():
        return tuple(_way(standing.path, other) for other in standing.paths)
    paths = paths_of(holders[-1])
    own = paths.get(id(layer))
    if own is None:
        return (None,) * len(layer.runs_on)
    return tuple(_way(own, paths.get(id(module))) for module in layer.runs_on)


def _way(path: str, other: str | None) -> Way:
    if other is None:
        return None
    here, there = path.split("."), other.split(".")
    while len(here) > 1 and len(there) > 1 and here[0] == there[0]:
        here, there = here[1:], there[1:]
    return "." * len(here) + ".".join(there)


def _callers(code: CodeType, fits: Callable[[dict[str, Any]], bool]) -> list[Any]:
    """The modules whose method of that code is under way and ``fits``, the outermost last.

    torch tells a module nothing of the model that it is saved or loaded with.
    """
    found = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code and fits(frame.f_locals):
            found.append(frame.f_locals["self"])
        frame = frame.f_back  # type: ignore[assignment]
    return found
