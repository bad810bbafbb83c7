"""Arrays → arrays that a low-precision base can hold."""

from jlora.quantization.round_trips import quantize_int8, quantize_nf4

__all__ = ["quantize_int8", "quantize_nf4"]
