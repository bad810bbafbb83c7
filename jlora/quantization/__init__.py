"""Low-precision bases: round trips to a format, and array types of other libraries.

round_trips.py  quantize_nf4, quantize_int8: the nearest weight a format can hold
registry.py     register: arrays of another type as bases
"""

from jlora.quantization.registry import register
from jlora.quantization.round_trips import quantize_int8, quantize_nf4

__all__ = [
    "quantize_int8",
    "quantize_nf4",
    "register",
]
