"""Which form of an operation would run."""

from jlora import _checks
from jlora._dispatch import PLATFORMS, name_platform
from jlora.reconstruction.dense import choose_implementation, reconstruct
from jlora.reconstruction.many import apply_many, choose_many

_CHOOSERS = {reconstruct: choose_implementation, apply_many: choose_many}


def which_implementation(function, *arguments, platform=None, **settings):
    """Return the name of the form that a call would run, without running it.

    Args:
        function: `reconstruct` or `apply_many`.
        *arguments, **settings: those of the call.
        platform: "cpu", "cuda" or "tpu". None: where programs run by default.

    Returns:
        The name, which `implementation=` of the function takes.

    Raises:
        TypeError: another function.
        ValueError: another platform; else as the function.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.ones((6, 2)), jnp.ones((2, 4)))
        >>> jlora.reconstruction.which_implementation(jlora.reconstruct, factors, jnp.ones((6, 4)), platform="tpu")
        'plain'
    """
    if function not in _CHOOSERS:
        raise TypeError(
            f"`function` must be jlora.reconstruct or jlora.apply_many, got {function!r}. "
            "Others have one implementation."
        )
    platform = name_platform() if platform is None else platform
    _checks.check_choice(platform, PLATFORMS, "platform")
    return _CHOOSERS[function](platform, *arguments, **settings)
