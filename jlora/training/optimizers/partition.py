"""Different optimisers for different parts of the trained tree."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping

import jax
import optax

from jlora._types import Tree
from jlora.adaptation.paths import format_path, sort_by_likeness


def by_path(
    optimizers: Mapping[str, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    r"""Return an optimiser that is chosen for each trained array by its path.

    The path of a factor ends in "/u", "/v" or "/core": {r"/v$": fast, ".*": slow} gives
    v a rate of its own. The path of a plain leaf, trained with `also_train`, is that
    leaf's own. The first expression that is found in the path decides. It is
    `optax.multi_transform` with these labels.

    A transformation that looks at both factors of a weight at once
    (`scale_by_factor_gram`, `project_out`, `riemannian_sgd`) needs an entry that
    matches both, or its place in a chain before or after.

    Args:
        optimizers: {regular expression on a path: optimiser}; ".*" matches the rest.
            `optax.set_to_zero()` freezes what it matches.

    Returns:
        optax.GradientTransformationExtraArgs.

    Raises:
        TypeError: an entry that is no optimiser.
        ValueError: no entry, an entry that is no regular expression; on the first use,
            a path that none matches, or an entry that matches no path.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> params = {"w": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1, trainable="uv"))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> optimizer = jlora.optimizers.by_path(
        ...     {"bias": optax.sgd(1.0), r"/v$": optax.sgd(0.1), ".*": optax.sgd(0.01)})
        >>> trainable, _ = jlora.split_trainable(adapted, also_train="bias")
        >>> ones = jax.tree.map(jnp.ones_like, trainable)
        >>> updates, _ = optimizer.update(ones, optimizer.init(trainable))
        >>> round(float(updates["w"].u[0, 0]), 3), round(float(updates["bias"][0]), 3)
        (-0.01, -1.0)
    """
    if not optimizers:
        raise ValueError("`optimizers` must hold at least one, got none. Name one.")
    for pattern, optimizer in optimizers.items():
        _check_entry(pattern, optimizer)

    def label(params: Tree) -> Tree:
        found = jax.tree_util.tree_map_with_path(
            lambda path, _: _find_pattern(optimizers, format_path(path)), params
        )
        unused = [each for each in optimizers if each not in jax.tree.leaves(found)]
        leaves, _ = jax.tree_util.tree_flatten_with_path(params)
        paths = [format_path(path) for path, _ in leaves]
        for pattern in unused:
            nearest = ", ".join(sort_by_likeness(paths, pattern)[:8])
            raise ValueError(
                "`optimizers` must match paths of trained arrays, got "
                f"{pattern!r}, which is the first for none. The nearest paths are: "
                f"{nearest}."
            )
        return found

    transforms: dict[Hashable, optax.GradientTransformation] = {**optimizers}
    combined = optax.multi_transform(transforms, label)
    return optax.with_extra_args_support(combined)


def _check_entry(pattern: str, optimizer: optax.GradientTransformation) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`optimizers` must be named by regular expressions, got {pattern!r} "
            f"({error}). Escape it."
        ) from None
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "`optimizers` must hold optax transformations, got "
            f"{type(optimizer).__name__} for {pattern!r}. Write for example "
            "optax.adam(1e-3)."
        )


def _find_pattern(
    optimizers: Mapping[str, optax.GradientTransformation], path: str
) -> str:
    for pattern in optimizers:
        if re.search(pattern, path):
            return pattern
    raise ValueError(
        f"{path}: `optimizers` must match every trained array, got no entry for this "
        'one. Add ".*".'
    )
