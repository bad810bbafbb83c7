"""Pairs of factors and triplets of an SVD: splitting and masking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.factors import mask_rank

KEY = jax.random.key(0)


@pytest.mark.parametrize("absorb", ["both", "balanced", "left", "right"])
def test_split_svd_keeps_the_product(absorb):
    a = jax.random.normal(KEY, (2, 20, 15), jnp.float32)
    svd = jlora.truncated_svd(a, 15)
    u, v = jlora.split_svd(svd, absorb)
    np.testing.assert_allclose(jnp.matmul(u, v, precision="highest"), a, atol=1e-5)


@pytest.mark.wrong_types
def test_split_svd_refuses():
    a = jax.random.normal(KEY, (2, 20, 15), jnp.float32)
    svd = jlora.truncated_svd(a, 15)
    listed = "`absorb` must be one of 'both', 'left', 'right', got 'middle'"
    with pytest.raises(ValueError, match=listed):
        jlora.split_svd(svd, "middle")
    with pytest.raises(TypeError, match="`svd` must be a triple"):
        jlora.split_svd(a)


def test_mask_rank_keeps_the_leading_triplets_of_each_matrix():
    svd = jlora.truncated_svd(jax.random.normal(KEY, (3, 20, 15), jnp.float32), 4)
    ranks = [0, 3, 4]
    u, s, vt = jax.jit(mask_rank)(svd, jnp.array(ranks, jnp.int32))

    for i, rank in enumerate(ranks):
        np.testing.assert_array_equal(u[i, :, :rank], svd.u[i, :, :rank])
        np.testing.assert_array_equal(s[i, :rank], svd.s[i, :rank])
        np.testing.assert_array_equal(vt[i, :rank], svd.vt[i, :rank])
        for beyond in (u[i, :, rank:], s[i, rank:], vt[i, rank:]):
            assert not np.any(beyond)
