"""The one loop that picks an implementation: for each platform the first that can run."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from jlora import _checks

PLATFORMS = ("cpu", "cuda", "tpu")


class Implementation(NamedTuple):
    """One way to compute a result; each way of an operation gives the same one."""

    name: str
    why_not: Callable[
        ..., str | None
    ]  # of the arguments: why it cannot take them; None: it can
    is_gain: Callable[
        ..., bool
    ]  # of (platform, *arguments): whether to prefer it to the next ones
    run: Callable


def run_first(implementations, name, arrays, *static):
    """Return what the chosen implementation gives for `arrays`, a tuple of arrays or trees.

    The platform is known when the program is lowered, not before: each gets its own choice,
    and the compiled program holds one.
    """
    chosen = {
        platform: choose(implementations, name, platform, arrays, *static)
        for platform in PLATFORMS
    }
    default = choose(implementations, name, "other", arrays, *static)

    def bind(implementation):
        return lambda *arrays: implementation.run(*arrays, *static)

    if all(implementation is default for implementation in chosen.values()):
        return bind(default)(*arrays)
    branches = {
        platform: bind(implementation) for platform, implementation in chosen.items()
    }
    return jax.lax.platform_dependent(*arrays, default=bind(default), **branches)


def choose(implementations, name, platform, arrays, *static):
    """Return the `Implementation` of that name, or the first that can run and is a gain."""
    if name is not None:
        return find_named(implementations, name)
    return next(
        implementation
        for implementation in implementations
        if implementation.why_not(*arrays, *static) is None
        and implementation.is_gain(platform, *arrays, *static)
    )


def find_named(implementations, name):
    names = tuple(implementation.name for implementation in implementations)
    _checks.check_choice(name, names, "implementation")
    return implementations[names.index(name)]


def check_usable(implementations, name, arrays, *static):
    """Refuse an implementation that was asked for by name and cannot take the arguments."""
    if name is None:
        return
    reason = find_named(implementations, name).why_not(*arrays, *static)
    if reason is not None:
        raise NotImplementedError(
            f"`implementation` must be one that can run here, got {name!r}, which {reason}. "
            "Leave it out to have one chosen."
        )


def can_always(*arguments):
    """The `why_not` of an implementation without a condition."""
    return None


def name_platform():
    """Return the platform that programs run on by default, as it is named here."""
    platform = jax.default_backend()
    return "cuda" if platform == "gpu" else platform
