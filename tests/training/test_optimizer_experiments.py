"""One ill-conditioned planted problem for each optimiser: what it is for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("standard_promotion")
M, N, RANK = 24, 16, 3
KEY = jax.random.key(0)


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def adapt(w, **rule):
    params = {"w": jnp.asarray(w)}
    rule = jlora.Rule("w", RANK, **{"init": "lora", "trainable": "uv"} | rule)
    return jlora.adapt(params, jlora.make_plan(params, rule), key=KEY)


def loss(params, batch):
    x, y = batch
    return jnp.mean((x @ params["w"] - y) ** 2)


def train(adapted, optimizer, batch, steps=200, **settings):
    batches = [batch] * steps
    settings = {"progress": False, "steps_per_dispatch": 50, **settings}
    return jlora.fit(loss, adapted, optimizer, batches, **settings)


def measure(result, teacher):
    """Return the relative error of the merged weight, inf after divergence."""
    w = jlora.merge(result.adapted)["w"]
    error = float(jnp.linalg.norm(w - teacher) / jnp.linalg.norm(teacher))
    return error if result.stop_reason is None else np.inf


def find_best(adapted, make_optimizer, rates, batch, teacher, **settings):
    """Return the lowest error over learning rates."""
    return min(
        measure(train(adapted, make_optimizer(rate), batch, **settings), teacher)
        for rate in rates
    )


def unbalance(adapted, factor):
    """Return the same product with u and v of very different sizes."""
    w = adapted["w"]
    return {"w": dataclasses.replace(w, u=w.u * factor, v=w.v / factor)}


def make_low_rank_problem():
    """Return (adapted, batch, teacher): factors of PiSSA, and another product."""
    teacher = draw((M, RANK), 1) @ draw((RANK, N), 2) / M**0.5
    adapted = adapt(teacher + 0.3 * draw((M, N), 3) / M**0.5, init="pissa")
    adapted["w"] = dataclasses.replace(adapted["w"], base=jnp.zeros((M, N)))
    x = np.eye(M, dtype=np.float32) * M**0.5
    return adapted, (x, x @ teacher), teacher


@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_riemannian_steps_do_not_depend_on_the_sizes_of_the_factors(factor):
    adapted, batch, teacher = make_low_rank_problem()
    start = unbalance(adapted, factor)
    # One rate for both: a gradient step on the product itself.
    found = train(start, jlora.optimizers.riemannian_sgd(2.0), batch, 100)
    assert measure(found, teacher) < 1e-3


def test_gradient_descent_depends_on_the_sizes_of_the_factors():
    adapted, batch, teacher = make_low_rank_problem()
    rates = np.geomspace(1e-4, 1, 9)
    settings = {"steps": 100}
    balanced = find_best(adapted, optax.sgd, rates, batch, teacher, **settings)
    start = unbalance(adapted, 30.0)
    skewed = find_best(start, optax.sgd, rates, batch, teacher, **settings)
    assert balanced < 0.05
    assert skewed > 3 * balanced


def test_riemannian_muon_learns_directions_of_small_inputs():
    adapted, _, teacher = make_low_rank_problem()
    # Inputs whose sizes fall from 1 to 1/30: their gradients fall by 900.
    x = np.diag(np.geomspace(1, 1 / 30, M).astype(np.float32)) * M**0.5
    batch = x, x @ teacher
    decayed = lambda rate: optax.linear_schedule(rate, 0.0, 200)  # noqa: E731

    def muon(rate):
        return jlora.optimizers.riemannian_muon(decayed(rate))

    found = find_best(adapted, muon, (0.05, 0.1), batch, teacher)
    rates = np.geomspace(0.3, 10, 4)
    plain = find_best(adapted, jlora.optimizers.riemannian_sgd, rates, batch, teacher)
    assert found < 0.8 * plain  # 0.64 was measured

    # The same schedule serves a loss of another scale.
    def large_loss(params, batch):
        return 1e4 * loss(params, batch)

    batches = [batch] * 200
    other = jlora.fit(large_loss, adapted, muon(0.05), batches, progress=False)
    same = train(adapted, muon(0.05), batch)
    np.testing.assert_allclose(
        measure(other, teacher), measure(same, teacher), rtol=0.05
    )


def test_lora_plus_learns_faster_from_a_zero_v():
    # A wide layer whose change lies in the span of u: v has far to go, u has not.
    m = 1024
    w = draw((m, N)) / m**0.5
    adapted = adapt(w)
    teacher = w + 3 * np.asarray(adapted["w"].u) @ draw((RANK, N), 2)
    x = draw((512, m), 3)
    batch = x, x @ teacher
    rates = np.geomspace(1e-4, 0.3, 9)

    def plus(rate):
        return optax.chain(optax.adam(rate), jlora.optimizers.lora_plus(16.0))

    settings = {"steps": 20, "steps_per_dispatch": 20}
    plain = find_best(adapted, optax.adam, rates, batch, teacher, **settings)
    found = find_best(adapted, plus, rates, batch, teacher, **settings)
    assert found < 0.85 * plain  # 0.78 was measured


def test_decay_of_the_delta_generalises_and_decay_of_the_factors_does_not():
    # Fewer noisy examples than inputs: the change is not determined by them.
    w = draw((M, N))
    teacher = w + 0.1 * draw((M, RANK), 1) @ draw((RANK, N), 2)
    x = draw((M // 2, M), 3)
    batch = x, x @ teacher + 2 * draw((M // 2, N), 4)
    adapted = adapt(w, init="pissa")

    def decayed(transformation):
        return optax.chain(optax.scale_by_adam(), transformation, optax.scale(-0.01))

    errors = {
        name: measure(train(adapted, decayed(each), batch, 600), teacher)
        for name, each in (
            ("none", optax.identity()),
            ("delta", jlora.optimizers.add_decayed_delta(3.0)),
            ("factors", optax.add_decayed_weights(3.0)),
        )
    }
    assert errors["delta"] < 0.9 * errors["none"]
    assert errors["factors"] > 2 * errors["delta"]


def test_clipping_each_factor_keeps_the_small_gradient():
    adapted, batch, teacher = make_low_rank_problem()
    # u is large, so the gradient of v is: a common norm leaves nothing for u.
    start = unbalance(adapted, 10.0)
    rates = np.geomspace(0.01, 30, 8)

    def clip(transformation):
        return lambda rate: optax.chain(transformation, optax.sgd(rate))

    settings = {"steps": 300}
    each, common = (
        find_best(start, clip(transformation), rates, batch, teacher, **settings)
        for transformation in (
            optax.clip_by_block_rms(1e-3),
            optax.clip_by_global_norm(1e-3 * (RANK * (M + N)) ** 0.5),
        )
    )
    assert each < 0.5 * common


def test_protected_inputs_are_not_forgotten():
    w = draw((M, N))
    basis = np.linalg.qr(draw((M, 8), 1))[0]  # inputs of the old domain
    adapted = adapt(w, trainable="u", init="pissa")
    old = draw((32, 8), 2) @ basis.T
    new = draw((64, M), 3) + 2 * draw((64, 8), 4) @ basis.T  # leans on the old inputs
    teacher = w + 0.3 * draw((M, RANK), 5) @ np.asarray(adapted["w"].v)
    batch = new, new @ teacher

    bases = {"w": jnp.asarray(basis)}
    # Only the projected gradient makes Adam descend in the space that is left.
    project = jlora.optimizers.project_out(bases, side="left")
    protected = optax.chain(project, optax.adam(0.02), project)
    before = old @ w
    for optimizer, is_kept in ((protected, True), (optax.adam(0.02), False)):
        result = train(adapted, optimizer, batch, 400)
        assert result.losses[-1] < 0.9 * result.losses[0]
        after = old @ np.asarray(jlora.merge(result.adapted)["w"])
        change = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert (change < 1e-4) == is_kept


def test_low_rank_moments_find_a_low_rank_change_of_a_whole_matrix():
    w = draw((M, N))
    left, right = (np.linalg.qr(draw((s, RANK), s))[0] for s in (M, N))
    values = np.geomspace(1, 1 / 30, RANK)  # an ill-conditioned change
    teacher = np.float32(w + (left * values) @ right.T)
    x = np.eye(M, dtype=np.float32) * M**0.5
    batch = x, x @ teacher
    schedule = optax.cosine_decay_schedule(0.02, 600)

    def make(transformation):
        return optax.chain(transformation, optax.scale_by_learning_rate(schedule))

    projected = jlora.optimizers.scale_by_low_rank_adam(RANK, key=KEY, update_every=50)
    results = [
        train({"w": jnp.asarray(w)}, make(each), batch, 600, also_train=".*")
        for each in (projected, optax.scale_by_adam())
    ]
    for result in results:
        change = np.asarray(result.adapted["w"]) - teacher
        assert np.linalg.norm(change) < 0.01 * values[-1]
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(each.opt_state)) for each in results
    ]
    assert sizes[0] < 0.25 * sizes[1]
