"""Numbers that a function takes: one check for all, in one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.array_functions import as_svd, draw, draw_svd

FACTORS = jlora.Factors(draw(3, 6, 3), draw(3, 3, 5))
ONE = jlora.Factors(FACTORS.u[0], FACTORS.v[0])
SVD = as_svd(*draw_svd(6, 5, 3))
DENSE = draw(6, 5)
TANGENT = jlora.training.project_tangent(SVD, DENSE)
BANK_INDEX = jnp.asarray([0, 1])

# Each takes one number.
CALLS = {
    "reconstruct scale": lambda s: jlora.reconstruct(FACTORS, scale=s),
    "unmerge scale": lambda s: jlora.reconstruction.unmerge(
        FACTORS, draw(3, 6, 5), scale=s
    ),
    "apply_factors scale": lambda s: jlora.apply_factors(
        draw(3, 2, 6), FACTORS, scale=s
    ),
    "apply_many scale": lambda s: jlora.apply_many(
        draw(2, 6), FACTORS, BANK_INDEX, scale=s
    ),
    "concatenate_factors weights": lambda s: jlora.concatenate_factors(
        [ONE, ONE], [1.0, s]
    ),
    "precondition_gradient delta": lambda s: jlora.training.precondition_gradient(
        ONE, ONE, delta=s
    ),
    "retract step": lambda s: jlora.training.retract(SVD, TANGENT, s),
    "integrate_low_rank tolerance": lambda s: jlora.training.integrate_low_rank(
        SVD, DENSE, tolerance=s
    ),
}
NOT_NEGATIVE = ("precondition_gradient delta", "integrate_low_rank tolerance")
# A number for each adapter of the bank is allowed there.
TAKES_ONE_EACH = "apply_many scale"


@pytest.mark.wrong_types
@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (5,), (6, 1), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_an_array_of_numbers_is_refused(name, shape):
    if (name, shape) == (TAKES_ONE_EACH, (3,)):
        pytest.skip("one number for each adapter")
    with pytest.raises(ValueError, match=r"must be a number or .*got shape"):
        CALLS[name](jnp.ones(shape))


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    "value", [2 + 3j, None, "1", True, [1.0], jnp.asarray(1j), jnp.asarray(True)]
)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_real_number_is_refused(name, value):
    with pytest.raises((TypeError, ValueError), match=r"must be a (real )?number or"):
        CALLS[name](value)


@pytest.mark.wrong_types
@pytest.mark.parametrize("value", [-1.0, np.nan, jnp.asarray(-1.0)])
@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_a_negative_number_is_refused(name, value):
    with pytest.raises(ValueError, match="must be at least 0, got"):
        CALLS[name](value)


@pytest.mark.parametrize("name", CALLS)
def test_every_kind_of_real_number_is_the_same(name):
    expected = jax.tree.leaves(CALLS[name](1.0))
    numbers = (1, np.float32(1), np.float64(1), np.int64(1), jnp.asarray(1.0))
    found = [CALLS[name](number) for number in numbers]
    found.append(jax.jit(CALLS[name])(1.0))
    for result in found:
        for one, other in zip(jax.tree.leaves(result), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.ones((4, 5), np.longdouble), "real floating dtype of 16 to 64 bits, got "),
        (np.ones((4, 5), ">f4"), "real floating dtype of 16 to 64 bits, got >f4"),
        (jnp.ones((4, 5), jnp.float8_e4m3fn), "16 to 64 bits, got float8_e4m3fn"),
        (np.ones((4, 5), int), "must have a real floating dtype, got int64"),
        (np.ma.masked_array(np.ones((4, 5))), "NumPy or JAX array, got MaskedArray"),
        ([[1.0]], "must be a NumPy or JAX array, got list"),
    ],
)
def test_arrays_that_jlora_does_not_compute_with(array, text):
    for call in (
        lambda: jlora.truncated_svd(array, 1),
        lambda: jlora.reconstruct(jlora.Factors(array, np.ones((5, 3), np.float32))),
        lambda: jlora.apply_factors(array, jlora.Factors(draw(5, 2), draw(2, 3))),
    ):
        with pytest.raises(TypeError, match=text):
            call()


def test_an_array_of_another_library_is_named():
    class Tensor:
        shape, dtype = (4, 5), "torch.float32"

    with pytest.raises(TypeError, match="`a` must be a NumPy or JAX array, got Tensor"):
        jlora.truncated_svd(Tensor(), 1)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        (jnp.asarray(1.0), TypeError, "a sequence of numbers or an array"),
        (jnp.ones((2, 2)), TypeError, "a sequence of numbers or an array"),
        (2.0, TypeError, "a sequence of numbers or an array"),
        ([1.0], ValueError, "one number for each of 2 factors, got 1"),
    ],
)
def test_weights_that_are_no_list_of_numbers(weights, error, text):
    with pytest.raises(error, match=text):
        jlora.concatenate_factors([ONE, ONE], weights)


@pytest.mark.parametrize("batch", [(0,), (0, 3), (3, 0)], ids=str)
def test_empty_batches_give_empty_results(batch):
    w = jnp.zeros((*batch, 1100, 8))
    factors = jlora.Factors(jnp.zeros((*batch, 1100, 2)), jnp.zeros((*batch, 2, 8)))
    for result in (
        jlora.quantization.quantize_int8(w),
        jlora.quantization.quantize_nf4(w),
        jlora.reconstruct(factors, w, columns=3),
        jlora.reconstruct(factors, w),
        jlora.reconstruction.unmerge(factors, w, columns=[1, 4]),
    ):
        assert result.shape == w.shape


def test_float16_thin_products_may_leave_its_range():
    x = jnp.full((2, 300), 200.0, jnp.float16)
    factors = jlora.Factors(
        jnp.full((300, 1), 2.0, jnp.float16), jnp.full((1, 4), 0.01, jnp.float16)
    )
    # x @ u is 1.2e5, above 65504; the product is 1.2e3.
    expected = 300 * 200.0 * 2.0 * float(jnp.float16(0.01))
    bank = jlora.stack_factors([factors])
    bank = jax.tree.map(lambda a: a.astype(jnp.float16), bank)
    index = jnp.zeros(2, jnp.int32)
    for y in (
        jlora.apply_factors(x, factors),
        jlora.apply_many(x, bank, index, implementation="gather"),
        jlora.apply_many(x, bank, index, implementation="sort"),
    ):
        np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2e-3)
