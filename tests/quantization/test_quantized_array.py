"""`QuantizedArray`: layouts, sizes, sharding, files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.quantization import fp8, int4, int8, nf4, quantize

# Bits for each number: the most that a large matrix may take.
MOST_BITS = {nf4(): 4.13, int4(): 4.26, int8(): 8.1, fp8(): 8.1}


def draw(shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("format", MOST_BITS, ids=lambda format: format.label)
def test_bits_of_live_buffers(format):
    array = quantize(draw((1024, 1024)), format)
    buffers = [each.unsafe_buffer_pointer() for each in jax.tree.leaves(array)]
    assert len(set(buffers)) == len(buffers)
    num_bytes = sum(each.on_device_size_in_bytes() for each in jax.tree.leaves(array))
    assert array.nbytes == num_bytes
    assert 8 * num_bytes / array.size <= MOST_BITS[format]


@pytest.mark.parametrize("format", MOST_BITS, ids=lambda format: format.label)
@pytest.mark.parametrize(
    ("layout", "shape", "to_matrix"),
    [
        ("io", (65, 12), lambda w: w),
        ("oi", (12, 65), lambda w: w.T),
        ("ioo", (65, 3, 4), lambda w: w.reshape(65, 12)),
        ("iio", (5, 13, 12), lambda w: w.reshape(65, 12)),
        ("oii", (12, 5, 13), lambda w: w.reshape(12, 65).T),
        ("ibo", (65, 2, 12), lambda w: w.transpose(1, 0, 2)),
        ("oi", (2, 12, 65), lambda w: w.mT),
    ],
)
def test_a_layout_is_its_matrix_view(format, layout, shape, to_matrix):
    w = draw(shape)
    array = quantize(w, format, layout=layout)
    assert array.shape == shape
    assert (array.ndim, array.size) == (w.ndim, w.size)
    expected = quantize(to_matrix(w), format).dequantize()
    np.testing.assert_array_equal(to_matrix(array.dequantize()), expected)


def test_an_empty_stack_and_its_text():
    array = quantize(draw((0, 64, 4)), int8())
    assert array.shape == (0, 64, 4)
    assert array.dequantize().shape == (0, 64, 4)
    assert repr(quantize(draw((64, 4)), int8())) == (
        "QuantizedArray(float32[64,4], int8, 8.50 bits)"
    )
    structure = jax.tree.structure(array)
    unflattened = jax.tree.unflatten(structure, [None] * structure.num_leaves)
    assert repr(unflattened) == "QuantizedArray(int8)"


def test_its_leaves_are_sharded_as_stacks():
    mesh = jax.make_mesh((1,), ("layers",))
    sharding = jax.NamedSharding(mesh, jax.P("layers"))
    array = jax.device_put(quantize(draw((2, 64, 6)), int8()), sharding)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(array))
    found = jax.jit(lambda array: array.dequantize())(array)
    expected = quantize(draw((2, 64, 6)), int8()).dequantize()
    np.testing.assert_array_equal(found, expected)


def test_other_dtypes_and_views_keep_the_codes():
    array = quantize(draw((64, 6)), int8())
    assert array.astype(jnp.bfloat16).dequantize().dtype == jnp.bfloat16
    turned = array.view("oi", (6, 64))
    np.testing.assert_array_equal(turned.dequantize(), array.dequantize().T)
