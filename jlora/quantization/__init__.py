"""Bases of few bits: formats, quantised arrays, and array types of other libraries.

formats.py          nf4, int8, int4, fp8
base.py             Format, the base class
encodings.py        codes and scales of the rows of a weight, for each format
quantized_array.py  QuantizedArray, quantize
registry.py         register: arrays of another type as bases
round_trips.py      quantize_nf4, quantize_int8: the nearest weight a format can hold
levels.py           the values that codes of few bits stand for
blocks.py           inputs that share a scale, codes of four bits in bytes
scales.py           the scales of blocks, in 32 bits or in 8
"""

from jlora.quantization.base import Format
from jlora.quantization.formats import fp8, int4, int8, nf4
from jlora.quantization.quantized_array import QuantizedArray, quantize
from jlora.quantization.registry import register
from jlora.quantization.round_trips import quantize_int8, quantize_nf4

__all__ = [
    "Format",
    "QuantizedArray",
    "fp8",
    "int4",
    "int8",
    "nf4",
    "quantize",
    "quantize_int8",
    "quantize_nf4",
    "register",
]
