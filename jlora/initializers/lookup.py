"""From whatever `Rule(init=)` accepts to an `Initializer`."""

from __future__ import annotations

from collections.abc import Callable

from jlora import _checks, initializers
from jlora.initializers.base import FunctionInitializer, Initializer


def as_initializer(init: str | Initializer | Callable) -> Initializer:
    """Return the initializer that a name, a function or an initializer stands for."""
    if isinstance(init, Initializer):
        return init
    if isinstance(init, str):
        _checks.check_choice(init, list_names(), "init")
        return getattr(initializers, init)()

    if isinstance(init, type) or not callable(init):
        raise TypeError(
            f"`init` must be a name, an initializer or a function, got {init!r}. "
            "Write for example jlora.initializers.pissa()."
        )
    _check_hashable(init)
    return FunctionInitializer(init)


def list_names() -> tuple[str, ...]:
    """Return the names of the initializers of jlora: the functions of its package."""
    return tuple(name for name in initializers.__all__ if name.islower())


def _check_hashable(init: Callable) -> None:
    try:
        hash(init)
    except TypeError:
        raise TypeError(
            f"`init` must be hashable, got a {type(init).__name__} that is not. "
            "Use a function, or a frozen dataclass with __call__."
        ) from None
