"""Merging into a quantised base, and the part of the delta that survives it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora._numerics import safe_divide
from jlora._progress import warn
from jlora._types import Array, Float, Tree
from jlora.adaptation.adapted_weight import AdaptedWeight, is_adapted
from jlora.adaptation.paths import list_leaves
from jlora.adaptation.tables import format_table
from jlora.factors import Factors
from jlora.layouts import restore_layout
from jlora.quantization.quantized_array import QuantizedArray, quantize
from jlora.reconstruction.dense import reconstruct

# A delta of which less is kept is named in a warning.
_LEAST_KEPT = 0.5


class Requantized(NamedTuple):
    """A merged weight in the format of its base."""

    array: QuantizedArray
    error: Float[Array, ""]  # ‖delta found − delta‖ / ‖delta‖
    kept: Float[Array, ""]  # ⟨delta found, delta⟩ / ‖delta‖²


@dataclasses.dataclass(frozen=True)
class DeltaLoss:
    """The loss of each delta by merging into its quantised base; prints as a table.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 8))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2, quantize="int8"))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(1))
        >>> found = jlora.adaptation.measure_delta_loss(adapted)
        >>> found.paths, bool(found.kept[0] > 0.9)
        (('w',), True)
    """

    paths: tuple[str, ...]
    error: np.ndarray  # [k], ‖delta after merging − delta‖ / ‖delta‖
    kept: np.ndarray  # [k], share of the delta that is kept, along its own direction

    def __str__(self) -> str:
        rows = [("path", "error of the delta", "kept")]
        for path, error, kept in zip(self.paths, self.error, self.kept, strict=True):
            rows.append((path, f"{error:.3f}", f"{kept:.1%}"))
        return "\n".join(format_table(rows))


def measure_delta_loss(adapted: Tree) -> DeltaLoss:
    """Return the part of each delta that merging into the quantised base would lose.

    A merged weight is rounded to the format of its base. Where the delta is smaller
    than the step of the format, most entries are rounded back to the base.

    Args:
        adapted: tree from `adapt`, with at least one quantised base.

    Returns:
        `DeltaLoss` of the weights with a quantised base.

    Raises:
        ValueError: no base is quantised.

    Cost: one pass over each such weight, in float32.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 8))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2, quantize="int8"))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(1))
        >>> print(*str(jlora.adaptation.measure_delta_loss(adapted)).split()[:2])
        path error
    """
    found = {
        path: requantize_weight(leaf)
        for path, leaf in list_leaves(adapted, is_leaf=is_adapted)
        if is_adapted(leaf) and isinstance(leaf.base, QuantizedArray)
    }
    if not found:
        raise ValueError(
            "`adapted` must hold a weight with a quantised base, got none. Give its "
            "rule quantize=."
        )
    return _collect(found)


def requantize_weight(weight: AdaptedWeight) -> Requantized:
    """Return one adapted weight merged into the format of its quantised base."""
    base = weight.base
    return _requantize(base, weight.factors, weight.scale, weight.layout)


def warn_of_loss(found: Mapping[str, Requantized]) -> None:
    """Warn of weights whose delta is mostly lost; silent under a transformation."""
    if not found or any(isinstance(each.kept, Tracer) for each in found.values()):
        return
    loss = _collect(found)
    pairs = zip(loss.paths, loss.kept, strict=True)
    lost = [f"{path} ({kept:.0%})" for path, kept in pairs if kept < _LEAST_KEPT]
    if lost:
        shown = ", ".join(lost[:8]) + (", ..." if len(lost) > 8 else "")
        warn(
            f"The deltas of {len(lost)} of {len(loss.paths)} weights are below the "
            f"step of their format, and merging keeps little of them: {shown}. Merge "
            "into float (requantize=False), or keep the factors beside the base.",
            stacklevel=3,
        )


@jax.jit
def _measure(
    merged: Array, base: Array, delta: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return (error, kept) of the delta that a requantised weight holds."""
    found = merged - base
    squared = jnp.sum(delta * delta)
    error = safe_divide(jnp.linalg.norm((found - delta).ravel()), jnp.sqrt(squared))
    return error, safe_divide(jnp.sum(found * delta), squared)


def _requantize(
    base: QuantizedArray, factors: Factors, scale: Array, layout: str
) -> Requantized:
    plain = base.dequantize(jnp.float32)
    matrix = reconstruct(factors, scale=scale, dtype=jnp.float32)
    delta = restore_layout(matrix, layout, base.shape)
    new = quantize(plain + delta, base.format, layout=base.layout)
    error, kept = _measure(new.dequantize(), plain, delta)
    return Requantized(new.astype(base.dtype), error, kept)


def _collect(found: Mapping[str, Requantized]) -> DeltaLoss:
    measures: Any = jax.device_get([(each.error, each.kept) for each in found.values()])
    errors, kept = zip(*measures, strict=True)
    return DeltaLoss(tuple(found), np.asarray(errors), np.asarray(kept))
