"""Which implementation of an operation would run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jlora import _checks
from jlora._dispatch import PLATFORMS, name_platform
from jlora.reconstruction.dense import choose_implementation, reconstruct
from jlora.reconstruction.many import apply_many, choose_many

_CHOOSERS = {reconstruct: choose_implementation, apply_many: choose_many}


def which_implementation(
    function: Callable, *arguments: Any, platform: str | None = None, **settings: Any
) -> str:
    """Return the name of the implementation that a call would run, without running it.

    Args:
        function: `reconstruct` or `apply_many`.
        *arguments: positional arguments of the call.
        platform: "cpu", "cuda" or "tpu". None: where programs run by default.
        **settings: keyword arguments of the call.

    Returns:
        The name, which `implementation=` of the function accepts.

    Raises:
        TypeError: another function.
        ValueError: another platform; else as the function.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.ones((6, 2)), jnp.ones((2, 4)))
        >>> jlora.reconstruction.which_implementation(
        ...     jlora.reconstruct, factors, jnp.ones((6, 4)), platform="tpu")
        'plain'
    """
    if function not in _CHOOSERS:
        raise TypeError(
            "`function` must be jlora.reconstruct or jlora.apply_many, got "
            f"{getattr(function, '__name__', function)!r}. Others have one "
            "implementation."
        )
    platform = name_platform() if platform is None else platform
    _checks.check_choice(platform, PLATFORMS, "platform")
    return _CHOOSERS[function](platform, *arguments, **settings)
