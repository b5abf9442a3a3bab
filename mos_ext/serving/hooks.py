"""Where a model meets its bank: hooks of its layers, and the route that is in force, for whoever has entered it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .route import Layer, Route

# What stands for the routes that a caller has entered: a context is a thread's, or an asyncio task's.
_entered: ContextVar[tuple[object, ...]] = ContextVar("mos_ext routes", default=())


class Switch:
    """The route that is in force, where every layer finds it, and whose it is: threads take turns.

    Attributes:
        route: that which was entered last, of those that are open.
    """

    route: Route | None = None

    def __init__(self) -> None:
        self._turn, self._thread = threading.Lock(), 0  # a lock that any thread may release
        self._open: dict[object, Route] = {}
        self._last: object = None

    def is_here(self) -> bool:
        """Whether the caller has entered the route."""
        return self._last in _entered.get()

    @contextmanager
    def turn(self) -> Iterator[Callable[[Route], None]]:
        """Waits until no other thread has a route; yields what puts one in force, until the end.

        Raises:
            RuntimeError: another task of this thread has one; or, at the end, it was not the one that was in force.
        """
        me = object()
        if not self.is_here():
            if self._thread == threading.get_ident():
                raise RuntimeError("a route must end before another task of its thread enters one: await nothing in it")
            self._turn.acquire()
            self._thread = threading.get_ident()

        def put(route: Route) -> None:
            self._open[me] = route
            self._look()
            _entered.set((*_entered.get(), me))

        try:
            yield put
        finally:
            in_order = self._last is me or me not in self._open
            self._open.pop(me, None)
            self._look()
            _entered.set(tuple(other for other in _entered.get() if other is not me))
            if not self._open:
                self._thread = 0
                self._turn.release()
        if not in_order:
            raise RuntimeError("a route must end before those that it was entered in, which have computed its adapters")

    def _look(self) -> None:
        self._last = next(reversed(self._open), None)
        self.route = self._open.get(self._last)


class Served:
    """A hook of a linear: adds what the adapters of a batch's rows make of x, while there is a route.

    Attributes:
        switch: shared by all of a bank.
    """

    def __init__(self, switch: Switch, layer: Layer) -> None:
        self.switch, self.layer = switch, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        route = self.switch.route
        if route is None or not route.has(self.layer) or not _is_here(self.switch):
            return None
        if not args:
            raise RuntimeError(f"x must be a {type(module).__name__}'s first argument inside a route, got a named one")
        return route.add(self.layer, args[0], y)

    def __reduce__(self) -> tuple[Any, ...]:
        return _of_a_copy, ()  # which has no bank


class ServedExperts:
    """The forward of experts: of the base alone, or with the adapters of a batch's rows."""

    def __init__(self, switch: Switch, module: nn.Module, layers: Mapping[str, Layer]) -> None:
        self.switch, self.module, self.layers = switch, module, dict(layers)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        route = self.switch.route
        if route is None or not any(map(route.has, self.layers.values())) or not _is_here(self.switch):
            return type(self.module).forward(self.module, *args, **kwargs)
        return route.run_experts(self.module, self.layers, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (type(self.module).forward, self.module)  # of a copy, that of its class


def _of_a_copy() -> Callable[..., None]:
    return _nothing


def _nothing(module: nn.Module, args: Any, y: Any) -> None:
    """The hook that a copy of a model gets in place of its bank's."""


def _is_here(switch: Switch) -> bool:
    """Whether the caller is in the route. (A tracer cannot ask, and what it made is called inside the route.)"""
    return torch.compiler.is_compiling() or switch.is_here()
