"""`adapt`, `merge`, splitting and rules on a small tree of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

KEY = jax.random.key(0)


def make_params(dtype=jnp.float32):
    keys = iter(jax.random.split(jax.random.key(3), 4))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.float32).astype(dtype)

    return {
        "layers": [
            {"q": normal(12, 8), "bias": jnp.ones(8, dtype)},
            {"q": normal(12, 8)},
        ],
        "stack": normal(3, 10, 6),
        "counter": jnp.arange(3, dtype=jnp.int32),
    }


def adapt(params, *rules, key=KEY):
    return jlora.adapt(params, jlora.make_plan(params, rules), key=key)


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__
)
@pytest.mark.parametrize("init", ["pissa", "lora", "milora", "olora", "orthogonal"])
@pytest.mark.parametrize("scale", [1.0, 0.25, -2.0])
def test_adapt_keeps_the_weights_and_merge_restores_them(dtype, init, scale):
    params = make_params(dtype)
    adapted = adapt(params, jlora.Rule("q|stack", 4, init=init, scale=scale))
    merged = jlora.merge(adapted)

    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(merged), strict=True):
        assert old.dtype == new.dtype
        # The base and the merged weight are each rounded once.
        tolerance = 8 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            np.asarray(new, np.float64), np.asarray(old, np.float64), atol=tolerance
        )
    assert adapted["counter"] is params["counter"]


@pytest.mark.parametrize("scale", [1.0, 0.25, -2.0])
def test_milora_takes_the_last_triplets(scale):
    params = make_params()
    w = adapt(params, jlora.Rule("stack", 2, init="milora", scale=scale))["stack"]
    u, s, vt = np.linalg.svd(
        np.asarray(params["stack"], np.float64), full_matrices=False
    )
    minor = (u * s[:, None])[..., -2:] @ vt[:, -2:]
    product = scale * np.asarray(w.u, np.float64) @ np.asarray(w.v, np.float64)
    np.testing.assert_allclose(product, minor, atol=1e-5)
    np.testing.assert_allclose(w.base, np.asarray(params["stack"]) - minor, atol=1e-5)


def test_olora_takes_the_leading_part_of_a_qr():
    params = make_params()
    w = adapt(params, jlora.Rule("stack", 2, init="olora", scale=0.5))["stack"]
    q, r = np.linalg.qr(np.asarray(params["stack"], np.float64).mT)
    product = np.asarray(w.u, np.float64) @ np.asarray(w.v, np.float64)
    np.testing.assert_allclose(product, (q[..., :2] @ r[:, :2]).mT, atol=1e-5)
    np.testing.assert_allclose(w.v @ w.v.mT, np.tile(np.eye(2), (3, 1, 1)), atol=1e-5)
    np.testing.assert_allclose(
        w.base, np.asarray(params["stack"]) - 0.5 * product, atol=1e-5
    )


def test_orthogonal_has_two_factors_and_no_product():
    params = make_params()
    w = adapt(params, jlora.Rule("stack", 4, init="orthogonal"))["stack"]
    np.testing.assert_allclose(jnp.matmul(w.u, w.v, precision="highest"), 0, atol=1e-6)
    assert w.base is not None
    assert bool((w.base == params["stack"]).all())

    # Each half of a factor is Gaussian with variance 1/2 over a hundred.
    for factor in (w.u, w.v.mT):
        size = float(jnp.mean(jnp.sum(factor**2, axis=-1)))
        assert 0.5 * 2 / 100 < size < 2 * 2 / 100
    assert not np.allclose(w.u[0], w.u[1])


def test_residual_dropped_is_the_best_approximation():
    params = make_params()
    adapted = adapt(
        params, jlora.Rule("stack", 3, init=jlora.initializers.pissa(residual=False))
    )
    assert adapted["stack"].base is None
    svd = jlora.truncated_svd(params["stack"], 3)
    best = jnp.matmul(svd.u * svd.s[:, None], svd.vt, precision="highest")
    np.testing.assert_allclose(jlora.merge(adapted)["stack"], best, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "shapes"),
    [
        (jlora.Rule("q", 3), [(3, 8), (3, 8)]),
        (jlora.Rule("q", 3, trainable="u"), [(12, 3), (12, 3)]),
        (jlora.Rule("q", 3, trainable="uv"), [(12, 3), (3, 8), (12, 3), (3, 8)]),
        (jlora.Rule("q", 3, num_columns=2), [(3, 2), (3, 2)]),
        (jlora.Rule("q", 3, num_columns=8), [(3, 8), (3, 8)]),
    ],
)
def test_split_selects_the_trainable_arrays_and_join_is_its_inverse(rule, shapes):
    adapted = adapt(make_params(), rule)
    trainable, frozen = jlora.split_trainable(adapted)
    assert [leaf.shape for leaf in jax.tree.leaves(trainable)] == shapes
    joined = jlora.join(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(adapted)
    for old, new in zip(jax.tree.leaves(adapted), jax.tree.leaves(joined), strict=True):
        assert bool((old == new).all())


def test_also_train_takes_plain_floating_leaves():
    trainable, frozen = jlora.split_trainable(make_params(), also_train=".*")
    assert len(jax.tree.leaves(trainable)) == 4
    assert [leaf.dtype for leaf in jax.tree.leaves(frozen)] == [jnp.int32]
    with pytest.raises(ValueError, match="`adapted` must hold something to train"):
        jlora.split_trainable(make_params())


def test_keys_follow_the_path():
    params = make_params()
    rule = jlora.Rule("q|stack", 3, init="lora")
    one, again = adapt(params, rule), adapt(params, rule)
    fewer = adapt({"layers": params["layers"][:1]}, rule)
    other = adapt(params, rule, key=jax.random.key(1))
    first = one["layers"][0]["q"].u
    assert bool((first == again["layers"][0]["q"].u).all())
    assert bool((first == fewer["layers"][0]["q"].u).all())
    assert not bool((first == other["layers"][0]["q"].u).any())
    assert not bool((first == one["layers"][1]["q"].u).any())


def test_linear_and_on_merged_agree():
    params = make_params()
    adapted = adapt(params, jlora.Rule("q", 3))
    x = jax.random.normal(KEY, (4, 12), jnp.float32)

    def model(params, x):
        return jlora.linear(x, params["layers"][0]["q"])

    plain, thin = model(params, x), model(adapted, x)
    np.testing.assert_allclose(thin, plain, atol=1e-5)
    np.testing.assert_allclose(jlora.on_merged(model)(adapted, x), plain, atol=1e-5)
    half = adapt(
        make_params(jnp.bfloat16),
        jlora.Rule("q", 3, init=jlora.initializers.pissa(residual=False)),
    )
    assert model(half, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_first_matching_rule_wins_and_the_plan_is_hashable():
    params = make_params()
    rules = [jlora.Rule("layers/1", 2), jlora.Rule("q", 4)]
    plan = jlora.make_plan(params, rules)
    assert [(entry.path, entry.rule.rank) for entry in plan.entries] == [
        ("layers/0/q", 4),
        ("layers/1/q", 2),
    ]
    assert hash(plan) == hash(jlora.make_plan(params, rules))
    everything = jlora.make_plan(params, jlora.Rule(".*", 2))
    assert [path for path, _ in everything.skipped] == ["counter", "layers/0/bias"]
    assert "not adapted, it has dtype int32" in str(everything)


def test_adapt_under_jit():
    params = {"q": make_params()["layers"][0]["q"]}
    plan = jlora.make_plan(params, jlora.Rule("q", 3))
    traced = jax.jit(lambda params: jlora.adapt(params, plan, key=KEY))(params)
    np.testing.assert_allclose(jlora.merge(traced)["q"], params["q"], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("(", 2), ValueError, "`pattern` must be a regular expression"),
        ((3, 2), TypeError, "`pattern` must be a string"),
        (("q", 0), ValueError, "`rank` must be at least 1, got 0"),
        (("q", 1.5), TypeError, "`rank` must be an integer, got 1.5"),
        (
            ("q", 2, {"init": "magic"}),
            ValueError,
            "`init` must be one of 'corda', 'difference', 'eva', 'loftq'",
        ),
        (
            ("q", 2, {"trainable": "w"}),
            ValueError,
            "`trainable` must be one of 'v', 'u', 'uv'",
        ),
        (
            ("q", 3, {"init": "orthogonal"}),
            ValueError,
            "`rank` must be a multiple of 2 for init='orthogonal', got 3",
        ),
        (("q", 2, {"scale": 0.0}), ValueError, "`scale` must be finite and not zero"),
        (("q", 2, {"scale": "1"}), TypeError, "`scale` must be a Python number"),
        (("q", 2, {"num_columns": 0}), ValueError, "`num_columns` must be at least 1"),
        (
            ("q", 2, {"num_columns": 1, "trainable": "u"}),
            ValueError,
            r"`trainable \(with num_columns\)`",
        ),
        (
            ("q", 2, {"init": 3}),
            TypeError,
            "`init` must be a name, an initializer or a",
        ),
    ],
)
def test_bad_rule(arguments, error, text):
    *positional, keywords = (
        arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    )
    with pytest.raises(error, match=text):
        jlora.Rule(*positional, **keywords)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (
            jlora.Rule("layer/1/k", 2),
            "'layer/1/k' without one. The nearest paths are: layers/1/q, ",
        ),
        (jlora.Rule("counter", 2), r"counter \(has dtype int32"),
        (jlora.Rule("q", 9), r"layers/0/q: `rank` must be at most min\(m, n\) = 8"),
        (
            jlora.Rule("q", 2, num_columns=9),
            "layers/0/q: `num_columns` must be at most 8",
        ),
    ],
)
def test_plan_that_cannot_be_made(rule, text):
    with pytest.raises(ValueError, match=text):
        jlora.make_plan(make_params(), rule)


def test_adapt_refuses_nan_other_trees_and_wrong_kinds():
    params = {"q": jnp.ones((4, 4)).at[0, 0].set(jnp.nan)}
    plan = jlora.make_plan(params, jlora.Rule("q", 2))

    with pytest.raises(
        ValueError, match="`q` must be finite, got 1 NaN or Inf among 16"
    ):
        jlora.adapt(params, plan, key=KEY)
    with pytest.raises(
        ValueError, match="must hold every path of the plan, got none at q"
    ):
        jlora.adapt({"r": jnp.ones((4, 4))}, plan, key=KEY)
    with pytest.raises(ValueError, match=r"q: `params` must have shape \(4, 4\)"):
        jlora.adapt({"q": jnp.ones((5, 4))}, plan, key=KEY)

    with pytest.raises(TypeError, match=r"`plan` must be a Plan, got"):
        jlora.adapt(params, jlora.Rule("q", 2), key=KEY)
    with pytest.raises(TypeError, match="`rules` must hold"):
        jlora.make_plan(params, ["q"])
