"""The contract of all transformations in `jlora.optimizers`, and a test of each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("standard_promotion")
KEY = jax.random.key(0)
M, N, RANK = 12, 10, 3
BASES = {"w": jnp.eye(N, 2)}


def scaled_gradient_descent(learning_rate):
    """Return a user's own rule for v: dv ← (uᵀu)⁻¹ dv, with the frozen u."""

    def update(updates, state, params=None, *, frozen, **extra_args):
        del params, extra_args

        def solve(path, update, rest):
            gram = rest.u.T @ rest.u
            v = -learning_rate * jnp.linalg.solve(gram, update.v)
            return dataclasses.replace(update, v=v)

        return jlora.optimizers.map_weights(solve, updates, frozen), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


# Each transformation with its trainable arrays, and a chain in which it descends.
OPTIMIZERS = {
    "scale_by_factor_gram": (
        "uv",
        lambda: optax.chain(jlora.optimizers.scale_by_factor_gram(), optax.sgd(0.05)),
    ),
    "scale_by_factor_gram, v": (
        "v",
        lambda: optax.chain(jlora.optimizers.scale_by_factor_gram(), optax.sgd(0.1)),
    ),
    "scale_by_factor_gram, core": (
        "core",
        lambda: optax.chain(jlora.optimizers.scale_by_factor_gram(), optax.sgd(0.1)),
    ),
    "project_out": (
        "v",
        lambda: optax.chain(
            optax.adam(0.05), jlora.optimizers.project_out(BASES, side="right")
        ),
    ),
    "lora_plus": (
        "uv",
        lambda: optax.chain(optax.adam(0.01), jlora.optimizers.lora_plus(4.0)),
    ),
    "scale_by_low_rank_adam": (
        "uv",
        lambda: optax.chain(
            jlora.optimizers.scale_by_low_rank_adam(2, key=KEY, update_every=5),
            optax.scale(-0.05),
        ),
    ),
    "add_decayed_delta": (
        "uv",
        lambda: optax.chain(
            optax.scale_by_adam(),
            jlora.optimizers.add_decayed_delta(0.1),
            optax.scale(-0.05),
        ),
    ),
    "riemannian_sgd": ("uv", lambda: jlora.optimizers.riemannian_sgd(0.1)),
    "riemannian_muon": (
        "uv",
        lambda: jlora.optimizers.riemannian_muon(optax.linear_schedule(0.1, 0, 150)),
    ),
    "a user's own": ("v", lambda: scaled_gradient_descent(0.1)),
    "optax lbfgs": ("uv", lambda: optax.lbfgs(memory_size=5)),
    "optax polyak_sgd": ("v", lambda: optax.polyak_sgd(max_learning_rate=0.1)),
    "optax reduce_on_plateau": (
        "v",
        lambda: optax.chain(
            optax.adam(0.05), optax.contrib.reduce_on_plateau(patience=5)
        ),
    ),
}
OURS = [name for name in OPTIMIZERS if not name.startswith("optax")]


def make_problem(trainable="uv", init="pissa", **settings):
    w = jax.random.normal(KEY, (M, N), jnp.float32)
    params = {"w": w, "b": jnp.zeros(N, jnp.float32)}
    rule = jlora.Rule("w", RANK, init=init, trainable=trainable, **settings)
    adapted = jlora.adapt(params, jlora.make_plan(params, rule), key=KEY)
    return adapted, (jnp.eye(M), w @ jnp.diag(jnp.linspace(0.2, 2, N)))


def loss(params, batch):
    x, y = batch
    return jnp.sum((x @ params["w"] + params["b"][None] - y) ** 2) / N


def take_gradient(trainable, frozen, batch):
    return jax.grad(lambda part: loss(jlora.join(part, frozen), batch))(trainable)


