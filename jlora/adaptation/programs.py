"""The compiled part of `adapt`: one matrix, or a chunk of them, decomposed."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import compute_dtype
from jlora._types import Array, Float, PRNGKey, Scalar
from jlora.initializers.base import InitialFactors, Initializer
from jlora.layouts import matrix_shape, restore_layout, view_matrix
from jlora.quantization.base import Format
from jlora.quantization.quantized_array import QuantizedArray, quantize


class InitSpec(NamedTuple):
    """The static argument of a compiled program."""

    initializer: Initializer
    rank: int
    layout: str  # of one stored matrix, without batch axes
    format: Format | None = None  # that the base is stored in; None: plain


class InitializedMatrix(NamedTuple):
    """The arrays that a program returns for one matrix."""

    # As the matrix was stored, or quantised; None: the weight itself.
    base: Array | QuantizedArray | None
    u: Float[Array, "m r"]
    v: Float[Array, "r n"]
    core: Array | None  # [r, r], or [r]: a diagonal
    is_finite: Array  # bool


def initialize_chunk(
    ws: tuple[Array, ...],
    scales: tuple[Scalar, ...],
    keys: tuple[PRNGKey, ...],
    datas: tuple[Array | None, ...],
    *,
    spec: InitSpec,
) -> tuple[InitializedMatrix, ...]:
    """Return the arrays of each matrix of a chunk, computed as one batch."""
    if len(ws) == 1:
        return (initialize_matrix(ws[0], scales[0], keys[0], datas[0], spec),)

    run = jax.vmap(functools.partial(initialize_matrix, spec=spec))
    return split_results(run(*stack_rows(ws, scales, keys, datas)), len(ws))


def stack_rows(*columns: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return each column of arrays as one array, stacked along a new first axis."""
    rows = zip(*columns, strict=True)
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *rows)


def split_results(
    results: InitializedMatrix, num: int
) -> tuple[InitializedMatrix, ...]:
    """Return the results of each of `num` stacked matrices."""
    return tuple(
        jax.tree.map(lambda array: array[i], results)  # noqa: B023 (used at once)
        for i in range(num)
    )


compile_chunk = jax.jit(initialize_chunk, static_argnames="spec")
compile_donated_chunk = jax.jit(
    initialize_chunk, static_argnames="spec", donate_argnames="ws"
)


def initialize_matrix(
    w: Array, scale: Scalar, key: PRNGKey, data: Array | None, spec: InitSpec
) -> InitializedMatrix:
    """Return the arrays of one stored matrix."""
    initializer = spec.initializer
    matrix = view_matrix(w, spec.layout)
    base, factors, core = initializer(
        matrix, spec.rank, scale=scale, key=key, data=data
    )
    if spec.format is not None:
        base = quantize(matrix if base is None else base, spec.format)
    elif base is not None:
        base = restore_layout(base, spec.layout, w.shape)

    # If NaN in w reaches the factors, looking at w itself would only cost a pass.
    seen = tuple(factors) if initializer.passes_nan_on else (*factors, w)
    is_finite = functools.reduce(
        jnp.logical_and, [jnp.all(jnp.isfinite(array)) for array in seen]
    )
    return InitializedMatrix(base, *factors, core, is_finite)


@functools.lru_cache(maxsize=1024)
def has_new_base(
    spec: InitSpec,
    stored_shape: tuple[int, ...],
    dtype: Any,
    data: tuple[tuple[int, ...], Any] | None,
) -> bool:
    """Return whether the initializer gives a base other than the weight.

    It is run on abstract arrays, and the shapes of its result are checked.
    """
    *_, m, n = matrix_shape(stored_shape, spec.layout)
    abstract_data = None if data is None else jax.ShapeDtypeStruct(*data)
    abstract_key = jax.eval_shape(lambda: jax.random.key(0))

    def run(w: Array, key: PRNGKey, data: Array | None) -> InitialFactors:
        scale = jnp.ones((), compute_dtype(w.dtype))
        return spec.initializer(w, spec.rank, scale=scale, key=key, data=data)

    w = jax.ShapeDtypeStruct((m, n), jax.dtypes.canonicalize_dtype(dtype))
    found = jax.eval_shape(run, w, abstract_key, abstract_data)
    _check_result(found, spec, (m, n))
    return found.base is not None or spec.format is not None


def _check_result(found: Any, spec: InitSpec, shape: tuple[int, int]) -> None:
    """Refuse a result that is no `InitialFactors` of the right shapes."""
    label = spec.initializer.label
    if not isinstance(found, InitialFactors):
        raise TypeError(
            f"`init` must return InitialFactors(base, factors, core), got "
            f"{type(found).__name__} from {label}. "
            "Import it from jlora.initializers."
        )

    (m, n), rank = shape, spec.rank
    u, v = found.factors
    meaning = f"m × rank, from init={label}"
    _checks.check_shape(u.shape, (m, rank), "factors.u", meaning)
    _checks.check_shape(v.shape, (rank, n), "factors.v", f"rank × n, from init={label}")
    if found.base is not None:
        _checks.check_shape(
            found.base.shape, shape, "base", f"m × n, from init={label}"
        )
