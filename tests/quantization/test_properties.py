"""Properties of all formats on random inputs: bounds, repetition, scaling, layouts."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jlora.quantization import fp8, int4, int8, nf4, quantize

# Each family makes a format of a block size; None is the largest one.
FAMILIES = {
    "nf4": lambda size: nf4(block_size=size or 64, double_quant=False),
    "nested": lambda size: nf4(block_size=size or 64),
    "int8": lambda size: int8(block_size=size),
    "int4": lambda size: int4(block_size=size),
    "fp8": lambda size: fp8(block_size=size),
}
SIZES = st.sampled_from((1, 5, None))
# One entry, one row, one column, sizes that no block divides, batch axes. The last one
# has more than the 256 scales that share a scale of their own.
SHAPES = ((1, 1), (1, 7), (33, 1), (2, 13, 5), (2, 65, 40))

EPS = 2.0**-23  # of float32
# Half of the widest gap between the levels of a nested scale: 64 levels from 0.1 to 1
# times the largest distance of a scale from the mean.
NESTED_STEP = 0.9 / 128
# The step of int4 is truncated to bfloat16, so that the range holds up to 15 (1 + 2⁻⁷)
# steps. The last 15/128 of a step have no code, and rounding adds half of a step.
INT4_STEP = (0.5 + 15 / 128) / (1 + 1 / 128)


def draw(shape, kind, seed, exponent=0, dtype=jnp.float32):
    """Return a weight; "whole" has ties, and "steep" spans 20 powers of two."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape)
    is_float16 = dtype == jnp.float16  # 40 powers of two in all
    w = {
        "normal": w,
        "positive": np.abs(w),
        "sparse": w * (rng.random(shape) < 0.3),
        "whole": np.round(4 * w),
        "steep": np.ldexp(w, -rng.integers(0, 7 if is_float16 else 21, shape)),
    }[kind]
    return np.ldexp(w, 0 if is_float16 else exponent).astype(dtype)


SEEDS = st.integers(0, 2**32 - 1)
EXPONENTS = st.integers(-20, 20)
DTYPES = st.sampled_from((jnp.float32, jnp.bfloat16, jnp.float16))
KINDS = st.sampled_from(("normal", "positive", "sparse", "whole", "steep"))
DRAWN = st.sampled_from(SHAPES), KINDS, SEEDS
WEIGHTS = st.builds(draw, *DRAWN)
WEIGHTS_OF_ALL_DTYPES = st.builds(draw, *DRAWN, EXPONENTS, DTYPES)


