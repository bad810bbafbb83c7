"""Arguments that the SVDs refuse."""

import re

import jax
import jax.numpy as jnp
import pytest

import jlora

KEY = jax.random.key(0)


@pytest.mark.parametrize("rank", [0, -1, 51])
def test_rank_out_of_range(rank):
    a = jnp.ones((60, 50))
    for decompose in (
        jlora.truncated_svd,
        lambda a, r: jlora.randomized_svd(a, r, key=KEY),
    ):
        with pytest.raises(ValueError, match=f"`rank` must be at .*, got {rank}"):
            decompose(a, rank)


@pytest.mark.wrong_types
@pytest.mark.parametrize("rank", [2.0, True, "2", None])
def test_rank_of_the_wrong_kind(rank):
    with pytest.raises(TypeError, match="`rank` must be an integer"):
        jlora.truncated_svd(jnp.ones((4, 4)), rank)


@pytest.mark.wrong_types
def test_traced_rank():
    with pytest.raises(
        TypeError, match=r"`rank` must be a static .*static_argnames='rank'"
    ):
        jax.jit(jlora.truncated_svd)(jnp.ones((4, 4)), 2)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("a", "error", "text"),
    [
        (jnp.ones(4), ValueError, r"at least 2 axes, got shape \(4,\)"),
        (jnp.ones((4, 4), jnp.int32), TypeError, "real floating dtype, got int32"),
        (
            jnp.ones((4, 4), jnp.complex64),
            TypeError,
            "real floating dtype, got complex64",
        ),
        (jnp.ones((0, 4)), ValueError, "at least one row and one column"),
        ([[1.0]], TypeError, "NumPy or JAX array, got list"),
    ],
)
def test_bad_matrix(a, error, text):
    for decompose in (
        jlora.truncated_svd,
        lambda a, r: jlora.randomized_svd(a, r, key=KEY),
    ):
        with pytest.raises(error, match=text):
            decompose(a, 1)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"key": 0}, TypeError, "`key` must be a typed PRNG key"),
        ({"key": jax.random.split(KEY)}, ValueError, "`key` must be a single key"),
        (
            {"key": KEY, "method": "magic"},
            ValueError,
            "`method` must be one of 'krylov'",
        ),
        ({"key": KEY, "num_passes": 1}, ValueError, "`num_passes` must be at least 2"),
        ({"key": KEY, "block_size": 51}, ValueError, "`block_size` must be at most 50"),
        (
            {"key": KEY, "block_size": 1, "num_passes": 4},
            ValueError,
            "at least rank = 4 columns",
        ),
    ],
)
def test_bad_settings(kwargs, error, text):
    with pytest.raises(error, match=text):
        jlora.randomized_svd(jnp.ones((60, 50)), 4, **kwargs)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("key", "text"),
    [
        (
            jax.random.PRNGKey(0),
            "got a legacy uint32 key. Make one with jax.random.key(seed), or wrap it "
            "with jax.random.wrap_key_data.",
        ),
        (0, "got int. Make one with jax.random.key(seed)."),
        (jnp.zeros(2), "got ArrayImpl. Make one with jax.random.key(seed)."),
    ],
    ids=["legacy key", "seed", "floats"],
)
def test_a_wrong_key_is_named(key, text):
    expected = re.escape(f"`key` must be a typed PRNG key, {text}") + "$"
    with pytest.raises(TypeError, match=expected):
        jlora.randomized_svd(jnp.ones((6, 5)), 2, key=key)
