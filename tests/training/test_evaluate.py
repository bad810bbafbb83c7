"""`evaluate` and `measure_step`: accuracy, forgetting and cost in one table."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.training import StepCost, TrainingCost, evaluate, measure_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
KEY = jax.random.key(0)


def make_problem():
    w = jax.random.normal(KEY, (64, 32), jnp.float32)
    plan = jlora.make_plan({"w": w}, jlora.Rule("w", 4))
    adapted = jlora.adapt({"w": w}, plan, key=KEY)
    x = jax.random.normal(jax.random.key(1), (24, 64), jnp.float32)
    return {"w": w}, adapted, (x, jnp.ones((24, 32), jnp.float32))


def mean_square(params, batch):
    x, y = batch
    return jnp.mean((jlora.linear(x, params["w"]) - y) ** 2)


def mean_error(params, batch):
    x, y = batch
    return jnp.mean(jnp.abs(jlora.linear(x, params["w"]) - y))


def divide(batch, *sizes):
    ends = np.cumsum([0, *sizes])
    parts = itertools.pairwise(ends)
    return [tuple(leaf[a:b] for leaf in batch) for a, b in parts]


def test_values_are_the_means_over_all_examples():
    params, adapted, batch = make_problem()
    other = (batch[0] + 1, batch[1])
    trees = {"before": params, "adapted": jax.tree.map(lambda a: 0.9 * a, adapted)}
    # An iterator is enough: each domain is read once for all trees and metrics.
    domains = {"old": iter(divide(batch, 10, 10, 4)), "new": divide(other, 24)}
    result = evaluate(trees, domains, {"square": mean_square, "error": mean_error})
    assert result.values.shape == (2, 2, 2)
    for label, tree in trees.items():
        for domain, whole in {"old": batch, "new": other}.items():
            for name, metric in {"square": mean_square, "error": mean_error}.items():
                expected = float(metric(tree, whole))
                found = result.get(label, domain, name)
                np.testing.assert_allclose(found, expected, rtol=1e-5)

    difference = result.values[1, 0] - result.values[0, 0]
    np.testing.assert_array_equal(result.forgetting, [[0, 0], difference])


def test_the_old_domain_and_the_first_model_can_be_named():
    metric = {"product": lambda params, x: jnp.mean(params * x)}
    domains = {"new": [jnp.ones(2)], "old": [jnp.full(2, 3.0)]}
    trees = {"after": 2.0, "before": 1.0}
    result = evaluate(trees, domains, metric, before="before", old="old")
    assert result.forgetting.tolist() == [[3.0], [0.0]]
    lines = str(result).splitlines()
    assert lines[0].split("  ")[-1].strip() == "forgetting product"
    assert lines[1].split() == ["after", "2", "6", "3"]
    assert repr(result) == "Evaluation(2 labels, 2 domains, 1 metrics)"


def test_a_metric_that_is_not_compiled():
    def count_words(params, batch):
        return float(np.mean([len(text.split()) for text in batch["text"]]))

    domains = {"d": [{"text": np.array(["a b", "c"])}]}
    result = evaluate({"a": 1.0}, domains, {"words": count_words}, jit=False)
    assert result.values.tolist() == [[[1.5]]]


def test_costs_of_each_kind_are_in_the_table():
    params, adapted, batch = make_problem()
    state, _ = jlora.init_train(adapted, optax.adam(0.1))
    full = jlora.adapt(params, jlora.make_plan(params, jlora.Rule("w", 1)), key=KEY)
    costs = {"v": state, "size": TrainingCost(2000, 16000)}
    costs["step"] = measure_step(mean_square, optax.sgd(0.1), full, batch)
    trees = {"before": params, "v": adapted, "size": params, "step": full}
    result = evaluate(trees, {"d": [batch]}, {"square": mean_square}, costs=costs)
    assert result.costs["v"] == TrainingCost(128, 1028)
    head, before, v, size, step = str(result).splitlines()
    assert head.split()[-5:] == ["trained", "optimizer", "step", "peak", "memory"]
    assert before.split()[0] == "before"
    assert len(before.split()) == 3  # its values, and no cost
    assert v.split()[-3:] == ["128", "1.03", "kB"]
    assert size.split()[-3:] == ["2,000", "16", "kB"]
    assert " ms " in step


def test_the_cost_of_a_step():
    params, adapted, batch = make_problem()
    cost = measure_step(mean_square, optax.adam(0.1), adapted, batch, repetitions=3)
    assert isinstance(cost, StepCost)
    assert (cost.num_trained, cost.optimizer_bytes) == (128, 1028)
    assert cost.step_ms > 0
    # At least base, factors and batch; the products x @ base and x @ u.
    assert cost.peak_bytes > 4 * (64 * 32 + 24 * (64 + 32))
    assert cost.num_flops > 2 * 24 * 64 * 32
    assert 0 <= cost.temporary_bytes < cost.peak_bytes
    # The state is donated, and still the given tree is whole.
    assert bool(jnp.isfinite(adapted["w"].v).all())

    full = measure_step(
        jlora.on_merged(mean_square), optax.adam(0.1), params, batch, also_train=".*"
    )
    assert full.num_trained == 64 * 32
    assert full.optimizer_bytes == 2 * 4 * 64 * 32 + 4


def test_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    metrics = {"square": mean_square, "error": mean_error}
    params, adapted, batch = make_problem()
    trees = {"before": params, "after": adapted}
    result = evaluate(trees, {"a": [batch], "b": [batch]}, metrics)
    figure = result.plot(path=tmp_path / "table.png")
    assert len(figure.axes) == 2
    assert (tmp_path / "table.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"trees": [1.0]}, TypeError, "`trees` must be a dict from names, got list"),
        ({"domains": {}}, ValueError, "`domains` must hold at least one member"),
        ({"domains": {"d": []}}, ValueError, "`domains` must .* got none for 'd'"),
        ({"metrics": {"m": 3}}, TypeError, "`metrics` must hold .* got int for 'm'"),
        ({"metrics": {"m": lambda p, x: x}}, TypeError, r"got shape \(2,\) from 'm'"),
        ({"before": "b"}, ValueError, "`before` must be one of 'a', got 'b'"),
        ({"old": "e"}, ValueError, "`old` must be one of 'd', got 'e'"),
        ({"costs": {"b": None}}, ValueError, "`costs` must be one of 'a', got 'b'"),
        ({"costs": {"a": 3}}, TypeError, "`costs` must hold .* got int for 'a'"),
    ],
)
def test_bad_arguments(changes, error, text):
    arguments = {
        "trees": {"a": 1.0},
        "domains": {"d": [jnp.ones(2)]},
        "metrics": {"m": lambda params, x: jnp.mean(params * x)},
        **changes,
    }
    with pytest.raises(error, match=text):
        evaluate(**arguments)


def test_bad_arguments_of_a_step():
    _, adapted, batch = make_problem()
    with pytest.raises(TypeError, match="`optimizer` must be an optax"):
        measure_step(mean_square, 0.1, adapted, batch)
    with pytest.raises(ValueError, match="`repetitions` must be at least 1"):
        measure_step(mean_square, optax.sgd(0.1), adapted, batch, repetitions=0)