def check(number, *strategies, families=tuple(FAMILIES)):
    """Test families on `number` fixed examples each, or on JLORA_EXAMPLES new ones."""
    asked = os.environ.get("JLORA_EXAMPLES")
    limits = settings(
        max_examples=int(asked or number),
        derandomize=asked is None,
        deadline=None,  # an example may compile
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    parametrize = pytest.mark.parametrize("family", families)
    return lambda test: parametrize(limits(given(*strategies)(test)))


quantize_jitted = jax.jit(quantize, static_argnames="format")
dequantize_jitted = jax.jit(lambda array: array.dequantize())


def round_trip(w, format):
    return np.asarray(quantize(w, format).dequantize(jnp.float32))


def reduce_blocks(w, format, reduce):
    """Return for each entry the reduction of its block, in float64."""
    w = np.asarray(w, np.float64)
    size = format.find_block_size(w.shape[-2])
    found = np.empty_like(w)
    for start in range(0, w.shape[-2], size):
        block = np.s_[..., start : start + size, :]
        found[block] = reduce(w[block], axis=-2, keepdims=True)
    return found


def find_largest(w, format):
    return reduce_blocks(np.abs(w), format, np.max)


def find_largest_of_matrix(w):
    return np.abs(np.asarray(w, np.float64)).max(axis=(-2, -1), keepdims=True)


def find_nested_error(w, format):
    """Return how far double quantisation may move a scale, 0 without it."""
    if not getattr(format, "double_quant", False):
        return 0
    size = format.find_block_size(w.shape[-2])
    scales = find_largest(w, format)[..., ::size, :]
    distances = scales - scales.mean(axis=(-2, -1), keepdims=True)
    rounding = 2.5 * EPS * find_largest_of_matrix(w)
    return NESTED_STEP * find_largest_of_matrix(distances) + rounding


def find_bound(w, format):
    """Return the largest error that each entry may have."""
    w = np.asarray(w, np.float64)
    largest = find_largest(w, format)
    # Encoding and decoding round at most five times in float32, by half of EPS each.
    rounding = 2.5 * EPS * largest
    if format.name == "int8":
        return largest / 254 + rounding
    if format.name == "fp8":
        return np.abs(w) / 16 + 2.0**-17 * largest + rounding
    if format.name == "int4":
        high = np.maximum(reduce_blocks(w, format, np.max), 0)
        low = np.minimum(reduce_blocks(w, format, np.min), 0)
        return INT4_STEP * (high - low) / 15 + 2 * rounding
    return 0.152 * largest + rounding + find_nested_error(w, format)


def find_change(once, w, format):
    """Return the most that a second round trip may change."""
    eps = float(jnp.finfo(once.dtype).eps)
    before, after = find_largest(w, format), find_largest(once, format)
    if getattr(format, "double_quant", False):
        # The new mean moves each scale to another level. A small scale may be negative:
        # the signs of its block change, and the levels of NF4 are asymmetric.
        sizes = find_largest_of_matrix(before), find_largest_of_matrix(after)
        return (NESTED_STEP * 1.152 + 4 * eps) * np.maximum(*sizes)
    if format.name == "int4" and once.dtype != jnp.float32:
        # 16 bits have no room for most multiples of a step of 8 bits: both ends of a
        # block are rounded, and the new step is truncated once more, by up to 2⁻⁷.
        return (2.0**-7 + 2 * eps) * np.abs(np.asarray(once, np.float64))
    if format.name == "fp8":
        # An entry that is rounded up to a power of two doubles the scale. The numbers
        # below the smallest normal one of fp8 lose their last bit.
        is_doubled = np.frexp(after)[1] > np.frexp(before)[1]
        return np.where(is_doubled, 2.0**-17 * after, 0)
    return 0


def assert_within(found, expected, bound):
    error = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
    assert np.all(error <= bound)


def assert_same(found, expected, w, format):
    """Compare two quantised arrays: the same bits, but another sum of nested scales."""
    np.testing.assert_array_equal(found.codes, expected.codes)
    if getattr(format, "double_quant", False):
        # XLA adds N scales in another order: N roundings. A scale between two levels
        # may take the other one.
        one, other = found.scales.offset, expected.scales.offset
        assert_within(one, other, found.scales.codes.size * EPS * np.abs(other))
    values = found.dequantize(), expected.dequantize()
    assert_within(*values, 2 * find_nested_error(w, format))


@check(12, WEIGHTS_OF_ALL_DTYPES, SIZES)
def test_each_entry_is_within_the_bound_of_its_block(family, w, size):
    format = FAMILIES[family](size)
    found = quantize(w, format).dequantize()
    # The result is rounded to its dtype; float16 has subnormal numbers here.
    info = jnp.finfo(w.dtype)
    rounding = float(info.eps) / 2 * np.abs(np.asarray(found, np.float64))
    subnormal = float(info.smallest_subnormal) / 2
    assert_within(found, w, find_bound(w, format) + rounding + subnormal)


# Zero, and numbers whose smallest step is far above the smallest normal number.
MAGNITUDES = st.floats(2.0**-40, 2.0**40, width=32)
ENTRIES = st.just(0.0) | MAGNITUDES | MAGNITUDES.map(lambda value: -value)


@check(40, hnp.arrays(np.float32, (8, 2), elements=ENTRIES, fill=st.nothing()))
def test_entries_that_hypothesis_looks_for(family, w):
    format = FAMILIES[family](5)
    assert_within(round_trip(w, format), w, find_bound(w, format))


@check(100, st.floats(-15, 0), st.floats(0, 15 / 128), families=["int4"])
def test_a_range_of_more_than_fifteen_steps(family, low, excess):
    format = FAMILIES[family](None)
    w = np.array([[low], [15 + excess + low]], np.float32)
    assert_within(round_trip(w, format), w, find_bound(w, format))


@check(15, WEIGHTS_OF_ALL_DTYPES, SIZES, st.booleans())
def test_a_second_round_trip_gives_the_same_values(family, w, size, is_float32):
    format = FAMILIES[family](size)
    once = quantize(w, format).dequantize(jnp.float32 if is_float32 else w.dtype)
    twice = quantize(once, format).dequantize()
    assert_within(twice, once, find_change(once, w, format))


@check(15, WEIGHTS, SIZES, EXPONENTS)
def test_powers_of_two_only_scale_the_result(family, w, size, exponent):
    format = FAMILIES[family](size)
    plain, scaled = quantize(w, format), quantize(np.ldexp(w, exponent), format)
    np.testing.assert_array_equal(scaled.codes, plain.codes)
    expected = np.ldexp(np.asarray(plain.dequantize()), exponent)
    np.testing.assert_array_equal(scaled.dequantize(), expected)


@check(20, WEIGHTS, SIZES, families=["int8", "fp8"])
def test_symmetric_formats_keep_signs(family, w, size):
    format = FAMILIES[family](size)
    np.testing.assert_array_equal(round_trip(-w, format), -round_trip(w, format))


def choose_block(w, format, seed):
    """Return a mask of one entry and a mask of its block."""
    is_chosen = np.arange(w.size).reshape(w.shape) == seed % w.size
    return is_chosen, reduce_blocks(is_chosen, format, np.max) > 0


@check(15, WEIGHTS, SIZES, SEEDS, st.sampled_from([0, 1e-30, 1e30]))
def test_a_zero_tiny_or_huge_block_has_its_own_bound(family, w, size, seed, factor):
    format = FAMILIES[family](size)
    _, block = choose_block(w, format, seed)
    w = np.where(block, draw(w.shape, "normal", seed) * np.float32(factor), w)
    found = round_trip(w, format)
    assert_within(found, w, find_bound(w, format))
    assert np.all(found[w == 0] == 0)


BAD = st.tuples(WEIGHTS, st.sampled_from([np.inf, -np.inf, np.nan]))


@check(15, BAD, SIZES, SEEDS)
def test_a_bad_entry_makes_its_block_nan(family, bad, size, seed):
    w, value = bad
    format = FAMILIES[family](size)
    entry, block = choose_block(w, format, seed)
    spoilt = np.where(entry, np.float32(value), w)
    if family == "nested":
        block = block.any(axis=(-2, -1), keepdims=True)
    expected = np.where(block, np.nan, round_trip(w, format))
    np.testing.assert_array_equal(round_trip(spoilt, format), expected)


@check(8, WEIGHTS, SIZES)
def test_jit_is_eager(family, w, size):
    format = FAMILIES[family](size)
    eager = quantize(w, format)
    jax.tree.map(np.testing.assert_array_equal, quantize_jitted(w, format), eager)
    # int8: XLA multiplies by 1/127, and the only scale of a matrix before the codes.
    # Nested: a fused multiplication and addition rounds a scale once instead of twice.
    num_roundings = {"int8": 5, "nested": 4}.get(family, 0)
    tolerance = num_roundings * EPS / 2 * find_largest_of_matrix(w)
    assert_within(dequantize_jitted(eager), eager.dequantize(), tolerance)


@check(5, WEIGHTS.filter(lambda w: w.ndim == 3), SIZES)
def test_a_stack_is_a_loop(family, w, size):
    format = FAMILIES[family](size)
    stack = quantize(w, format)
    for i, matrix in enumerate(w):
        part = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        assert_same(quantize(matrix, format), part, matrix, format)


@check(8, WEIGHTS, SIZES)
def test_a_transposed_layout_has_the_same_codes(family, w, size):
    format = FAMILIES[family](size)
    expected = quantize(w, format)
    found = quantize(np.ascontiguousarray(w.swapaxes(-1, -2)), format, layout="oi")
    assert_same(found.view("io", w.shape[-2:]), expected, w, format)
    values = found.dequantize().mT, expected.dequantize()
    assert_within(*values, 2 * find_nested_error(w, format))


@check(6, WEIGHTS_OF_ALL_DTYPES, SIZES)
def test_sizes_are_the_sizes_of_its_leaves(family, w, size):
    format = FAMILIES[family](size)
    array = quantize(w, format)
    values = array.dequantize()
    for name in ("shape", "ndim", "size", "dtype"):
        assert getattr(array, name) == getattr(values, name) == getattr(w, name)
    assert array.nbytes == sum(np.asarray(x).nbytes for x in jax.tree.leaves(array))
    *batch, m, n = w.shape
    num_scales = n * -(-m // format.find_block_size(m))
    num_codes = n * (m if family in ("int8", "fp8") else -(-m // 2))
    nested = num_scales + 4 * -(-num_scales // 256) + 4
    scales = {"nested": nested, "int4": 3 * num_scales}.get(family, 4 * num_scales)
    assert array.nbytes == np.prod(batch, dtype=int) * (num_codes + scales)
