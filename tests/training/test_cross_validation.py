"""`cross_validate`: each candidate of a grid is the one that is trained by itself."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.training.cross_validation import cross_validate
from jlora.training.folds import assign_folds, draw_batches
from jlora.training.padding import mask_padding, pad_weights
from jlora.training.rank_trials import RankTrials
from tests.helpers.matrices import needs_x64

pytestmark = pytest.mark.usefixtures("standard_promotion")
KEY = jax.random.key(7)
RANKS, RATES, FOLDS, NUM_STEPS, BATCH = (1, 4, 2), (0.003, 0.03), 3, 6, 5


def make_problem(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), 4)
    params = {
        "w": jax.random.normal(keys[0], (8, 6), jnp.float32).astype(dtype),
        "out": jax.random.normal(keys[1], (6, 5), jnp.float32).astype(dtype),
        "bias": jnp.zeros(5, jnp.float32),
    }
    x = jax.random.normal(keys[2], (20, 8), jnp.float32)
    noise = jax.random.normal(keys[3], (20, 5), jnp.float32)
    y = jnp.tanh(x @ jnp.ones((8, 5), jnp.float32) + noise)
    return params, (x, y)


def mean_square(params, batch):
    x, y = batch
    hidden = jnp.tanh(jlora.linear(x, params["w"]))
    found = jlora.linear(hidden, params["out"]) + params["bias"][None]
    return jnp.mean((found - y) ** 2)


def run_grid(rule, optimizer, params, examples, **options):
    return cross_validate(
        mean_square,
        params,
        rule,
        examples,
        ranks=RANKS,
        rates=RATES,
        folds=FOLDS,
        num_steps=NUM_STEPS,
        batch_size=BATCH,
        optimizer=optimizer,
        key=KEY,
        progress=False,
        **options,
    )


def run_one_by_one(rule, optimizer, params, examples, also_train=None, data=None):
    """Return the errors of all candidates, each trained by `fit` at its own rank."""
    fold_key, batch_key, adapt_key, _ = jax.random.split(KEY, 4)
    held_out = assign_folds(len(examples[0]), FOLDS, fold_key)
    index = draw_batches(held_out, BATCH, NUM_STEPS, batch_key)

    def take(own):
        return tuple(leaf[own] for leaf in examples)

    made = [optimizer(rate) for rate in RATES]  # the step compiles once for the folds
    errors = np.zeros((len(RANKS), len(RATES), FOLDS))
    for i, j, k in np.ndindex(errors.shape):
        plan = jlora.make_plan(params, rule.with_rank(RANKS[i]))
        adapted = jlora.adapt(params, plan, key=adapt_key, data=data)
        trained = jlora.fit(
            mean_square,
            adapted,
            made[j],
            [take(own) for own in index[k]],
            also_train=also_train,
            progress=False,
        ).adapted
        parts = [held_out[k][n : n + BATCH] for n in range(0, len(held_out[k]), BATCH)]
        means = [float(mean_square(trained, take(own))) for own in parts]
        errors[i, j, k] = np.average(means, weights=[len(own) for own in parts])
    return errors


def check_same(rule, optimizer, dtype=jnp.float32, rtol=2e-5, **options):
    params, examples = make_problem(dtype)
    if dtype == jnp.float64:
        params, examples = jax.tree.map(lambda a: a.astype(dtype), (params, examples))
    found = run_grid(rule, optimizer, params, examples, **options).errors
    options.pop("max_bytes", None)
    expected = run_one_by_one(rule, optimizer, params, examples, **options)
    np.testing.assert_allclose(found, expected, rtol=rtol)


OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "adamw": functools.partial(optax.adamw, weight_decay=0.1),
    "clip": lambda rate: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(rate)),
    "injected": lambda rate: optax.inject_hyperparams(optax.adam)(rate),
    "lamb": optax.lamb,
    "cosine": lambda rate: optax.adam(optax.cosine_decay_schedule(rate, NUM_STEPS)),
    "lora+": lambda rate: optax.chain(
        optax.adam(rate), jlora.optimizers.lora_plus(4.0)
    ),
}
# Their update of a factor depends on its shape, or they compare the rate in Python.
GROUPED = {
    "muon": optax.contrib.muon,
    "adafactor": optax.adafactor,
    "block rms": lambda rate: optax.chain(
        optax.clip_by_block_rms(0.01), optax.sgd(rate)
    ),
    "noise": lambda rate: optax.noisy_sgd(rate, key=jax.random.key(0)),
    "factor Gram": lambda rate: optax.chain(
        jlora.optimizers.scale_by_factor_gram(), optax.sgd(rate)
    ),
    "warm-up": lambda rate: optax.adam(
        optax.warmup_cosine_decay_schedule(0.0, rate, 2, NUM_STEPS)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_candidate_of_the_grid_is_the_one_trained_by_itself(name):
    check_same(jlora.Rule("w|out", 1, trainable="uv", init="lora"), OPTIMIZERS[name])


@needs_x64
def test_a_line_search():
    # In float32, rounding decides which point a line search accepts.
    rule = jlora.Rule("w|out", 1, trainable="uv", init="lora")
    check_same(rule, optax.lbfgs, jnp.float64, rtol=1e-10)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", GROUPED)
def test_an_optimizer_that_sees_the_padding_is_not_padded(name):
    check_same(jlora.Rule("w|out", 1, trainable="uv"), GROUPED[name], rtol=2e-4)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("name", "num_rank_groups", "num_rate_groups"),
    [
        ("adam", 1, 1),
        ("clip", 1, 1),
        ("muon", 3, 1),
        ("noise", 3, 1),
        ("warm-up", 1, 2),
    ],
)
def test_programs_are_shared_where_possible(
    name, num_rank_groups, num_rate_groups, monkeypatch
):
    from jlora.training import cross_validation

    calls = []

    def record(trials, trees, rank_group, rate_groups, errors):
        calls.append(len(rate_groups))
        errors[:] = 1.0

    monkeypatch.setattr(cross_validation, "run_rank_group", record)
    params, examples = make_problem()
    optimizer = {**OPTIMIZERS, **GROUPED}[name]
    # The noise for v is drawn row by row, and so only that for u sees the padding.
    rule = jlora.Rule("w|out", 1, trainable="uv")
    run_grid(rule, optimizer, params, examples)
    assert calls == [num_rate_groups] * num_rank_groups


@pytest.mark.parametrize(
    ("init", "trainable"),
    [
        *itertools.product(["pissa", "milora", "olora"], ["v", "u", "uv"]),
        ("lora", "v"),
        ("lora", "uv"),
    ],
)
def test_each_initializer_and_trainable(init, trainable):
    check_same(jlora.Rule("w|out", 1, init=init, trainable=trainable), optax.adam)


@pytest.mark.parametrize(
    "rule",
    [
        jlora.Rule("w|out", 1, init="lora_xs"),
        jlora.Rule("w|out", 1, init="svf"),
        jlora.Rule("w|out", 1, num_columns=2),
        jlora.Rule("w", 1, alpha=8.0),
    ],
    ids=["core", "s", "columns", "alpha"],
)
def test_each_form_of_training(rule):
    check_same(rule, optax.adam)


@pytest.mark.parametrize("init", ["pissa", "lora", "qpissa"])
def test_a_base_in_bfloat16(init):
    # A base of 8 bits of mantissa; the products are summed in another order.
    rule = jlora.Rule("w|out", 1, init=init, trainable="uv")
    check_same(rule, optax.adam, jnp.bfloat16, rtol=0.02)


def test_plain_leaves_are_trained_too():
    rule = jlora.Rule("w", 1, init="lora")
    check_same(rule, optax.adam, also_train="bias")


@pytest.mark.parametrize("init", ["pissa", "lora"])
def test_chunks_give_the_same_errors(init):
    params, examples = make_problem()
    rule = jlora.Rule("w|out", 1, init=init)
    whole = run_grid(rule, optax.adam, params, examples).errors
    with pytest.raises(ValueError, match="`max_bytes` must be at least") as refused:
        run_grid(rule, optax.adam, params, examples, max_bytes=1)
    least = int(str(refused.value).split("at least ")[1].split(",")[0])
    for max_bytes in (least, 3 * least, 8 * least):
        found = run_grid(rule, optax.adam, params, examples, max_bytes=max_bytes)
        np.testing.assert_allclose(found.errors, whole, rtol=2e-5)


def test_numpy_arrays_and_a_metric():
    params, examples = make_problem()
    rule = jlora.Rule("w", 1)

    def largest(params, batch):
        return 3 * mean_square(params, batch)

    plain = run_grid(rule, optax.adam, params, examples)
    numpy = jax.tree.map(np.asarray, (params, examples))
    found = run_grid(rule, optax.adam, *numpy, metric=largest)
    np.testing.assert_allclose(found.errors, 3 * plain.errors, rtol=1e-5)


def test_a_lifted_loss():
    params, examples = make_problem()
    lifted = jlora.on_merged(mean_square)
    options = {"ranks": [1, 2], "rates": [0.1], "folds": 2, "num_steps": 3, "key": KEY}
    rule = jlora.Rule("w", 1)
    one, other = (
        cross_validate(loss, params, rule, examples, progress=False, **options)
        for loss in (lifted, mean_square)
    )
    np.testing.assert_allclose(one.errors, other.errors, rtol=1e-4)


def test_a_candidate_that_diverges_changes_no_other():
    params, examples = make_problem()
    rule, options = jlora.Rule("w|out", 1), {"ranks": [1, 2], "folds": 2, "key": KEY}
    run = functools.partial(
        cross_validate,
        mean_square,
        params,
        rule,
        examples,
        **options,
        num_steps=30,
        optimizer=optax.sgd,
        progress=False,
    )
    both = run(rates=[0.01, 1e30])
    assert np.isinf(both.errors[:, 1]).all()
    assert both.rate == 0.01
    np.testing.assert_allclose(both.errors[:, :1], run(rates=[0.01]).errors, rtol=1e-5)
    with pytest.raises(ValueError, match="`rates` must train at least one candidate"):
        run(rates=[1e30])


def test_the_padding_stays_zero_bit_by_bit(monkeypatch):
    from jlora.training import candidate_grids

    seen = []
    original = candidate_grids.measure_candidates

    def spy(metric, layout, trainable, *rest, **options):
        jax.debug.callback(
            lambda u, v: seen.append((u, v)), trainable["w"].u, trainable["w"].v
        )
        return original(metric, layout, trainable, *rest, **options)

    monkeypatch.setattr(candidate_grids, "measure_candidates", spy)
    params, examples = make_problem()
    rule = jlora.Rule("w", 1, init="pissa", trainable="uv")
    run_grid(rule, functools.partial(optax.adamw, weight_decay=0.1), params, examples)
    jax.effects_barrier()
    assert seen
    for u, v in seen:
        for i, rank in enumerate(RANKS):
            assert not np.any(np.asarray(u)[i, ..., rank:])
            assert not np.any(np.asarray(v)[i, ..., rank:, :])
            assert np.all(np.any(np.asarray(u)[i, ..., :rank], axis=-2))


def test_a_mask_removes_nan():
    w = jax.random.normal(KEY, (4, 3), jnp.float32)
    plan = jlora.make_plan({"w": w}, jlora.Rule("w", 2))
    padded = pad_weights(jlora.adapt({"w": w}, plan, key=KEY), 3)
    spoilt = jax.tree.map(lambda leaf: leaf + jnp.nan, padded)
    masked = mask_padding(spoilt, jnp.asarray(2, jnp.int32))["w"]
    assert not np.any(np.asarray(masked.u)[:, 2:])
    assert np.isnan(np.asarray(masked.v)[:2]).all()


def test_every_example_is_held_out_once():
    held_out = assign_folds(20, 3, KEY)
    assert sorted(np.concatenate(held_out)) == list(range(20))
    assert [len(fold) for fold in held_out] == [7, 7, 6]
    index = draw_batches(held_out, 4, 7, KEY)
    assert index.shape == (3, 7, 4)
    for fold, own in zip(held_out, index, strict=True):
        assert not set(fold) & set(own.ravel())
        assert len(set(own[:3].ravel())) == 12  # an epoch repeats no example


def test_one_standard_error_of_a_table():
    errors = np.array(
        [  # two rates; means at the best one 4, 2.2, 2, 2.1; standard error of 2: 0.3
            [[4.0, 4.0], [9.0, 9.0]],
            [[5.0, 5.0], [2.1, 2.3]],
            [[1.7, 2.3], [np.inf, 1.0]],
            [[2.1, 2.1], [2.2, 2.2]],
        ]
    )
    trials = RankTrials((1, 2, 8, 4), (0.1, 0.2), errors)
    np.testing.assert_allclose(trials.means, [4, 2.2, 2, 2.1])
    np.testing.assert_allclose(trials.standard_errors, [0, 0.1, 0.3, 0], atol=1e-12)
    assert trials.best_rates == (0.1, 0.2, 0.1, 0.1)
    assert (trials.best_rank, trials.rank, trials.rate) == (8, 2, 0.2)
    assert "2     0.2   2.2    0.1             chosen" in str(trials).splitlines()
    assert repr(trials).startswith("RankTrials(rank=2, rate=0.2, of 4 ranks")


def test_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    errors = np.array([[[3.0, 3.2]], [[1.0, 1.4]], [[np.inf, 1.3]]])
    trials = RankTrials((1, 2, 4), (0.1,), errors)
    axes = trials.plot(path=tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 1000
    assert trials.plot(axes) is axes


GOOD = {"ranks": [1, 2], "rates": [0.1], "folds": 2, "num_steps": 1, "key": KEY}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"ranks": []}, ValueError, "`ranks` must hold at least one number, got none"),
        ({"ranks": 4}, TypeError, "`ranks` must be a sequence of integers, got int"),
        ({"ranks": [1, 1]}, ValueError, "`ranks` must differ from each other"),
        ({"ranks": [0]}, ValueError, "`ranks` must be at least 1, got 0"),
        ({"ranks": [1, 7]}, ValueError, "^w: `rank` must be at most .* = 6"),
        ({"rates": []}, ValueError, "`rates` must hold at least one number"),
        ({"rates": [0.1, -1]}, ValueError, "`rates` must be positive and finite"),
        ({"rates": [np.nan]}, ValueError, "`rates` must be positive and finite"),
        ({"folds": 1}, ValueError, "`folds` must be at least 2, got 1"),
        ({"folds": 21}, ValueError, "`folds` must be at most the number of examples"),
        ({"num_steps": 0}, ValueError, "`num_steps` must be at least 1"),
        ({"batch_size": 11}, ValueError, "`batch_size` must be at most .* 10, got 11"),
        ({"optimizer": optax.adam(0.1)}, TypeError, "`optimizer` must be a function"),
        ({"optimizer": lambda rate: rate}, TypeError, "got a function to float"),
        ({"metric": 3}, TypeError, "`metric` must be a function"),
        ({"key": 3}, TypeError, "`key` must be a typed PRNG key"),
        ({"max_bytes": 0}, ValueError, "`max_bytes` must be at least 1"),
    ],
)
def test_bad_arguments(changes, error, text):
    params, examples = make_problem()
    options = {**GOOD, **changes}
    with pytest.raises(error, match=text):
        cross_validate(mean_square, params, jlora.Rule("w", 1), examples, **options)


@pytest.mark.parametrize(
    ("examples", "error", "text"),
    [
        ({}, ValueError, "`examples` must hold at least one array"),
        ({"x": np.ones((4, 2)), "y": np.ones(3)}, ValueError, "4 at x and 3 at y"),
        ({"x": np.ones((4, 2)), "n": np.ones(())}, ValueError, "a scalar at n"),
        ({"x": "text"}, TypeError, "`examples` must hold arrays, got str at x"),
    ],
)
def test_bad_examples(examples, error, text):
    params, _ = make_problem()
    with pytest.raises(error, match=text):
        cross_validate(mean_square, params, jlora.Rule("w", 1), examples, **GOOD)


def test_a_loss_that_is_no_scalar():
    params, examples = make_problem()
    for loss, text in (
        (lambda params, batch: batch[0], r"got float32 of \(10, 8\)"),
        (lambda params, batch: (0.0, {}), "got tuple"),
    ):
        with pytest.raises(TypeError, match="`loss` must return one real.*" + text):
            cross_validate(loss, params, jlora.Rule("w", 1), examples, **GOOD)