def assert_close(one, other, **settings):
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(a, b, **settings)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_descends_in_fit(name):
    trainable, make = OPTIMIZERS[name]
    adapted, batch = make_problem(trainable)
    result = jlora.fit(loss, adapted, make(), [batch] * 100, progress=False)
    assert result.stop_reason is None
    assert result.losses[-1] < 0.95 * result.losses[0]
    np.testing.assert_array_equal(result.adapted["w"].base, adapted["w"].base)
    np.testing.assert_array_equal(result.adapted["b"], adapted["b"])


@pytest.mark.parametrize("name", OURS)
def test_init_and_update_are_pure_and_jit_as_eager(name):
    trainable, make = OPTIMIZERS[name]
    adapted, batch = make_problem(trainable)
    own, frozen = jlora.split_trainable(adapted)
    gradient, optimizer = take_gradient(own, frozen, batch), make()

    def update(gradient, state, own, frozen):
        return optimizer.update(gradient, state, own, frozen=frozen)

    state = optimizer.init(own)
    before = jax.tree.map(_data, state)
    updates, new = update(gradient, state, own, frozen)
    jitted, new_jitted = jax.jit(update)(gradient, state, own, frozen)

    # Shapes, dtypes and structures of updates and states stay the same.
    shapes = [jax.eval_shape(lambda t: t, tree) for tree in (updates, own)]
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1])
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert_close(jax.tree.map(_data, state), before)
    # Two programs round differently. Steps are of size up to one.
    assert_close(updates, jitted, atol=1e-4)
    arrays = [jax.tree.map(_data, s) for s in (new, new_jitted)]
    assert_close(*arrays, atol=1e-4)


def _is_key(leaf):
    return isinstance(leaf, jax.Array) and jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def _data(leaf):
    return np.array(jax.random.key_data(leaf)) if _is_key(leaf) else np.array(leaf)


@pytest.mark.parametrize("name", OURS)
def test_a_zero_gradient_makes_no_step(name):
    trainable, make = OPTIMIZERS[name]
    adapted, _ = make_problem(trainable)
    own, frozen = jlora.split_trainable(adapted)
    zeros = jax.tree.map(jnp.zeros_like, own)
    optimizer = make()
    updates, _ = optimizer.update(zeros, optimizer.init(own), own, frozen=frozen)
    moved = jlora.join(optax.apply_updates(own, updates), frozen)["w"]
    before = jnp.matmul(*adapted["w"].factors, precision="highest")
    after = jnp.matmul(*moved.factors, precision="highest")
    # The Riemannian step decomposes the product again, with rounding of float32.
    np.testing.assert_allclose(after, before, atol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_bfloat16_and_plain_leaves(name):
    trainable, make = OPTIMIZERS[name]
    adapted, batch = make_problem(trainable)
    if name == "a user's own":
        pytest.skip("it is written for adapted weights only")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapted)
    own, frozen = jlora.split_trainable(half, also_train="b")
    gradient, optimizer = take_gradient(own, frozen, batch), make()

    updates, _ = optimizer.update(gradient, optimizer.init(own), own, frozen=frozen)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} <= {
        jnp.dtype(jnp.bfloat16),
        jnp.dtype(jnp.float32),
    }
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("trainable", ["u", "v", "uv"])
def test_factor_gram_is_the_pure_function(trainable):
    adapted, batch = make_problem(trainable)
    own, frozen = jlora.split_trainable(adapted)
    gradient = take_gradient(own, frozen, batch)
    optimizer = jlora.optimizers.scale_by_factor_gram(0.1)
    found, _ = optimizer.update(gradient, optimizer.init(own), own, frozen=frozen)

    whole = jax.grad(loss)(adapted, batch)["w"]
    expected = jlora.training.precondition_gradient(
        adapted["w"].factors, jlora.Factors(whole.u, whole.v), delta=0.1
    )
    for name in trainable:
        one, other = getattr(found["w"], name), getattr(expected, name)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_factor_gram_of_some_columns_and_of_a_core():
    adapted, batch = make_problem("v", num_columns=4)
    own, frozen = jlora.split_trainable(adapted)
    gradient = take_gradient(own, frozen, batch)
    optimizer = jlora.optimizers.scale_by_factor_gram(0.0)
    found, _ = optimizer.update(gradient, optimizer.init(own), own, frozen=frozen)
    u = np.asarray(adapted["w"].u, np.float64)
    expected = np.linalg.solve(u.T @ u, np.asarray(gradient["w"].v, np.float64))
    np.testing.assert_allclose(found["w"].v, expected, rtol=1e-4, atol=1e-5)

    adapted, batch = make_problem("core")
    own, frozen = jlora.split_trainable(adapted)
    gradient = take_gradient(own, frozen, batch)
    found, _ = optimizer.update(gradient, optimizer.init(own), own, frozen=frozen)
    u, v = (np.asarray(a, np.float64) for a in (adapted["w"].u, adapted["w"].v))
    core = np.asarray(gradient["w"].core, np.float64)
    expected = np.linalg.solve(u.T @ u, core) @ np.linalg.inv(v @ v.T)
    np.testing.assert_allclose(found["w"].core, expected, rtol=1e-4, atol=1e-5)


