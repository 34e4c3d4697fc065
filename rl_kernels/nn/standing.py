"""Where a replaced layer and what it runs on stand in a model, and whether they still do.

A replaced layer refers to its sources without registering them. A source that leaves the model would be trained and
saved by nobody, unnoticed: so a layer knows where both stand, and every call looks whether they still do.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from rl_kernels.nn.adapters import check_adapters, full_name, has_adapters

Step = tuple["weakref.ref[nn.Module]", str, nn.Module]
"""A module, the name of a child in it, and the child."""


class RunsOnOthers(Protocol):
    """What is asked here of a replaced layer: see there."""

    _standing: Standing | None

    @property
    def runs_on(self) -> tuple[nn.Module, ...]: ...

    @property
    def sources(self) -> tuple[nn.Module, ...]: ...

    def role(self, j: int) -> str: ...

    def run_on(self, modules: Sequence[nn.Module]) -> None: ...

    def check_source(self, source: nn.Module, name: str) -> None: ...


def paths_of(model: nn.Module) -> dict[int, str]:
    """Where the modules of ``model`` stand, by their ids."""
    return {id(module): path for path, module in model.named_modules()}


class Standing:
    """The steps from a model to a replaced layer, and to each module that it runs on.

    The model is not kept alive by it. A copy of the model, or a pickle, stands in the copy.
    """

    __slots__ = ("_adapted", "_ends", "_steps", "path", "paths", "roots", "unsettled")

    def __init__(self, roots: Sequence[nn.Module], path: str, paths: Sequence[str]):
        self.roots = tuple(weakref.ref(root) for root in roots)
        """The modules that hold all of them, the outermost first and each a child of the one before."""
        self.path = path
        """Of the layer in the outermost."""
        self.paths = tuple(paths)
        """Of what it runs on."""
        self.unsettled = True
        """Whether the steps are still to be looked for: until the first call after copying."""
        self._steps: tuple[Step, ...] = ()
        self._ends: tuple[Step, ...] = ()
        self._adapted: tuple[tuple[nn.Module, Step], ...] = ()

    @classmethod
    def within(cls, root: nn.Module, path: str, paths: Sequence[str], modules: Sequence[nn.Module]) -> Standing:
        """Stand in ``root``: the layer at ``path``, the ``modules`` that it runs on at ``paths``, or in wrappers there.

        Raises:
            RuntimeError: a wrapper with adapters that are neither merged nor disabled.
        """
        ways = [_steps(root, where) for where in (path, *paths)]
        line = [root]
        for steps in zip(*(way[:-1] for way in ways), strict=False):
            if len({id(child) for _, _, child in steps}) > 1:
                break
            line.append(steps[0][2])
        made = cls(line, path, paths)
        made._steps = tuple({(id(step[0]()), step[1]): step for way in ways for step in way}.values())
        made._ends = tuple(way[-1] for way in ways[1:])
        ends = zip(modules, made._ends, strict=True)
        made._adapted = tuple((module, end) for module, end in ends if end[2] is not module)
        made.unsettled = False
        return made

    def stands(self) -> bool:
        """Whether all stand where they stood."""
        if self.unsettled:
            return False
        for reference, name, child in self._steps:
            parent = reference()
            if parent is None or parent._modules.get(name) is not child:
                return False
        return True

    def holds(self) -> bool:
        """``stands``, and that adapters around a source leave its weight as it is: asked at every call.

        Raises:
            RuntimeError: adapters that are neither merged nor disabled now.
        """
        if not self.stands():
            return False
        for module, (reference, name, _) in self._adapted:
            parent = reference()
            assert parent is not None
            check_adapters(module, parent, name)
        return True

    def ends_hold(self, modules: Sequence[nn.Module]) -> None:
        """What ``torch.compile`` traces and guards instead: adapters that stand between a holder and what it held.

        Raises:
            RuntimeError: adapters around a source that are neither merged nor disabled now.
        """
        for module, (reference, name, _) in zip(modules, self._ends, strict=False):
            parent = reference()
            if parent is not None and parent._modules.get(name) is not module:
                check_adapters(module, parent, name)

    def is_within(self, modules: Sequence[nn.Module]) -> bool:
        """Whether one of ``modules`` holds the layer and all that it runs on, as far as is known."""
        return any(reference() is module for reference in self.roots for module in modules)

    def root(self, layer: object) -> tuple[nn.Module, int] | None:
        """The outermost of the roots that still is, and still holds ``layer``; and its number."""
        for depth, reference in enumerate(self.roots):
            root = reference()
            if root is not None and any(module is layer for module in root.modules()):
                return root, depth
        return None

    def seen_from(self, depth: int) -> list[str]:
        """``paths`` from the root of that number."""
        return [_below(path, depth) for path in self.paths]

    def _in(self, root: nn.Module, depth: int) -> Standing:
        return Standing([root], _below(self.path, depth), self.seen_from(depth))

    def __deepcopy__(self, memo: dict[int, Any]) -> Standing:
        for depth, reference in enumerate(self.roots):
            root = reference()
            # Of what holds the layer, the copy is made before that of the layer, though not yet its children.
            if root is not None and id(root) in memo:
                return self._in(memo[id(root)], depth)
        return Standing([], self.path, self.paths)  # A part was copied, and with it what it runs on, for itself.

    def __getstate__(self) -> dict[str, Any]:
        alive = [(depth, root) for depth, reference in enumerate(self.roots) if (root := reference()) is not None]
        if not alive:
            return {"roots": (), "path": self.path, "paths": self.paths}
        depth, root = alive[-1]  # The innermost: a part is pickled with no more than it needs.
        inner = self._in(root, depth)
        return {"roots": (root,), "path": inner.path, "paths": inner.paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Standing.__init__(self, **state)


def _steps(root: nn.Module, path: str) -> list[Step]:
    steps: list[Step] = []
    for name in path.split("."):
        child = root._modules[name]
        assert child is not None
        steps.append((weakref.ref(root), name, child))
        root = child
    return steps


def _below(path: str, depth: int) -> str:
    return ".".join(path.split(".")[depth:])


# What torch puts around a module without changing what it computes holds it under one of these names.
TRANSPARENT = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}

_WHAT_TO_DO = (
    "expected all to stay in one model: call rebind with what is to be mixed now, or rl_kernels.merge before the model "
    "is changed"
)


def found_again(standing: Standing, layer: RunsOnOthers) -> Standing | None:
    """Where ``layer`` and what it runs on stand now that not all stand where they stood.

    What was moved or wrapped within the model is followed, and so is a source that was converted and kept its
    parameters (or became an ``nn.SyncBatchNorm``).

    Returns:
        The new standing; None, after a warning, where no model is known any more.

    Raises:
        RuntimeError: what the layer runs on has left its model, or stands within something that computes otherwise.
    """
    found = standing.root(layer)
    if found is None:
        warnings.warn(
            f"{standing.path} ({type(layer).__name__}): the model in which it stood with what it runs on is gone, or "
            "it was copied without that. What it runs on may be in no model now, and is neither trained nor saved "
            "then: rl_kernels.check(model) tells",
            stacklevel=4,
        )
        return None
    root, depth = found
    paths = paths_of(root)
    modules, places = list(layer.runs_on), standing.seen_from(depth)
    for j, module in enumerate(modules):
        there = _at(root, places[j])
        if id(module) in paths:
            places[j] = _within_wrapper(module, there, places[j], paths[id(module)])
        elif (successor := _successor(layer, module, there)) is not None:
            modules[j] = successor
        else:
            now = f"there stands {full_name(there)} now" if there is not None else "nothing stands there now"
            raise RuntimeError(
                f"{layer.role(j)}: got a {type(module).__name__} that {paths[id(layer)] or 'a layer'} runs on and "
                f"that has left {places[j]} of {type(root).__name__} ({now}): it is neither trained nor saved; "
                f"{_WHAT_TO_DO}"
            )
    layer.run_on(modules)
    return Standing.within(root, paths[id(layer)], places, modules)


def _at(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _within_wrapper(module: nn.Module, there: nn.Module | None, place: str, path: str) -> str:
    """The path of ``module``; its old place where adapters stand there, which are asked at each call."""
    if there is None or there is module or all(inner is not module for inner in there.modules()):
        return path
    if has_adapters(there):
        return place
    between = path.removeprefix(f"{place}.").split(".")
    if not set(between) <= TRANSPARENT:
        raise RuntimeError(
            f"sources: got a {type(module).__name__} that was put into {full_name(there)} at {place}, whose own "
            "computation the mix of its weight would leave out; expected it by itself: call rebind if its weight "
            "alone is to be mixed"
        )
    return path


def _successor(layer: RunsOnOthers, module: nn.Module, there: nn.Module | None) -> nn.Module | None:
    """What stands in the place of a source and is the same in another form."""
    if there is None or module not in layer.sources:
        return None
    parameters = {id(parameter) for parameter in module.parameters()}
    kept = bool(parameters) and parameters == {id(parameter) for parameter in there.parameters()}
    synchronised = isinstance(there, nn.SyncBatchNorm) and not isinstance(module, nn.SyncBatchNorm)
    if not kept and not synchronised:
        return None
    try:
        layer.check_source(there, "sources")
    except (TypeError, ValueError):
        return None
    return there
