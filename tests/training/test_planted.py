"""Planted problems: training finds a delta that is there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("standard_promotion")
M, N, RANK = 24, 16, 3


def plant(delta, trainable, num_columns=None, init="lora"):
    """Return (adapted, batches, teacher) of a weight that differs by a delta."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((M, N), np.float32))
    rule = jlora.Rule(
        "w", RANK, init=init, trainable=trainable, num_columns=num_columns
    )
    params = {"w": w}
    adapted = jlora.adapt(params, jlora.make_plan(params, rule), key=jax.random.key(0))
    teacher = w + delta(adapted["w"], rng)
    x = jnp.asarray(rng.standard_normal((64, M), np.float32))
    return adapted, [(x, x @ teacher)], teacher


def loss(params, batch):
    x, y = batch
    return jnp.mean(jnp.sum((jlora.linear(x, params["w"]) - y) ** 2, axis=-1))


def train(adapted, batches, optimizer, steps):
    result = jlora.fit(
        loss,
        adapted,
        optimizer,
        batches * steps,
        steps_per_dispatch=100,
        progress=False,
    )
    return result, jlora.merge(result.adapted)["w"]


def measure(found, teacher, adapted):
    """Return the error relative to the planted delta."""
    delta = teacher - jlora.merge(adapted)["w"]
    return float(jnp.linalg.norm(found - teacher) / jnp.linalg.norm(delta))


def draw_product(rng, m=M, n=N, rank=RANK):
    u, v = (rng.standard_normal(s).astype("f4") for s in ((m, rank), (rank, n)))
    return 0.3 * u @ v


def decay(rate, steps):
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def change_factors(weight, rng):
    """Return the delta of other factors in the place of those of the weight."""
    u, v = (
        each + 0.3 * rng.standard_normal(each.shape).astype("f4")
        for each in (weight.u, weight.v)
    )
    return u @ v - weight.u @ weight.v


DELTAS = {
    "lora": lambda weight, rng: draw_product(rng),
    # The base of PiSSA lacks the leading part of the weight, which must come back too.
    "pissa": change_factors,
}


@pytest.mark.parametrize("init", DELTAS)
def test_a_delta_of_the_rank_is_recovered(init):
    adapted, batches, teacher = plant(DELTAS[init], "uv", init=init)
    _, found = train(adapted, batches, decay(0.03, 3000), 3000)
    assert measure(found, teacher, adapted) < 1e-3


def test_v_alone_recovers_a_teacher_that_differs_in_v():
    def change_v(weight, rng):
        return weight.u @ rng.standard_normal((RANK, N)).astype("f4")

    adapted, batches, teacher = plant(change_v, "v")
    result, found = train(adapted, batches, decay(0.05, 1500), 1500)
    assert measure(found, teacher, adapted) < 1e-3
    np.testing.assert_array_equal(result.adapted["w"].u, adapted["w"].u)


def test_the_last_columns_recover_their_teacher_and_keep_all_other_bits():
    num_columns = 5

    def change_columns(weight, rng):
        v = np.zeros((RANK, N), np.float32)
        v[:, -num_columns:] = rng.standard_normal((RANK, num_columns))
        return weight.u @ v

    adapted, batches, teacher = plant(change_columns, "v", num_columns)
    result, found = train(adapted, batches, decay(0.05, 1500), 1500)
    assert measure(found, teacher, adapted) < 1e-3
    before, after = jlora.merge(adapted)["w"], found
    np.testing.assert_array_equal(after[:, :-num_columns], before[:, :-num_columns])
    old, new = adapted["w"].v, result.adapted["w"].v
    np.testing.assert_array_equal(old[:, :-num_columns], new[:, :-num_columns])


def count_steps(optimizer, condition):
    """Return the steps until the planted product is found to 1e-2.

    The factors start at the product with its smallest singular value halved, and its
    values fall from 1 to 1 / condition.
    """
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.standard_normal((s, RANK)))[0] for s in (M, N))
    values = np.geomspace(1, 1 / condition, RANK)
    start = values * np.where(np.arange(RANK) == RANK - 1, 0.5, 1)
    root = np.sqrt(start).astype("f4")
    params = {"w": jnp.zeros((M, N), jnp.float32)}
    rule = jlora.Rule("w", RANK, init="lora", trainable="uv")
    slots = jlora.adapt(params, jlora.make_plan(params, rule), key=jax.random.key(0))
    factors = jlora.Factors(
        jnp.asarray(left * root, "f4"), jnp.asarray(root[:, None] * right.T, "f4")
    )
    adapted = jlora.adaptation.set_factors(slots, {"w": factors})
    teacher = jnp.asarray((left * values) @ right.T, "f4")

    # The error in units of the smallest value: that is the part to learn.
    def distance(tree):
        delta = jlora.merge(tree)["w"] - teacher
        return float(jnp.linalg.norm(delta)) * condition

    batches = [(jnp.eye(M, dtype="f4") * M**0.5, teacher * M**0.5)]
    result = jlora.fit(
        loss,
        adapted,
        optimizer,
        batches * 2000,
        steps_per_dispatch=20,
        evaluate=distance,
        evaluate_every=20,
        progress=False,
    )
    good = [e.step for e in result.evaluations if e.values["evaluation"] < 0.01]
    return good[0] if good else 10**6


def test_scaled_gradients_do_not_depend_on_the_condition():
    def scaled():
        return optax.chain(jlora.optimizers.scale_by_factor_gram(), optax.sgd(0.2))

    steps = [count_steps(scaled(), condition) for condition in (2, 30)]
    assert max(steps) <= 2 * min(steps) <= 400
    # The largest rate that is stable for the largest singular value.
    plain = [count_steps(optax.sgd(0.2), condition) for condition in (2, 30)]
    assert plain[1] > 5 * plain[0]
