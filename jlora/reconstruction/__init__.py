"""Factors (and a base) → the matrix, or its product with activations.

dense.py               reconstruct, unmerge
implementations.py     base + u @ v, one implementation for each platform and rank
rounding.py            float32 sums in 16 bits, `CompensatedWeight`
apply.py               apply_factors
quantized_products.py  apply_quantized: a quantised base, dequantised in blocks
many.py                apply_many, stack_factors: an adapter for each row
choice.py              which_implementation
"""

from jlora.reconstruction.apply import apply_factors
from jlora.reconstruction.choice import which_implementation
from jlora.reconstruction.dense import reconstruct, unmerge
from jlora.reconstruction.many import apply_many, stack_factors
from jlora.reconstruction.quantized_products import apply_quantized
from jlora.reconstruction.rounding import CompensatedWeight

__all__ = [
    "CompensatedWeight",
    "apply_factors",
    "apply_many",
    "apply_quantized",
    "reconstruct",
    "stack_factors",
    "unmerge",
    "which_implementation",
]
