"""Factors → factors, exactly, without forming the matrix.

additive.py       add a low-rank term, append columns or rows to an SVD
columns.py        set, replace or remove columns
recompression.py  concatenate, recompress, balance, orthogonalise products
"""

from jlora.updates.additive import add_low_rank, append_columns, append_rows
from jlora.updates.columns import remove_columns, replace_columns, set_columns
from jlora.updates.recompression import (
    balance,
    concatenate_factors,
    orthogonalize_product,
    recompress,
)

__all__ = [
    "add_low_rank",
    "append_columns",
    "append_rows",
    "balance",
    "concatenate_factors",
    "orthogonalize_product",
    "recompress",
    "remove_columns",
    "replace_columns",
    "set_columns",
]
