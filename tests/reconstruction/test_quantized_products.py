"""Products with a quantised base: equal to the dequantised one, without its copy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.quantization import fp8, int4, int8, nf4, quantize
from jlora.reconstruction import apply_quantized

FORMATS = [
    nf4(),
    nf4(block_size=7),  # blocks of an odd size: two of them end with a byte
    int8(),
    int8(block_size=32),
    int8(block_size=1024),  # several products for one scale
    int4(block_size=24),
    fp8(),
]


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.label)
@pytest.mark.parametrize("shape", [(130, 1100), (1301, 64), (33, 20), (2050, 513)])
def test_products_and_gradients_are_of_the_dequantised_base(format, shape):
    m, n = shape
    base = quantize(draw(shape), format)
    exact = base.dequantize()
    x, g = draw((6, m), 1), draw((6, n), 2)
    y, pull = jax.vjp(lambda x: apply_quantized(x, base), x)
    # Sums of up to 2050 products of float32, in another order.
    np.testing.assert_allclose(y, x @ exact, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(pull(g)[0], g @ exact.T, rtol=1e-5, atol=1e-4)

    z, pull = jax.vjp(lambda g: apply_quantized(g, base, is_transposed=True), g)
    np.testing.assert_allclose(z, g @ exact.T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(pull(x)[0], x @ exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("num_columns", [None, 5])
def test_factors_are_added_in_the_same_pass(is_transposed, num_columns):
    base = quantize(draw((3, 130, 1100)), nf4())
    exact = base.dequantize()
    exact = exact.mT if is_transposed else exact
    _, m, n = exact.shape
    x, g = draw((3, 6, m), 1), draw((3, 6, n), 2)
    u, v = draw((3, m, 4), 3), draw((3, 4, n), 4)

    def run(x, u, v):
        settings = {"num_columns": num_columns, "is_transposed": is_transposed}
        return apply_quantized(x, base, jlora.Factors(u, v), **settings)

    def run_plain(x, u, v):
        if num_columns is not None:
            fixed = jax.lax.stop_gradient(v[..., :-num_columns])
            v = jnp.concatenate([fixed, v[..., -num_columns:]], axis=-1)
        return x @ exact + (x @ u) @ v

    y, pull = jax.vjp(run, x, u, v)
    expected, pull_plain = jax.vjp(run_plain, x, u, v)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-4)
    for found, plain in zip(pull(g), pull_plain(g), strict=True):
        # The sums are of up to 1100 products.
        error = jnp.linalg.norm(found - plain) / jnp.linalg.norm(plain)
        assert error < 1e-5


def test_stacks_jit_and_vmap():
    base = quantize(draw((3, 64, 300)), nf4())
    x = draw((3, 5, 64), 1)
    expected = x @ base.dequantize()
    np.testing.assert_allclose(apply_quantized(x, base), expected, atol=1e-4)
    for run in (jax.jit(apply_quantized), jax.vmap(apply_quantized)):
        np.testing.assert_allclose(run(x, base), expected, atol=1e-4)
    empty = quantize(draw((0, 64, 300)), nf4())
    assert apply_quantized(x[:0], empty).shape == (0, 5, 300)


def test_bfloat16_and_vectors():
    base = quantize(draw((64, 300)).astype(jnp.bfloat16), int8())
    x = draw((5, 64)).astype(jnp.bfloat16)
    y = apply_quantized(x, base)
    assert y.dtype == jnp.bfloat16
    # A step of bfloat16.
    np.testing.assert_allclose(
        np.float32(y), np.float32(x @ base.dequantize()), rtol=0.01, atol=0.1
    )
    vector = apply_quantized(x[0], base)
    np.testing.assert_array_equal(vector, apply_quantized(x[:1], base)[0])


def test_the_base_has_no_gradient():
    base = quantize(draw((64, 20)), int4())
    total = lambda base: jnp.sum(apply_quantized(draw((3, 64)), base))  # noqa: E731
    found = jax.grad(total, allow_int=True)(base)
    assert not np.asarray(found.scales, np.float32).any()
    assert found.codes.dtype == jax.dtypes.float0


@pytest.mark.parametrize("is_backward", [False, True])
def test_no_float_copy_of_the_base_is_made(is_backward):
    size = 1024
    base = quantize(draw((size, size)), nf4())
    x = draw((16, size), 1)

    def run(x):
        return jnp.sum(apply_quantized(x, base) ** 2)

    run = jax.grad(run) if is_backward else run
    compiled = jax.jit(run).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * 4 * size**2
    whole = rf"(f32|bf16)\[(1,)?{size},{size}\]"
    assert not re.search(whole, compiled.as_text())


def test_apply_factors_takes_a_quantised_base():
    base = quantize(draw((64, 300)), nf4())
    factors = jlora.Factors(draw((64, 4), 1), draw((4, 300), 2))
    x = draw((5, 64), 3)

    def run(factors, base):
        return jnp.sum(jnp.sin(jlora.apply_factors(x, factors, base, scale=0.5)))

    found = jax.grad(run)(factors, base)
    expected = jax.grad(run)(factors, base.dequantize())
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_factors_of_another_shape_are_refused():
    base = quantize(draw((64, 20)), int8())
    factors = jlora.Factors(draw((20, 2)), draw((2, 64)))
    with pytest.raises(ValueError, match=r"shapes \[64, r\] and \[r, 20\]"):
        apply_quantized(draw((3, 64)), base, factors)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (np.ones((3, 5), np.float32), ValueError, r"must have shape \[t, 64\]"),
        (np.ones((3, 64), np.int32), TypeError, "must be a floating array, got int32"),
    ],
)
def test_bad_activations(x, error, text):
    with pytest.raises(error, match=text):
        apply_quantized(x, quantize(draw((64, 20)), int8()))