def test_one_riemannian_step_is_the_retraction_of_the_dense_gradient():
    adapted, batch = make_problem("uv")
    rate, w = 0.01, adapted["w"]
    own, frozen = jlora.split_trainable(adapted)
    optimizer = jlora.optimizers.riemannian_sgd(rate)
    gradient = take_gradient(own, frozen, batch)
    updates, _ = optimizer.update(gradient, optimizer.init(own), own)
    found = jlora.join(optax.apply_updates(own, updates), frozen)["w"]

    def dense_loss(product):
        x, y = batch
        return jnp.sum((x @ (w.base + product) - y) ** 2) / N

    product = w.u @ w.v
    svd = jlora.truncated_svd(product, RANK)
    tangent = jlora.training.project_tangent(svd, jax.grad(dense_loss)(product))
    expected = jlora.reconstruct(
        jlora.split_svd(jlora.training.retract(svd, tangent, -rate))
    )
    # The step is of size 0.1; damping by 1e-6 and float32 leave about 1e-5 of it.
    np.testing.assert_allclose(found.u @ found.v, expected, atol=2e-5)


def test_one_riemannian_muon_step_has_equal_singular_values():
    adapted, batch = make_problem("uv")
    own, frozen = jlora.split_trainable(adapted)
    optimizer = jlora.optimizers.riemannian_muon(0.1)
    gradient = take_gradient(own, frozen, batch)
    updates, _ = optimizer.update(gradient, optimizer.init(own), own)
    found = jlora.join(optax.apply_updates(own, updates), frozen)["w"]

    # The same with dense matrices in float64. In du = G vᵀ and dv = uᵀ G lies all of G
    # that the tangent needs: its products with both factors.
    w = adapted["w"]
    own_u, own_v, du, dv = (
        np.float64(each) for each in (w.u, w.v, gradient["w"].u, gradient["w"].v)
    )
    left, right = own_u @ np.linalg.pinv(own_u), np.linalg.pinv(own_v) @ own_v
    tangent = np.linalg.pinv(own_u).T @ dv + (np.eye(M) - left) @ (
        du @ np.linalg.pinv(own_v).T
    )
    assert right.shape == (N, N)
    u, s, vt = np.linalg.svd(tangent)
    assert (s[2 * RANK :] < 1e-6 * s[0]).all()
    polar = u[:, : 2 * RANK] @ vt[: 2 * RANK]
    u, s, vt = np.linalg.svd(own_u @ own_v - 0.1 * polar)
    expected = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
    # Singular values of 1 come from directions whose own are small: damping by 1e-6
    # and float32 turn these a little.
    np.testing.assert_allclose(found.u @ found.v, expected, atol=2e-4)


