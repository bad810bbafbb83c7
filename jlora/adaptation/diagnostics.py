"""The effect of adapting and training on each weight, in numbers and as a table."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jlora import _checks
from jlora._numerics import frobenius_norm, matmul, safe_divide, to_compute
from jlora._sharding import follow_axes, is_sharded
from jlora._types import AnyArray, Array, Float, Int, PRNGKey, Tree
from jlora.adaptation.adapted_weight import AdaptedWeight, is_adapted, read_base
from jlora.adaptation.paths import fold_path, list_leaves
from jlora.adaptation.tables import format_table
from jlora.factorization.svd import randomized_svd
from jlora.factors import Factors
from jlora.layouts import view_matrix
from jlora.quantization.base import Format
from jlora.quantization.quantized_array import QuantizedArray, quantize
from jlora.quantization.registry import read_array
from jlora.reconstruction.dense import reconstruct

# A new direction whose cosine with every old one is below this is an intruder
# (Shuttleworth et al. 2024).
_INTRUDER_COSINE = 0.5
_COLUMNS = {
    "rank": "{:d}",
    "energy_captured": "{:.4f}",
    "residual": "{:.4f}",
    "stable_rank": "{:.1f}",
    "change": "{:.2e}",
    "angle": "{:.1f}°",
    "num_intruders": "{:d}",
}
# Shown only where a base is quantised.
_QUANTIZED_COLUMNS = {"quantization_error": "{:.2e}", "recovered": "{:.1%}"}


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """One entry for each matrix, in arrays of one length; prints as a table.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.diag(jnp.array([2.0, 1.0, 0.0]))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> found = jlora.diagnose(params, adapted, key=jax.random.key(1))
        >>> print(*str(found).split()[:5])
        path rank energy_captured residual stable_rank
        >>> print(found.energy_captured.round(4), found.stable_rank.round(2))
        [0.8] [1.25]
    """

    paths: tuple[str, ...]  # with the index in a stack, "layers/q[3]"
    rank: Int[np.ndarray, " k"]  # of the factors
    energy_captured: Float[
        np.ndarray, " k"
    ]  # share of ‖w‖² in the factors, 1 - residual²
    residual: Float[np.ndarray, " k"]  # ‖w - s u v‖ / ‖w‖; above 1: factors oppose w
    stable_rank: Float[np.ndarray, " k"]  # ‖w‖² / σ₁²
    change: Float[np.ndarray, " k"]  # ‖w_new - w‖ / ‖w‖, rounding included
    angle: Float[
        np.ndarray, " k"
    ]  # degrees, largest between old and new leading subspaces
    num_intruders: Int[np.ndarray, " k"]  # leading new directions far from all old ones
    # ‖w - Q(w)‖ / ‖w‖ in the format of the base; NaN for a plain base.
    quantization_error: Float[np.ndarray, " k"]
    recovered: Float[np.ndarray, " k"]  # 1 - change / quantization_error

    def __str__(self) -> str:
        columns = dict(_COLUMNS)
        if not np.all(np.isnan(self.quantization_error)):
            columns |= _QUANTIZED_COLUMNS
        rows = [("path", *columns)]
        for i, path in enumerate(self.paths):
            cells = (style.format(getattr(self, c)[i]) for c, style in columns.items())
            rows.append((path, *cells))
        return "\n".join(format_table(rows))


def diagnose(
    params: Tree, adapted: Tree, *, key: PRNGKey, num_directions: int = 10
) -> Diagnosis:
    """Return the `Diagnosis` of each adapted weight against the original.

    Args:
        params: the tree of plain weights before adapting.
        adapted: the tree from `adapt`, before or after training.
        key: one typed PRNG key, consumed; folded with each path and each index in a
            stack.
        num_directions: static, ≥ 1, leading singular directions to compare; fewer where
            min(m, n) is smaller.

    Returns:
        `Diagnosis`. Right after adapting `change` is the rounding error of the base.
        For a quantised base `quantization_error` is the error of quantising w itself,
        and `recovered` the part of it that base and factors together avoid; after
        training `change` also holds what was learned.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: a weight that is not in `params`, or has another shape there (with
            the path).

    Cost: for each matrix two decompositions of rank num_directions, see
        `randomized_svd`, and the memory of two matrices.

    Accuracy: norms to rounding, angles as `randomized_svd`. An intruder is a leading
        left singular vector of the new weight whose cosine with each of the leading old
        ones is below 1/2.

    Source: Shuttleworth, Andreas, Torralba, Sharma, "LoRA vs full fine-tuning: an
        illusion of equivalence", 2024. Differs: we compare a new direction with the 2
        num_directions leading old ones instead of all of them.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(1))
        >>> found = jlora.diagnose(params, adapted, key=jax.random.key(2))
        >>> bool(found.change[0] < 1e-6), int(found.num_intruders[0])
        (True, 0)
    """
    _checks.check_key(key)
    num_directions = _checks.check_integer(num_directions, "num_directions")

    plain = dict(list_leaves(params))
    rows = []
    for path, leaf in list_leaves(adapted, is_leaf=is_adapted):
        if is_adapted(leaf):
            w = _check_plain(path, plain.get(path), leaf)
            own_key = fold_path(key, path)
            rows += _diagnose_weight(path, w, leaf, own_key, num_directions)
    if not rows:
        raise ValueError(
            "`adapted` must hold an adapted weight, got none. Call jlora.adapt first."
        )

    paths, ranks, measures = zip(*rows, strict=True)
    columns = zip(*jax.device_get(measures), strict=True)
    return Diagnosis(paths, np.asarray(ranks), *(np.asarray(c) for c in columns))


class _Measures(NamedTuple):
    """The measures of one matrix, in the order of `Diagnosis`."""

    energy_captured: Float[Array, ""]
    residual: Float[Array, ""]
    stable_rank: Float[Array, ""]
    change: Float[Array, ""]
    angle: Float[Array, ""]
    num_intruders: Int[Array, ""]
    quantization_error: Float[Array, ""]
    recovered: Float[Array, ""]


def _check_plain(path: str, w: Any, leaf: AdaptedWeight) -> AnyArray:
    if w is None or tuple(w.shape) != leaf.shape:
        found = "none" if w is None else tuple(w.shape)
        raise ValueError(
            f"{path}: `params` must hold this weight in shape {leaf.shape}, got "
            f"{found}. Pass the tree that adapt was given."
        )
    return view_matrix(read_array(w), leaf.layout)


def _diagnose_weight(
    path: str, w: AnyArray, leaf: AdaptedWeight, key: PRNGKey, num_directions: int
) -> Iterator[tuple[str, int, _Measures]]:
    """Yield (name, rank, measures) of each matrix of a weight."""
    base = None if leaf.base is None else view_matrix(read_base(leaf), leaf.layout)
    u, v = leaf.factors
    num_directions = min(num_directions, *w.shape[-2:])
    format = leaf.base.format if isinstance(leaf.base, QuantizedArray) else None
    if w.ndim > 2 and is_sharded(w):
        yield from _diagnose_stack(path, w, base, leaf, key, num_directions, format)
        return

    for number, index in enumerate(np.ndindex(w.shape[:-2])):
        own_key = jax.random.fold_in(key, number) if index else key
        measures = _compare(
            jnp.asarray(w[index]),
            None if base is None else jnp.asarray(base[index]),
            Factors(u[index], v[index]),
            leaf.scale,
            own_key,
            num_directions,
            format,
        )
        name = f"{path}[{', '.join(map(str, index))}]" if index else path
        if is_sharded(w):
            # Programs with collectives that wait for each other may block on a CPU.
            jax.block_until_ready(measures)
        yield name, leaf.u.shape[-1], measures


def _diagnose_stack(
    path: str,
    w: Any,
    base: Any,
    leaf: AdaptedWeight,
    key: PRNGKey,
    num_directions: int,
    format: Format | None,
) -> Iterator[tuple[str, int, _Measures]]:
    """Yield the same for a sharded stack, measured as one batch.

    The slices of a stack that is sharded over its matrices would each gather it.
    """
    *batch, _, _ = w.shape
    keys = jnp.stack([jax.random.fold_in(key, i) for i in range(math.prod(batch))])
    ws, bases, factors = jax.tree.map(
        lambda array: array.reshape(-1, *array.shape[-2:]), (w, base, leaf.factors)
    )
    measures = _compare_stack(
        ws, bases, factors, leaf.scale, keys, num_directions, format
    )
    whole = NamedSharding(w.sharding.mesh, PartitionSpec())
    measures = jax.device_get(jax.device_put(measures, whole))
    for number, index in enumerate(np.ndindex(*batch)):
        own = jax.tree.map(lambda values: values[number], measures)  # noqa: B023
        yield f"{path}[{', '.join(map(str, index))}]", leaf.u.shape[-1], own


@functools.partial(jax.jit, static_argnames=("k", "format"))
@follow_axes(*[None] * 5, result="")
def _compare_stack(
    ws: Float[Array, "*batch m n"],
    bases: Float[Array, "*batch m n"] | None,
    factors: Factors,
    scale: Float[Array, ""],
    keys: PRNGKey,
    k: int,
    format: Format | None,
) -> _Measures:
    """Return the measures of all matrices of a stack [num, m, n]."""
    run = functools.partial(_compare, k=k, format=format)
    axes = (0, None if bases is None else 0, 0, None, 0)
    return jax.vmap(run, in_axes=axes)(ws, bases, factors, scale, keys)


@functools.partial(jax.jit, static_argnames=("k", "format"))
@follow_axes(*[None] * 5, result="")
def _compare(
    w: Float[Array, "m n"],
    base: Float[Array, "m n"] | None,
    factors: Factors,
    scale: Float[Array, ""],
    key: PRNGKey,
    k: int,
    format: Format | None,
) -> _Measures:
    """Return the measures of one matrix."""
    w = to_compute(w)
    old_key, new_key = jax.random.split(key)
    new = reconstruct(factors, base, scale=scale, dtype=w.dtype)
    remainder = reconstruct(factors, w, scale=-scale)

    norm = frobenius_norm(w)
    residual = safe_divide(frobenius_norm(remainder), norm)
    change = safe_divide(frobenius_norm(new - w), norm)

    # Compare the leading left singular vectors, old and new.
    old = randomized_svd(w, min(2 * k, *w.shape), key=old_key)
    directions = randomized_svd(new, k, key=new_key).u
    stable_rank = safe_divide(norm, old.s[0]) ** 2
    cosines = matmul(old.u.T, directions)
    is_intruder = jnp.max(jnp.abs(cosines), axis=0) < _INTRUDER_COSINE

    # The cosine loses angles below a hundredth of a degree, so we use the sine too.
    outside = directions - matmul(old.u[:, :k], cosines[:k])
    sine = jnp.linalg.norm(outside, 2)
    cosine = jnp.min(jnp.linalg.svd(cosines[:k], compute_uv=False))
    angle = jnp.degrees(jnp.arctan2(sine, cosine))

    lost = recovered = jnp.full((), jnp.nan, w.dtype)
    if format is not None:
        rounded = quantize(w.astype(jnp.float32), format).dequantize()
        lost = safe_divide(frobenius_norm(rounded.astype(w.dtype) - w), norm)
        recovered = 1 - safe_divide(change, lost)
    return _Measures(
        1 - residual**2,
        residual,
        stable_rank,
        change,
        angle,
        jnp.sum(is_intruder),
        lost,
        recovered,
    )
