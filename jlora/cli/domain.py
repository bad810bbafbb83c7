"""`--domain`: new last columns of V from a file."""

from __future__ import annotations

import argparse
import dataclasses

from jlora import _checks
from jlora._types import Array, Float
from jlora.adaptation.adapted_weight import AdaptedWeight
from jlora.checkpoints.arrays import check_suffix, load_arrays
from jlora.updates.columns import set_columns


def read_domain(arguments: argparse.Namespace) -> Float[Array, "r k"]:
    """Return the new columns, checked against --rank and --columns."""
    path, rank = arguments.domain, arguments.rank
    if check_suffix(path) != ".npy":
        raise ValueError(
            f"{path}: `--domain` must be a .npy file, got another. Save it as one."
        )
    (values,) = load_arrays(path).values()
    if values.ndim != 2 or values.shape[0] != rank:
        raise ValueError(
            f"{path}: `--domain` must be an array with rank = {rank} rows, got shape "
            f"{values.shape}. Each of its columns becomes a column of V."
        )

    name, expected = f"--domain {path}", (rank, arguments.columns)
    _checks.check_shape(values.shape, expected, name, "rank rows, --columns columns")
    values = _checks.check_matrix(values, name)
    _checks.check_finite(values, name)
    return values


def replace_columns(w: AdaptedWeight, values: Float[Array, "r k"]) -> AdaptedWeight:
    """Return the weight with `values` as the last k columns of V."""
    factors = set_columns(w.factors, values.shape[-1], values)
    return dataclasses.replace(w, v=factors.v)
