"""ReplacementByForward, for layers of any class: it runs the class's own forward on the mixed parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from rl_kernels import functional as F
from rl_kernels.nn.adapters import HOOKS, full_name, has_adapters, hook_that_makes
from rl_kernels.nn.belongings import Unregistered
from rl_kernels.nn.layer import ReplacementLayer

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ReplacementByForward(ReplacementLayer):
    """Any layer on the mixed parameters of others of its class: their class's own forward is run on the mix.

    For what is no plain torch layer: norms of other libraries, convolutions that standardise their weight first,
    ``nn.Linear`` with another forward. Every parameter is mixed by the same coefficients, as a whole tensor: what other
    replaced layers never do. A mixed vector costs nothing worth naming; a mixed matrix is stored while the forward
    runs, and for its backward where that needs it (``numbers_stored``). The model saves its parameters all the same.

    The layer has ``own``'s buffers (its own copy, under their names) and its modules without parameters, such as an
    activation; those of the first source without ``own``, with fresh running statistics. It has ``own``'s settings as
    attributes, too. What ``own`` is and does otherwise stays behind: its hooks, and methods beside ``forward``.
    It must not be called by two threads at once.

    Shape: as the class's.

    Args:
        sources: as ``ReplacementLayer``'s: of one class, none of which ``why_not_wrapped`` says something.
        own: as ``ReplacementLayer``'s, of the sources' class.
        options: as ``ReplacementLayer``'s. ``init="fit"`` fits all parameters but vectors, or all where there are
            only these. Granularity ``"channel"`` has one coefficient per source and entry of the first
            dimension, which all parameters must share.

    Raises:
        TypeError: a source that is replaced itself.
        ValueError: sources that cannot be mixed, or an unknown option; the message says why.
    """

    source_type = ()

    keeps_belongings = True

    def __init__(self, sources: Sequence[nn.Module], *, own: nn.Module | None = None, **options: Any):
        super().__init__(sources, own=own, **options)
        shell = _shell_of(sources[0] if own is None else own)
        reset = getattr(shell, "reset_running_stats", None)
        if own is None and reset is not None:
            reset()
        self._shell = Unregistered(shell)
        self._mixed_names = tuple(_parameters(shell))
        # One dict for both, so that what the shell's forward writes, and what moves or loads this layer, is one thing.
        self._buffers = shell._buffers
        self._non_persistent_buffers_set = shell._non_persistent_buffers_set
        for name, child in shell.named_children():
            self.add_module(name, child)

    @staticmethod
    def main_weight(source: nn.Module) -> Tensor:
        """The first of the parameters with most dimensions."""
        return max(_parameters(source).values(), key=lambda parameter: parameter.dim())

    @classmethod
    def why_not_by_channel(cls, source: nn.Module) -> str:
        """All parameters must share their first dimension."""
        sizes = {tuple(parameter.shape[:1]) for parameter in _parameters(source).values()}
        return "its parameters do not share their first dimension" if len(sizes) > 1 or () in sizes else ""

    @classmethod
    def fit_pairs(cls, own: nn.Module, sources: Sequence[nn.Module]) -> list[tuple[Tensor, list[Tensor]]]:
        """All parameters that are more than vectors; all there are where none is."""
        parameters = _parameters(own)
        names = [name for name, parameter in parameters.items() if not _is_vector(parameter)] or list(parameters)
        found = ([_parameters(layer)[name] for layer in (own, *sources)] for name in names)
        return [(first, rest) for first, *rest in ([torch.atleast_1d(p) for p in group] for group in found)]

    @classmethod
    def signature(cls, layer: nn.Module) -> dict[str, Any]:
        """The class, parameter shapes, dtype, device; and of convolutions the groups."""
        groups = {"groups": layer.groups} if isinstance(layer, nn.modules.conv._ConvNd) else {}
        return {"class": full_name(layer), **super().signature(layer), **groups}

    @classmethod
    def check_source(cls, source: nn.Module, name: str) -> None:
        """Raise unless ``source`` is a layer that ``why_not_wrapped`` says nothing of."""
        if not isinstance(source, nn.Module) or isinstance(source, ReplacementLayer):
            which = ", which is itself replaced" if isinstance(source, ReplacementLayer) else ""
            raise TypeError(f"{name}: got {type(source).__name__}{which}; expected a plain layer")
        if reason := why_not_wrapped(source):
            raise ValueError(f"{name}: got {full_name(source)}, which cannot be mixed: {reason}")

    def reset_parameters(self) -> None:
        """Start anew: coefficients at their initial values, no batch seen."""
        super().reset_parameters()
        reset = getattr(self._shell[0], "reset_running_stats", None)
        if reset is not None:
            reset()

    def _evaluated(self, name: str) -> Tensor | None:
        tensors = self._tensors(name)
        if tensors is None or tensors[0].dim() > 0:
            return super()._evaluated(name)
        return F.mix([tensor.reshape(1) for tensor in tensors], self.coefficients).reshape(())

    def _all_mixed(self) -> dict[str, Tensor]:
        mixed = ((name, self._evaluated(name)) for name in self._mixed_names)
        return {name: tensor for name, tensor in mixed if tensor is not None}

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The class's own forward on the mixed parameters."""
        shell = self._shell[0]
        placeholders = dict(shell._parameters)
        # By hand: compiled, torch.func.functional_call forgets the buffers that a forward puts in the old ones' places.
        shell._parameters.update(self._all_mixed())
        try:
            return shell(*inputs, **options)
        finally:
            shell._parameters.update(placeholders)

    def train(self, mode: bool = True) -> ReplacementByForward:
        """Set the mode of the layer, and so of the forward that it runs."""
        self._shell[0].training = mode
        return super().train(mode)

    def __getattr__(self, name: str) -> Any:
        """A mixed parameter, evaluated at each access, or a setting of the layer that was replaced."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            shell = vars(self).get("_shell")
            if shell is None or name.startswith("_"):  # Half unpickled; or nn.Module's own.
                raise
            if name in self._mixed_names:
                return self._mixed(name)
            if name in vars(shell[0]):
                return vars(shell[0])[name]
            raise

    def merged(self) -> nn.Module:
        """A layer of the replaced class that computes the same, with a copy of the buffers."""
        self._look_around()
        layer = copy.deepcopy(self._shell[0])
        for name, value in self._all_mixed().items():
            layer._parameters[name] = nn.Parameter(value.detach(), requires_grad=self._trained)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """The class and its settings, sources and options, for printing."""
        shell = self._shell[0]
        settings = ", ".join(part for part in (type(shell).__name__, shell.extra_repr()) if part)
        return f"{settings}, {super().extra_repr()}"


def why_not_wrapped(module: nn.Module) -> str:
    """Why ``ReplacementByForward`` cannot stand in for ``module``, or be mixed from it; empty where it can."""
    parameters = _parameters(module)
    if isinstance(module, ReplacementLayer):
        return "it is itself replaced"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by torch.jit"
    if has_adapters(module):
        return f"it has adapters ({full_name(module)})"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "it looks up a few rows, and all of them would be mixed"
    if not parameters:
        return "it has no parameters of its own"
    if any(True for child in module.children() for _ in child.parameters()):
        return "modules in it have parameters"
    if "forward" in vars(module):
        return "its forward is not its class's"
    for name, parameter in parameters.items():
        if isinstance(parameter, UninitializedParameter):
            return f"its {name} is uninitialised"
        if parameter.dtype not in _DTYPES:
            return f"its {name} is {parameter.dtype}"
    hook = hook_that_makes(module)
    if hook is not None:
        return f"{type(hook).__name__} of {type(hook).__module__} makes its {getattr(hook, 'name', 'weight')}"
    for name in module._modules:
        if name == "mixing" or hasattr(ReplacementByForward, name):
            return f"its {name} has a name that replaced layers use"
    return _why_entangled(module, parameters)


def numbers_stored(module: nn.Module) -> int:
    """How many numbers of a mix ``ReplacementByForward`` stores while it runs in ``module``'s place.

    Vectors do not count: 0 for a norm.
    """
    return sum(parameter.numel() for parameter in _parameters(module).values() if not _is_vector(parameter))


def _is_vector(parameter: Tensor) -> bool:
    """Whether it is one but for dimensions of 1, as ``(channels, 1, 1)`` is; or a number."""
    return sum(size > 1 for size in parameter.shape) <= 1


def _why_entangled(module: nn.Module, parameters: dict[str, nn.Parameter]) -> str:
    """What else refers to the parameters, past which a forward would read them, and to modules beside the layer."""
    own = {id(parameter) for parameter in parameters.values()}
    for name, value in vars(module).items():
        if name in ("_parameters", "_modules", "_buffers"):
            continue
        for held in _held(value):
            if id(held) in own:
                return f"it holds its parameters twice, as {name}"
            if isinstance(held, nn.Module):
                return f"it refers to another module, as {name}"
            if isinstance(held, Tensor) and not held.is_leaf:
                return f"it holds a tensor that autograd made, as {name}"
    return ""


def _held(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple | dict):
        yield from value.values() if isinstance(value, dict) else value
    else:
        yield value


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``module`` itself, by name."""
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def _shell_of(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with parameters on the meta device, without hooks."""
    # Told that these are the copies of the parameters, deepcopy copies none.
    known: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in _parameters(module).values()
    }
    shell = copy.deepcopy(module, known)
    for hooks in HOOKS:
        getattr(shell, hooks).clear()
    return shell
