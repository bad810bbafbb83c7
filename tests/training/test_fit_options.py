"""Options of `fit`: keys, metrics, accumulation, dispatch, evaluation, files, ends."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.training import StepEvaluation
from tests.helpers.training import make_problem, mean_square

pytestmark = pytest.mark.usefixtures("standard_promotion")
KEY = jax.random.key(3)


def make_batches(count=12):
    """Return batches that differ from each other."""
    adapted, (x, y) = make_problem(jlora.Rule("w", 4, trainable="uv"))
    return adapted, [(x[i : i + 8] + 0.01 * i, y[i : i + 8]) for i in range(count)]


def run(loss=mean_square, optimizer=None, **settings):
    adapted, batches = make_batches()
    optimizer = optimizer or optax.adam(0.01)
    return jlora.fit(loss, adapted, optimizer, batches, progress=False, **settings)


def assert_same(one, other, **tolerances):
    for a, b in zip(*(jax.tree.leaves(r.adapted) for r in (one, other)), strict=True):
        np.testing.assert_allclose(a, b, **tolerances)


def test_the_key_of_a_step_is_the_runs_key_folded_with_its_number():
    seen = []

    def loss(params, batch, key):
        jax.debug.callback(lambda k: seen.append(k), jax.random.key_data(key))
        return mean_square(params, batch) + 0.0 * jax.random.normal(key)

    run(loss, key=KEY)
    jax.effects_barrier()
    expected = [jax.random.key_data(jax.random.fold_in(KEY, i)) for i in range(12)]
    np.testing.assert_array_equal(np.stack(seen), np.stack(expected))
    with pytest.raises(TypeError, match="positional argument"):
        run(loss)


def test_metrics_of_the_loss_are_returned_for_each_step():
    def loss(params, batch):
        value = mean_square(params, batch)
        return value, {"double": 2 * value, "pair": jnp.stack([value, -value])}

    result = run(loss, has_aux=True)
    np.testing.assert_allclose(result.metrics["double"], 2 * result.losses, rtol=1e-6)
    assert result.metrics["pair"].shape == (12, 2)
    assert run().metrics is None
    with pytest.raises(TypeError, match="pass has_aux=True"):
        run(loss)
    with pytest.raises(TypeError, match=r"must return \(loss, metrics\)"):
        run(has_aux=True)


@pytest.mark.parametrize("steps", [2, 5, 12, 50])
def test_several_steps_in_one_call_are_the_same_steps(steps):
    def loss(params, batch, key):
        noise = 0.1 * jax.random.normal(key)
        return mean_square(params, batch) * (1 + noise), {"noise": noise}

    settings = {"key": KEY, "has_aux": True}
    one, other = run(loss, **settings), run(loss, steps_per_dispatch=steps, **settings)
    # XLA may sum in another order inside of the scan.
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-5)
    np.testing.assert_array_equal(one.metrics["noise"], other.metrics["noise"])
    assert_same(one, other, rtol=1e-4, atol=1e-6)


def test_batches_of_other_shapes_end_a_group():
    adapted, batches = make_batches()
    x, y = batches[5]
    batches[5] = (x[:3], y[:3])
    runs = [
        jlora.fit(
            mean_square,
            adapted,
            optax.sgd(0.05),
            batches,
            progress=False,
            steps_per_dispatch=steps,
        )
        for steps in (1, 4)
    ]
    np.testing.assert_allclose(*(each.losses for each in runs), rtol=1e-5)


def test_accumulation_equals_the_large_batch():
    adapted, batches = make_batches(8)
    large = [
        jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches[i : i + 4])
        for i in (0, 4)
    ]
    optimizer = optax.adam(0.01)
    settings = {"progress": False}
    small = jlora.fit(
        mean_square, adapted, optimizer, batches, accumulate_steps=4, **settings
    )
    whole = jlora.fit(mean_square, adapted, optimizer, large, **settings)
    assert len(small.losses) == 8
    # The mean of four means in float32.
    assert_same(small, whole, rtol=1e-5, atol=1e-6)


def test_the_computation_in_bfloat16_keeps_float32_factors_and_base():
    dtypes = []

    def loss(params, batch):
        weight = params["w"]
        dtypes.extend(each.dtype for each in (weight.base, weight.u, weight.v))
        x = batch[0].astype(jnp.bfloat16)
        residual = jlora.linear(x, weight) - batch[1].astype(jnp.bfloat16)
        return jnp.mean(residual.astype(jnp.float32) ** 2)

    adapted, _ = make_batches()
    result = run(loss, compute_dtype=jnp.bfloat16)
    assert set(dtypes) == {jnp.dtype(jnp.bfloat16)}
    weight = result.adapted["w"]
    assert weight.u.dtype == weight.v.dtype == jnp.float32
    np.testing.assert_array_equal(weight.base, adapted["w"].base)
    assert result.losses[-1] < result.losses[0]


def test_evaluations_keep_the_best_factors():
    scores = iter([3.0, 1.0, 2.0, 5.0])
    trees = []

    def evaluate(adapted):
        trees.append(jax.tree.map(jnp.copy, adapted))
        return {"score": next(scores), "other": 7}

    result = run(evaluate=evaluate, evaluate_every=3)
    assert result.evaluations == tuple(
        StepEvaluation(step, {"score": score, "other": 7.0})
        for step, score in ((3, 3.0), (6, 1.0), (9, 2.0), (12, 5.0))
    )
    for best, tree in zip(*map(jax.tree.leaves, (result.best, trees[1])), strict=True):
        np.testing.assert_array_equal(best, tree)
    assert result.stop_reason is None
    assert run().best is None


@pytest.mark.parametrize("steps", [1, 4])
def test_patience_ends_a_run(steps):
    scores = iter([3.0, 1.0, np.nan, 2.0, 0.0])
    result = run(
        evaluate=lambda adapted: next(scores),
        evaluate_every=2,
        patience=2,
        steps_per_dispatch=steps,
    )
    assert len(result.losses) == 8
    assert "no better evaluation than the one of step 4" in result.stop_reason


def test_numbers_go_to_a_file_and_to_a_callback(tmp_path):
    calls = []
    result = run(
        metrics_file=tmp_path / "run.jsonl",
        callback=lambda step, values: calls.append((step, values)),
        evaluate=lambda adapted: 0.5,
        evaluate_every=6,
        log_every=4,
    )
    text = (tmp_path / "run.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    np.testing.assert_allclose(losses, result.losses)
    evaluations = [line for line in lines if "evaluation" in line]
    assert evaluations == [
        {"step": step, "evaluation": {"evaluation": 0.5}} for step in (6, 12)
    ]
    steps = [step for step, values in calls if "loss" in values]
    assert steps == sorted(steps)
    assert steps[-1] == 12
    assert all(isinstance(v, float) for _, values in calls for v in values.values())


def test_a_plot_of_the_run(tmp_path):
    result = run(evaluate=lambda adapted: 0.5, evaluate_every=6)
    result.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_an_error_of_the_callers_functions_keeps_the_training():
    def fail(*arguments):
        raise RuntimeError("broken")

    for settings in ({"evaluate": fail, "evaluate_every": 5}, {"callback": fail}):
        with pytest.raises(RuntimeError, match="broken") as caught:
            run(log_every=5, **settings)
        found = caught.value.fit_result
        assert len(found.losses) == 5
        assert bool(jnp.isfinite(found.adapted["w"].v).all())


def test_a_stop_names_its_likely_causes():
    result = run(optimizer=optax.sgd(1e20))
    assert "Likely causes, in order: the learning rate" in result.stop_reason


def test_batches_of_several_structures_are_refused_by_path():
    adapted, (x, y) = make_problem()

    def loss(params, batch):
        return mean_square(params, (batch["x"], batch["y"]))

    good = {"x": x, "y": y}
    for bad, text in (
        ({"x": x}, r"no leaf at \['y'\]"),
        (good | {"z": x}, "a new leaf at"),
    ):
        with pytest.raises(ValueError, match=f"one structure, got {text}.* in batch 3"):
            jlora.fit(loss, adapted, optax.sgd(0.1), [good, good, bad], progress=False)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"key": 3}, "`key` must be a typed"),
        ({"evaluate": 3}, "`evaluate` must be a function"),
        ({"callback": 3}, "`callback` must be a function"),
        ({"patience": 3}, "`evaluate` must be given with patience"),
        ({"steps_per_dispatch": 0}, "`steps_per_dispatch` must be"),
        ({"accumulate_steps": 1.5}, "`accumulate_steps` must be"),
        (
            {"evaluate": lambda a: jnp.ones(3), "evaluate_every": 1},
            "must return a number",
        ),
        (
            {"evaluate": lambda a: {}, "evaluate_every": 1},
            "must return a number, got none",
        ),
    ],
)
def test_bad_options(settings, text):
    with pytest.raises((TypeError, ValueError), match=text):
        run(**settings)


def test_a_line_search_and_multi_steps_get_their_arguments():
    lbfgs = run(optimizer=optax.lbfgs())
    assert lbfgs.losses[-1] < 0.5 * lbfgs.losses[0]


def test_by_path_gives_each_part_its_own_optimizer():
    adapted, batches = make_batches()
    by_path = jlora.optimizers.by_path
    slow = by_path({r"/v$": optax.sgd(0.05), ".*": optax.set_to_zero()})
    result = jlora.fit(
        mean_square, adapted, slow, batches, also_train="bias", progress=False
    )
    assert bool((result.adapted["w"].u == adapted["w"].u).all())
    assert bool((result.adapted["bias"] == 0).all())
    assert not bool((result.adapted["w"].v == adapted["w"].v).all())

    alone = jlora.fit(mean_square, adapted, optax.adam(0.01), batches, progress=False)
    same = by_path({".*": optax.adam(0.01)})
    assert_same(
        alone, jlora.fit(mean_square, adapted, same, batches, progress=False), rtol=1e-6
    )
    for entries, text in (
        ({"/x$": optax.sgd(1.0), ".*": optax.sgd(1.0)}, "is the first for none.*w/u"),
        ({"/u": optax.sgd(1.0)}, "w/v: `optimizers` must match every"),
        ({}, "at least one"),
        ({"(": optax.sgd(1.0)}, "regular expressions"),
        ({"a": 3}, "optax transformations, got int"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            jlora.fit(mean_square, adapted, by_path(entries), batches, progress=False)


def test_a_transformation_of_whole_weights_works_inside_by_path():
    adapted, batches = make_batches()
    scaled = optax.chain(jlora.optimizers.scale_by_factor_gram(), optax.sgd(0.1))
    alone = jlora.fit(mean_square, adapted, scaled, batches, progress=False)

    # A second entry for a plain leaf changes nothing for the weight.
    beside = jlora.optimizers.by_path({"bias": optax.set_to_zero(), ".*": scaled})
    result = jlora.fit(
        mean_square, adapted, beside, batches, also_train="bias", progress=False
    )
    assert_same(alone, result, rtol=1e-6)  # two programs, so other fusions

    halves = jlora.optimizers.by_path({"/v$": scaled, "/u$": optax.sgd(0.1)})
    with pytest.raises(ValueError, match="w: `updates` must hold all trained arrays"):
        jlora.fit(mean_square, adapted, halves, batches, progress=False)
