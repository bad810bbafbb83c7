"""Trees that are odd: paths and arrays that occur twice, weights adapted already."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

KEY = jax.random.key(0)
W = jax.random.normal(KEY, (12, 8), jnp.float32)


def adapt(params, *rules, **settings):
    plan = jlora.make_plan(params, rules)
    return jlora.adapt(params, plan, key=KEY, **settings)


@pytest.mark.parametrize(
    "params",
    [
        {"a": {"b": W}, "a/b": W + 1},
        {"a/b": W, "a": {"b": W + 1}},
        {"x": [W], "x/0": W + 1},
    ],
)
def test_two_leaves_with_one_path_are_refused(params):
    with pytest.raises(ValueError, match="a path of its own, got two"):
        jlora.make_plan(params, jlora.Rule(".*", 2))


def test_tied_weights_are_said():
    params = {"embed": W, "head": W, "other": W + 1, "copy": jnp.copy(W)}
    plan = jlora.make_plan(params, jlora.Rule("embed|other", 2))
    assert plan.tied == (("embed", "head"),)
    assert "embed, head: one array now, different weights" in str(plan)
    assert jlora.make_plan(params, jlora.Rule("other", 2)).tied == ()
    assert hash(plan) == hash(dataclasses.replace(plan))

    both = jlora.make_plan(params, jlora.Rule("embed|head", 2))
    with pytest.raises(ValueError, match=r"embed.*head|head.*embed"):
        jlora.adapt(params, both, key=KEY, donate=True)


def test_an_adapted_weight_is_not_adapted_again():
    adapted = adapt({"w": W, "v": W + 1}, jlora.Rule("w", 2))
    plan = jlora.make_plan(adapted, jlora.Rule(".*", 2))
    assert [entry.path for entry in plan.entries] == ["v"]
    assert plan.skipped == (("w", "is adapted already"),)
    with pytest.raises(ValueError, match=r"w \(is adapted already\)"):
        jlora.make_plan(adapted, jlora.Rule("w", 2))

    twice = jlora.adapt(adapted, plan, key=KEY)
    assert isinstance(twice["v"], jlora.AdaptedWeight)
    assert twice["w"] is adapted["w"] or bool((twice["w"].u == adapted["w"].u).all())


def test_a_plan_of_another_tree_is_refused():
    plan = jlora.make_plan({"w": W}, jlora.Rule("w", 2))
    with pytest.raises(ValueError, match="`params` must hold every path of the plan"):
        jlora.adapt({"v": W}, plan, key=KEY)
    with pytest.raises(ValueError, match="w: `params` must have shape"):
        jlora.adapt({"w": W.T}, plan, key=KEY)


@pytest.mark.parametrize(
    ("shape", "rank", "layouts"),
    [
        ((256, 8, 32), 8, ("'ioo'", "'iio'", "'bio'")),
        ((3, 3, 16, 32), 4, ("'iiio'", "'bbio'")),
        ((1, 1, 16, 32), 4, ("'iiio'", "'bbio'")),
        ((5, 5, 5, 4, 8), 2, ("'bbbio'",)),
    ],
    ids=str,
)
def test_a_layout_that_has_to_be_given(shape, rank, layouts):
    params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    with pytest.raises(ValueError, match="kernel: `layout` must be given") as caught:
        jlora.make_plan(params, jlora.Rule("kernel", rank))
    for layout in layouts:
        assert layout in str(caught.value)
        text = layout.strip("'")
        plan = jlora.make_plan(params, jlora.Rule("kernel", 2, layout=text))
        assert plan.entries[0].rule.layout == text


@pytest.mark.parametrize("shape", [(24, 512, 512), (4, 8, 64, 64), (3, 10, 6)], ids=str)
def test_an_ordinary_stack_needs_no_layout(shape):
    params = {"stack": jax.ShapeDtypeStruct(shape, jnp.float32)}
    assert jlora.make_plan(params, jlora.Rule("stack", 4)).entries[0].rank == 4


@pytest.mark.parametrize(
    "leaf",
    [
        np.ones((4, 3), ">f4"),
        np.ones((4, 3), np.longdouble),
        jnp.ones((4, 3), jnp.float8_e4m3fn),
        "text",
        jnp.tanh,
        KEY,
    ],
    ids=lambda leaf: type(leaf).__name__,
)
def test_leaves_that_are_no_weights_are_skipped_with_the_reason(leaf):
    params = {"w": W, "odd": leaf}
    plan = jlora.make_plan(params, jlora.Rule(".*", 2))
    assert [entry.path for entry in plan.entries] == ["w"]
    assert [path for path, _ in plan.skipped] == ["odd"]
    assert jlora.adapt(params, plan, key=KEY)["odd"] is leaf


def test_an_adapted_weight_is_no_array_and_equals_itself():
    w = adapt({"w": W}, jlora.Rule("w", 2))["w"]
    with pytest.raises(TypeError, match=r"jlora\.lift"):
        np.asarray(w)
    assert w == w
    assert w != dataclasses.replace(w)
    assert len({w, w}) == 1


@pytest.mark.parametrize("name", ["bias", "scale", "norm_scale", "layer/bias/value"])
def test_stacked_vectors_are_skipped_by_their_name(name):
    params = {"w": W, name: jnp.ones((12, 8))}
    plan = jlora.make_plan(params, jlora.Rule(".*", 2))
    assert [entry.path for entry in plan.entries] == ["w"]
    assert plan.skipped[0][0] == name
    assert "a stack of vectors" in plan.skipped[0][1]

    word = "scale" if "scale" in name else "bias"
    named = jlora.make_plan(params, jlora.Rule(word, 2))
    assert [entry.path for entry in named.entries] == [name]


def test_one_small_head_is_told_what_to_do():
    params = {"w": W, "head": jnp.ones((16, 3))}
    with pytest.raises(ValueError, match=r"^head: .*rule of its own.*or exclude it"):
        jlora.make_plan(params, jlora.Rule(".*", 4))
    rules = [jlora.Rule("head", 2), jlora.Rule(".*", 4)]
    assert [entry.rank for entry in jlora.make_plan(params, rules).entries] == [2, 4]


def test_a_cast_of_all_leaves_casts_the_weight():
    adapted = adapt({"w": W}, jlora.Rule("w", 2))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapted)
    assert half["w"].dtype == jnp.bfloat16
    assert jlora.merge(half)["w"].dtype == jnp.bfloat16
    assert repr(half["w"]).startswith("bfloat16[12,8]")


def test_stacked_adapters_are_merged_under_vmap():
    adapted = adapt({"w": W}, jlora.Rule("w", 2))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), adapted)
    with pytest.raises(ValueError, match=r"`scale` must be a number.*Use jax\.vmap"):
        jlora.merge(stacked)
    merged = jax.vmap(jlora.merge)(stacked)["w"]
    np.testing.assert_array_equal(merged[1], jlora.merge(adapted)["w"])


def test_a_merged_weight_beyond_float16_is_refused():
    adapted = adapt({"w": 100 * W.astype(jnp.float16)}, jlora.Rule("w", 2))
    large = {"w": dataclasses.replace(adapted["w"], scale=jnp.float32(1e4))}
    with pytest.raises(ValueError, match=r"^w: .*must fit in float16.*Cast the tree"):
        jlora.merge(large)
    assert bool(jnp.isfinite(jlora.merge(adapted)["w"]).all())


def test_print_of_an_adapted_tree_is_short():
    assert len(str(adapt({"w": W}, jlora.Rule("w", 2)))) < 120
