"""The choice of an implementation: the first that can run and is a gain."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax

from jlora import _checks
from jlora._types import Tree

PLATFORMS = ("cpu", "cuda", "tpu")


class Implementation(NamedTuple):
    """One way to compute an operation. All ways give the same result.

    The functions take the arrays of the operation, then its static settings.
    """

    name: str
    why_not: Callable[..., str | None]  # why it cannot take the arguments; None: it can
    # (platform, *arguments) -> whether it is faster than the implementations after it
    is_gain: Callable[..., bool]
    run: Callable[..., Tree]


def run_first(
    implementations: Sequence[Implementation],
    name: str | None,
    arrays: tuple[Tree, ...],
    *static: Hashable,
) -> Tree:
    """Return the result of the chosen implementation for `arrays`.

    The platform is known only when the program is lowered. Each platform gets its own
    choice, and the compiled program holds one.

    Args:
        implementations: of one operation, the preferred ones first.
        name: of the implementation to run. None: choose one per platform.
        arrays: the arguments that are arrays or trees of arrays.
        *static: the static settings, passed after the arrays.
    """
    chosen = {
        platform: choose(implementations, name, platform, arrays, *static)
        for platform in PLATFORMS
    }
    default = choose(implementations, name, "other", arrays, *static)

    def bind(implementation: Implementation) -> Callable[..., Tree]:
        return lambda *arrays: implementation.run(*arrays, *static)

    if all(implementation is default for implementation in chosen.values()):
        return bind(default)(*arrays)
    branches = {
        platform: bind(implementation) for platform, implementation in chosen.items()
    }
    return jax.lax.platform_dependent(*arrays, default=bind(default), **branches)


def choose(
    implementations: Sequence[Implementation],
    name: str | None,
    platform: str,
    arrays: tuple[Tree, ...],
    *static: Hashable,
) -> Implementation:
    """Return the implementation of that name, or the first that can run and gains."""
    if name is not None:
        return find_named(implementations, name)
    return next(
        implementation
        for implementation in implementations
        if implementation.why_not(*arrays, *static) is None
        and implementation.is_gain(platform, *arrays, *static)
    )


def find_named(implementations: Sequence[Implementation], name: str) -> Implementation:
    """Return the implementation of that name, or refuse an unknown name."""
    names = tuple(implementation.name for implementation in implementations)
    _checks.check_choice(name, names, "implementation")
    return implementations[names.index(name)]


def check_usable(
    implementations: Sequence[Implementation],
    name: str | None,
    arrays: tuple[Tree, ...],
    *static: Hashable,
) -> None:
    """Refuse an implementation that was named but cannot take the arguments."""
    if name is None:
        return
    reason = find_named(implementations, name).why_not(*arrays, *static)
    if reason is not None:
        raise NotImplementedError(
            f"`implementation` must be one that can run here, got {name!r}, "
            f"which {reason}. Leave it out to have one chosen."
        )


def can_always(*arguments: Tree) -> None:
    """Return None, the `why_not` of an implementation that takes every argument."""
    return None


def name_platform() -> str:
    """Return the default platform of programs, by its name in `PLATFORMS`."""
    platform = jax.default_backend()
    return "cuda" if platform == "gpu" else platform
