"""Types that signatures share.

Shapes follow in brackets, in the letters m, n, r of the documentation:
`Float[Array, "*batch m n"]`. Nothing checks them at run time; the tests do.
"""

from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Key, UInt

__all__ = [
    "AnyArray",
    "Array",
    "Bool",
    "DTypeLike",
    "Float",
    "Int",
    "PRNGKey",
    "Scalar",
    "Tree",
    "UInt",
]

Array: TypeAlias = jax.Array
AnyArray: TypeAlias = jax.Array | np.ndarray  # where NumPy arrays are accepted too
DTypeLike: TypeAlias = Any  # jnp.float32, "float32", np.dtype("float32"), ...
PRNGKey: TypeAlias = Key[Array, ""]  # one typed key, from jax.random.key
Scalar: TypeAlias = float | int | jax.Array  # one number, or an array of one
Tree: TypeAlias = Any  # a pytree of arrays