def test_low_rank_adam_is_adam_when_nothing_is_projected():
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    gradient = {"w": jax.random.normal(KEY, (4, 3)), "b": jnp.ones(3)}
    ours = jlora.optimizers.scale_by_low_rank_adam(3, key=KEY)
    theirs = optax.scale_by_adam()
    states = [ours.init(params), theirs.init(params)]
    for _ in range(3):
        found, states[0] = ours.update(gradient, states[0])
        expected, states[1] = theirs.update(gradient, states[1])
        # 1 − b2 ** count is about 1e-3, and float32 resolves it to 6e-5.
        assert_close(found, expected, rtol=1e-4)


def test_low_rank_adam_steps_lie_in_the_leading_directions():
    gradient = {"w": jax.random.normal(KEY, (30, 20))}
    optimizer = jlora.optimizers.scale_by_low_rank_adam(4, key=KEY, update_every=2)
    state = optimizer.init(gradient)
    for _ in range(3):
        step, state = optimizer.update(gradient, state)
    leading = jlora.truncated_svd(gradient["w"], 4).u
    outside = step["w"] - leading @ (leading.T @ step["w"])
    assert jnp.max(abs(outside)) < 1e-3 * jnp.max(abs(step["w"]))
    assert state.moments["w"].first.shape == (4, 20)


def test_protected_outputs_and_inputs_do_not_change():
    adapted, batch = make_problem("v")
    optimizer = OPTIMIZERS["project_out"][1]()
    result = jlora.fit(loss, adapted, optimizer, [batch] * 20, progress=False)
    np.testing.assert_array_equal(result.adapted["w"].v[:, :2], adapted["w"].v[:, :2])
    assert jnp.max(abs(result.adapted["w"].v - adapted["w"].v)) > 0.01

    adapted, batch = make_problem("u")
    protect = jlora.optimizers.project_out({"w": jnp.eye(M, 2)})
    optimizer = optax.chain(optax.adam(0.05), protect)
    result = jlora.fit(loss, adapted, optimizer, [batch] * 20, progress=False)
    x = jnp.eye(M)[:2]
    # u changes by rounding of the projection.
    np.testing.assert_allclose(x @ result.adapted["w"], x @ adapted["w"], atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda own: jlora.optimizers.scale_by_factor_gram().update(own, ()),
            ValueError,
            "`params` must be given to the update of scale_by_factor_gram, got None",
        ),
        (
            lambda own: jlora.optimizers.scale_by_factor_gram().update(own, (), own),
            ValueError,
            "`frozen` must be given to the update of scale_by_factor_gram, got None",
        ),
        (
            lambda own: jlora.optimizers.riemannian_sgd(0.1).init(own),
            ValueError,
            "^w: `trainable` must be 'uv' for riemannian_sgd, got 'v'",
        ),
        (
            lambda own: jlora.optimizers.project_out({"w": jnp.eye(M, 1)}).init(own),
            ValueError,
            "^w: `trainable` must be 'u' with all columns to protect the left side",
        ),
        (
            lambda own: jlora.optimizers.project_out({}, side="top"),
            ValueError,
            "`side` must be one of 'left', 'right', got 'top'",
        ),
        (
            lambda own: jlora.optimizers.scale_by_low_rank_adam(0, key=KEY),
            ValueError,
            "`rank` must be at least 1, got 0",
        ),
    ],
)
def test_refusals(call, error, text):
    own, _ = jlora.split_trainable(make_problem("v")[0])
    with pytest.raises(error, match=text):
        call(own)


def test_extra_arguments_reach_the_optimiser():
    seen = {}

    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: (), update)
    adapted, batch = make_problem("v")
    state, frozen = jlora.init_train(adapted, spy)
    jlora.train_step(loss, spy, state, frozen, batch)
    assert set(seen) == {"value", "grad", "value_fn", "frozen"}
    assert seen["frozen"]["w"].u.shape == (M, RANK)
