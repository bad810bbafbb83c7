"""Weights that stay in their file: `adapt` gives the same as for arrays in memory."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora.adaptation import LazyArray

KEY = jax.random.key(0)
DTYPES = [np.float32, ml_dtypes.bfloat16]


@pytest.fixture(params=DTYPES)
def weights(request, tmp_path):
    """Return named arrays, and the open checkpoint with them."""
    rng = np.random.default_rng(0)
    shapes = {"a.w": (20, 30), "b.w": (20, 30), "stack.w": (3, 8, 9), "bias": (3,)}
    arrays = {
        name: rng.standard_normal(shape).astype(request.param)
        for name, shape in shapes.items()
    }
    jlora.save_arrays(tmp_path / "m.safetensors", arrays)
    return arrays, jlora.checkpoints.open_checkpoint(tmp_path)


@pytest.mark.parametrize("init", ["pissa", "milora", "olora", "lora", "loftq"])
def test_an_open_checkpoint_gives_the_same_weights(weights, init):
    arrays, checkpoint = weights
    rule = jlora.Rule(r"\.w$", 4, init=init, layout="oi", scale=-0.5)
    plan = jlora.make_plan(checkpoint, rule)
    assert plan == jlora.make_plan(arrays, rule)
    lazy = jlora.adapt(checkpoint, plan, key=KEY)
    plain = jlora.adapt(arrays, plan, key=KEY)
    for name, weight in plain.items():
        if name == "bias":
            assert isinstance(lazy[name], LazyArray)
            np.testing.assert_array_equal(np.asarray(lazy[name]), weight)
            continue
        np.testing.assert_array_equal(lazy[name].u, weight.u)
        np.testing.assert_array_equal(lazy[name].v, weight.v)
        base = np.asarray(lazy[name].base)
        assert base.dtype == arrays[name].dtype
        np.testing.assert_array_equal(base, np.asarray(weight.base))
        # Only a quantised base has to be kept.
        assert isinstance(lazy[name].base, LazyArray) == (init != "loftq")
        assert lazy[name].shape == arrays[name].shape


def test_a_lazy_tree_is_merged_diagnosed_and_put_on_the_device(weights):
    arrays, checkpoint = weights
    plan = jlora.make_plan(checkpoint, jlora.Rule(r"\.w$", 4, layout="oi"))
    lazy = jlora.adapt(checkpoint, plan, key=KEY)
    merged = jlora.merge(lazy)
    eps = float(ml_dtypes.finfo(arrays["a.w"].dtype).eps)
    for name in ("a.w", "b.w", "stack.w"):
        # The base and the sum are rounded, each to a value of at most about 5.
        np.testing.assert_allclose(
            np.float64(np.asarray(merged[name])), np.float64(arrays[name]), atol=8 * eps
        )
    loaded = jax.tree.map(jnp.asarray, lazy)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
    one, other = (
        jlora.adaptation.read_base(t["a.w"], "float32") for t in (lazy, loaded)
    )
    np.testing.assert_array_equal(one, other)
    product = jlora.lift(lambda w: jnp.ones((2, 30), w.dtype) @ w.T)
    np.testing.assert_allclose(
        np.float64(np.asarray(product(loaded["a.w"]))),
        np.ones((2, 30)) @ np.float64(np.asarray(merged["a.w"])).T,
        atol=200 * eps,  # 30 terms of size one
    )


def test_ranks_by_rule_read_the_weights(weights):
    arrays, checkpoint = weights
    rule = jlora.Rule(r"\.w$", jlora.RankRule("energy", energy=0.6), layout="oi")
    assert jlora.make_plan(checkpoint, rule) == jlora.make_plan(arrays, rule)


def test_one_weight_is_read_at_a_time(weights, monkeypatch):
    _, checkpoint = weights
    read = []
    original = type(checkpoint).read_rows

    def count(self, name, start, stop):
        read.append(name)
        return original(self, name, start, stop)

    monkeypatch.setattr(type(checkpoint), "read_rows", count)
    plan = jlora.make_plan(checkpoint, jlora.Rule(r"\.w$", 4, layout="oi"))
    assert not read
    jlora.adapt(checkpoint, plan, key=KEY)
    assert sorted(read) == ["a.w", "b.w", "stack.w"]


def test_a_checkpoint_that_changes_is_refused(weights, tmp_path):
    _, checkpoint = weights
    plan = jlora.make_plan(checkpoint, jlora.Rule("a", 4, layout="oi"))
    lazy = jlora.adapt(checkpoint, plan, key=KEY)
    jlora.save_arrays(tmp_path / "m.safetensors", {"a.w": np.ones((2, 2))})
    with pytest.raises(ValueError, match="must not change while it is open"):
        np.asarray(lazy["a.w"].base)
