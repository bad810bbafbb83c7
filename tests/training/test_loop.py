"""`fit` and its steps: training, stopping, progress lines and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.helpers.training import make_problem, mean_square

pytestmark = pytest.mark.usefixtures("standard_promotion")
KEY = jax.random.key(0)


@pytest.mark.parametrize("trainable", ["v", "u", "uv"])
def test_fit_trains_the_trainable_and_keeps_the_other_bits(trainable):
    adapted, batch = make_problem(jlora.Rule("w", 4, trainable=trainable))
    result = jlora.fit(
        mean_square, adapted, optax.adam(0.05), [batch] * 100, progress=False
    )
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.stop_reason is None
    old, new = adapted["w"], result.adapted["w"]
    for name in ("base", "u", "v"):
        same = bool((getattr(old, name) == getattr(new, name)).all())
        assert same == (name not in trainable)
    assert bool((result.adapted["bias"] == adapted["bias"]).all())


def test_full_rank_v_reaches_the_least_squares_optimum():
    adapted, batch = make_problem(jlora.Rule("w", 6, trainable="uv"))
    adam = optax.adam(optax.cosine_decay_schedule(0.05, 800))
    result = jlora.fit(mean_square, adapted, adam, [batch] * 800, progress=False)
    assert result.losses[-1] < 1e-4


def test_columns_train_only_the_last_ones():
    adapted, batch = make_problem(jlora.Rule("w", 6, num_columns=2))
    state, _ = jlora.init_train(adapted, optax.adam(0.1))
    assert jlora.training.measure_cost(state) == (12, 2 * 12 * 4 + 4)
    result = jlora.fit(
        mean_square, adapted, optax.adam(0.1), [batch] * 20, progress=False
    )
    assert bool((result.adapted["w"].v[:, :4] == adapted["w"].v[:, :4]).all())
    assert not bool((result.adapted["w"].v[:, 4:] == adapted["w"].v[:, 4:]).any())


def test_on_merged_gives_the_same_steps():
    adapted, batch = make_problem()
    plain_loss = jlora.on_merged(
        lambda params, batch: jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)
    )
    runs = [
        jlora.fit(loss, adapted, optax.sgd(0.05), [batch] * 10, progress=False).losses
        for loss in (mean_square, plain_loss)
    ]
    np.testing.assert_allclose(*runs, rtol=1e-4)


def test_a_step_compiles_once():
    traces = []

    def loss(params, batch):
        traces.append(1)
        return mean_square(params, batch)

    adapted, batch = make_problem()
    optimizer = optax.adam(0.01)
    for _ in range(2):
        jlora.fit(loss, adapted, optimizer, [batch] * 5, progress=False)
    assert len(traces) == 1


def test_frozen_leaves_have_no_gradient_and_the_state_is_donated():
    adapted, batch = make_problem()
    state, frozen = jlora.init_train(adapted, optax.adam(0.1))
    assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state)} == {(), (6, 6)}
    new, _ = jlora.train_step(mean_square, optax.adam(0.1), state, frozen, batch)
    assert state.trainable["w"].v.is_deleted()
    assert not adapted["w"].v.is_deleted()
    assert int(new.step) == 1


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_fit_stops_at_a_loss_that_is_not_finite(log_every, capsys):
    adapted, (x, y) = make_problem()
    bad = (x.at[0, 0].set(jnp.nan), y)
    good_steps = [(x, y)] * 5
    arguments = {"progress": False, "log_every": log_every}

    # Both runs share one optimiser, so that their factors have the same bits.
    adam = optax.adam(0.01)
    stopped = jlora.fit(
        mean_square, adapted, adam, [*good_steps, bad, (x, y)], **arguments
    )
    assert "the loss became nan at step 6" in stopped.stop_reason
    assert "the loss became nan at step 6" in capsys.readouterr().err
    assert len(stopped.losses) == 6

    last_good = jlora.fit(
        mean_square, adapted, adam, good_steps[:4], **arguments
    ).adapted
    assert bool((stopped.adapted["w"].v == last_good["w"].v).all())


def test_a_diverging_run_keeps_finite_factors():
    adapted, batch = make_problem()
    result = jlora.fit(
        mean_square, adapted, optax.sgd(1e4), [batch] * 200, progress=False
    )
    assert result.stop_reason is not None
    assert bool(jnp.isfinite(mean_square(result.adapted, batch)))


def test_plain_lines_where_there_is_no_terminal(capsys):
    adapted, batch = make_problem()
    jlora.fit(mean_square, adapted, optax.sgd(0.01), [batch] * 20, log_every=10)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "step 10/20, loss" in lines[0]
    assert "steps/s" in lines[0]


def test_evaluate_loss_is_the_mean():
    adapted, (x, y) = make_problem()
    batches = [(x, y), (x, 2 * y)]
    expected = np.mean([float(mean_square(adapted, batch)) for batch in batches])
    assert jlora.training.evaluate_loss(mean_square, adapted, batches) == pytest.approx(
        expected, rel=1e-6
    )
    with pytest.raises(ValueError, match="`batches` must hold at least one"):
        jlora.training.evaluate_loss(mean_square, adapted, [])


def test_fit_refuses():
    adapted, batch = make_problem()
    adam = optax.adam(0.1)

    with pytest.raises(TypeError, match="`loss` must be a function"):
        jlora.fit(None, adapted, adam, [batch])
    with pytest.raises(TypeError, match="`optimizer` must be an optax"):
        jlora.fit(mean_square, adapted, 0.1, [batch])
    with pytest.raises(TypeError, match="`batches` must be an iterable of batches"):
        jlora.fit(mean_square, adapted, adam, 3)
    with pytest.raises(ValueError, match="`batches` must hold at least one"):
        jlora.fit(mean_square, adapted, adam, [])
    with pytest.raises(ValueError, match="`num_steps` must be at least 1"):
        jlora.fit(mean_square, adapted, adam, [batch], num_steps=0)
