"""Random factors and SVDs, and their products in float64."""

import jax
import jax.numpy as jnp
import numpy as np

import jlora

DTYPES = [
    jnp.float32,
    jnp.bfloat16,
    *([jnp.float64] if jax.config.jax_enable_x64 else []),
]


def make_factors(m, n, r, dtype=jnp.float32, batch=()):
    keys = jax.random.split(jax.random.key(0), 2)
    u = jax.random.normal(keys[0], (*batch, m, r), jnp.float32).astype(dtype)
    return jlora.Factors(
        u, jax.random.normal(keys[1], (*batch, r, n), jnp.float32).astype(dtype)
    )


def multiply_out(factors):
    return np.asarray(factors.u, np.float64) @ np.asarray(factors.v, np.float64)


def make_svd(m, n, r, dtype=jnp.float32, batch=(), seed=0):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((*batch, m, r)) @ rng.standard_normal((*batch, r, n))
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    parts = u[..., :r], s[..., :r], vt[..., :r, :]
    return jlora.SVD(*(jnp.asarray(part, jnp.float32).astype(dtype) for part in parts))


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def to_float64(array):
    return np.asarray(array, np.float64)


def dense(svd):
    u, s, vt = map(to_float64, svd)
    return (u * s[..., None, :]) @ vt


def product(x, y):
    return to_float64(x) @ to_float64(y)
