"""What every call of a replaced layer does first, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import fx


def entered(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` after what every call of a replaced layer does first."""

    @wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._look_around()
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, fx.Proxy):
            # torch.fx traces into all layers but torch's own: a replaced one is one node, as a plain one is.
            tracer: Any = first.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return forward(self, *args, **kwargs)

    # torch.compile counts its graphs by code object: each kind of layer has one.
    made: Any = call
    made.__code__ = made.__code__.replace(co_name=forward.__name__)
    return call
