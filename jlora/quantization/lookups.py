"""Some inputs of a quantised array, without the values of the others."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jlora._types import Array, Float, Int
from jlora.quantization.base import Encoded
from jlora.quantization.blocks import pack_halves
from jlora.quantization.quantized_array import QuantizedArray


def take_inputs(
    array: QuantizedArray, indices: Int[Array, " k"]
) -> Float[Array, "*batch n k"]:
    """Return the weights of some inputs in float32, a row for each output.

    Args:
        array: the quantised array.
        indices: of inputs; one out of range gets the nearest in range.
    """
    from jlora.quantization.scales import read_scales  # on use, as the formats

    format = array.format
    size = format.find_block_size(array.num_inputs)
    per_byte = format.codes_per_byte
    indices = jnp.clip(indices, 0, array.num_inputs - 1)

    # Each input taken is a block of its own, with a scale of its own.
    codes = jnp.take(array.codes, indices // per_byte, -1)
    if per_byte == 2:
        halves = jnp.where(indices % 2 == 0, codes >> 4, codes & 15)
        codes = pack_halves(halves, -1)
    scales, zeros = (
        None if part is None else jnp.take(part, indices // size, -1)
        for part in (read_scales(array.scales), array.zeros)
    )
    single = dataclasses.replace(format, block_size=1)
    return single.decode(Encoded(codes, scales, zeros), len(indices))
