import argparse
import functools
import importlib
import itertools
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from benchmarks.models.minilm import trace_layers
from benchmarks.models.patch_encoder import init_patch_encoder, run_patch_encoder
from benchmarks.models.towers import init_towers, predict_ratings
from benchmarks.models.translator import (
    PADDING,
    START,
    TranslatorSize,
    decode,
    encode,
    init_translator,
    translate,
)
from benchmarks.tasks import methods, running, targets
from benchmarks.tasks.command import run_command, write_task_report
from benchmarks.tasks.data.ratings import generate_world
from benchmarks.tasks.data.splits import sample_indices, split_examples
from benchmarks.tasks.results import append_result, read_newest
from benchmarks.tasks.sentences import Sentences, measure_moments
from benchmarks.tasks.tables import format_value, make_overview
from benchmarks.tasks.task import NEW, OLD, Metric, Task
from benchmarks.tasks.training import MAX_RATES, Trainer, search_grid
from jlora.adaptation.paths import list_leaves

# optax and jax.nn.dot_product_attention promote dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")
ERROR = Metric("error", NEW, False)
KEPT = Metric("kept", OLD, True)
LEVEL = running.Level("full", 2, 3, None, {"toy": running.TaskSize(4)})
QUICK = running.Level("quick", 1, 1, None, LEVEL.sizes)


def make_toy_task(head=None, has_moments=True):
    """Return a task of one matrix whose new domain needs another matrix."""
    rng = np.random.default_rng(0)
    old, change = rng.standard_normal((2, 12, 10)).astype(np.float32)
    x = rng.standard_normal((6, 16, 12)).astype(np.float32)
    y = x @ (old + 0.3 * change)
    params = {"layer": {"w": old}, "head": np.zeros(10, np.float32)}

    def loss(params, batch):
        x, y = batch
        return jnp.mean((x @ params["layer"]["w"] + params["head"][None] - y) ** 2)

    def measure(params):
        error = float(jnp.mean((x[-1] @ params["layer"]["w"] - y[-1]) ** 2))
        kept = float(np.corrcoef(np.ravel(params["layer"]["w"]), np.ravel(old))[0, 1])
        return {ERROR.name: error, KEPT.name: kept}

    def measure_moments():
        return {"layer": {"w": np.einsum("btm,btn->mn", x[:4], x[:4])}}

    return Task(
        name="toy",
        model="one matrix",
        shift="old → new",
        params=params,
        loss=loss,
        sample=lambda seed: zip(
            np.roll(x[:4], seed, 0), np.roll(y[:4], seed, 0), strict=True
        ),
        num_steps=4,
        validate=lambda params: float(loss(params, (x[4], y[4]))),
        measure=measure,
        metrics=(ERROR, KEPT),
        pattern="layer/",
        rank=2,
        num_columns=3,
        full_rate=0.03,
        scaled_rate=0.1,
        head=head,
        measure_moments=measure_moments if has_moments else None,
    )


@functools.cache
def load_task(name, *steps):
    """Return a task; several tests share it."""
    return importlib.import_module(f"benchmarks.tasks.{name}").make_task(*steps)


def take_first(task, seed):
    """Return the first batch of a task, in a list."""
    return list(itertools.islice(task.sample(seed), 1))


def run_toy(pattern=None, level=LEVEL, **settings):
    """Return the results of the chosen methods on the toy task."""
    task = make_toy_task(**settings)
    module = types.ModuleType("benchmarks.tasks.toy")
    module.make_task = lambda num_steps: task
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        running.run_tasks(level, ["toy"], results.append, pattern)
    return results


def find(results, name):
    return next(each for each in results if each["method"] == name)


@pytest.mark.parametrize("head", [None, "head"])
def test_every_method_learns_the_new_domain(head):
    before, *results = run_toy(head=head)
    for result in results:
        errors = result["metrics"][0]["values"]
        assert max(errors) < before["metrics"][0]["values"][0], result["method"]
        # The chosen rate has the lowest error of a grid that reaches past it.
        rates = [rate for rate, _ in result["errors"]]
        best = min(result["errors"], key=lambda pair: pair[1])[0]
        assert result["rate"] == best
        assert best not in (rates[0], rates[-1]) or len(rates) == MAX_RATES

    counts = {each["method"]: each["num_trained"] for each in results}
    extra = 10 if head else 0
    assert counts["V only"] == 2 * 10 + extra
    assert counts["last columns of V"] == 2 * 3 + extra
    assert counts["LoRA"] == 2 * (12 + 10) + extra
    assert counts["core"] == 4 + extra
    assert counts[methods.FULL] == 120 + extra


def test_methods_on_quantised_bases_learn_as_many_numbers_as_lora():
    before, rounded, lora, *results = run_toy(f"^{methods.NONE}|^LoRA$|NF4")
    names = [each.name for each in methods.list_quantized_methods()]
    assert [rounded["method"], lora["method"]] == [methods.NONE_QUANTIZED, methods.LORA]
    assert [each["method"] for each in results] == names

    # NF4 rounds the base, and the delta is kept beside it.
    plain, kept = (each["metrics"][1]["values"][0] for each in (before, rounded))
    assert 0.99 < kept < plain
    for result in results:
        errors = result["metrics"][0]["values"]
        assert max(errors) < rounded["metrics"][0]["values"][0], result["method"]
        assert result["num_trained"] == lora["num_trained"] == 2 * (12 + 10)


def test_methods_without_their_inputs_are_absent(capsys):
    results = run_toy("^Q.*NF4", has_moments=False, level=QUICK)
    assert [each["method"] for each in results] == [methods.QLORA, "QPiSSA (NF4)"]
    assert "toy, QERA (NF4): absent" in capsys.readouterr().out


def test_quantised_bases_run_on_request_only():
    full = running.choose_methods(running.TABLE, None)
    assert len(full) == 11
    assert not any(methods.is_quantized(name) for name in full)
    quick = running.choose_methods(running.QUICK, None)
    assert quick == [methods.NONE, methods.V_ONLY, methods.LORA, methods.FULL]

    chosen = running.choose_methods(running.QUICK, "NF4")
    assert len(chosen) == 5
    assert all(methods.is_quantized(name) for name in chosen)


def test_qera_keeps_the_outputs_of_the_training_inputs_best():
    task = make_toy_task()
    moments = task.measure_moments()
    w, c = task.params["layer"]["w"], moments["layer"]["w"]
    errors = {}
    for method in methods.list_quantized_methods():
        data = moments if method.needs_moments else None
        tree, _ = methods.adapt_params(task, method, jax.random.key(0), data)
        difference = np.asarray(jlora.merge(tree)["layer"]["w"]) - w
        errors[method.name] = np.sum(difference * (c @ difference))
    # Both have the same base; QLoRA's factors do not correct it.
    assert errors["QERA (NF4)"] < errors[methods.QLORA]


def test_a_run_of_a_seed_repeats_itself():
    task = make_toy_task()
    method = next(each for each in methods.list_methods(3) if each.name == methods.LORA)
    trainer = Trainer(task, method)
    one, same, other = (trainer.train(0.1, seed).params for seed in (1, 1, 2))
    w = [np.asarray(each["layer"]["w"]) for each in (one, same, other)]
    np.testing.assert_array_equal(w[0], w[1])
    assert np.abs(w[0] - w[2]).max() > 1e-6


def test_the_grid_grows_until_its_best_rate_is_inside():
    def measure(rate):
        return abs(math.log10(rate) + 4)

    found = search_grid(measure, 1e-2, 3)
    assert math.isclose(min(found, key=found.get), 1e-4, rel_tol=1e-6)
    assert list(found) == sorted(found)
    assert min(found) < 0.5e-4
    assert len(search_grid(measure, 1e-2, 1)) == 1
    assert len(search_grid(lambda rate: -rate, 1e-2, 3)) == MAX_RATES


def test_splits_are_disjoint_and_batches_are_epochs():
    split = split_examples(50)
    together = np.concatenate(split)
    assert sorted(together) == list(range(50))
    assert [len(part) for part in split] == [25, 10, 15]

    batches = sample_indices(np.arange(10), 5, 4, seed=0)
    for first, second in (batches[:2], batches[2:]):
        assert sorted([*first, *second]) == list(range(10))


def test_results_are_read_back_newest_first_and_reported(tmp_path):
    results = run_toy()
    folder = tmp_path / "tasks"
    folder.mkdir()
    for result in results:
        append_result(folder / "1.jsonl", {**result, "seconds": 9.0})
        append_result(folder / "2.jsonl", result)
    diverged = {**results[-1], "level": "quick", "errors": [[1.0, math.inf]]}
    append_result(folder / "2.jsonl", diverged)

    found = read_newest(folder)
    assert found == json.loads(json.dumps(results))
    assert read_newest(folder, "quick")[0]["errors"] == [[1.0, None]]

    (path,) = write_task_report(tmp_path)
    text = path.read_text(encoding="utf-8")
    for result in results:
        assert result["method"] in text
        assert format_value(result["metrics"][0]) in text
    assert (path.parent / "tasks.png").stat().st_size > 10_000
    overview = make_overview(results)
    assert "toy: error ↓" in overview
    assert "toy: kept ↑" in overview
    assert write_task_report(tmp_path / "nothing") == []


def test_quantised_bases_have_their_own_tables(tmp_path):
    toy = run_toy(level=QUICK)
    other = [{**each, "task": "other"} for each in toy]
    quantized = run_toy("NF4", level=QUICK)
    overview = make_overview(toy + other)
    both = make_overview(toy + other + quantized)
    assert both.startswith(overview)

    # Only the task that ran, with the methods on float bases to compare with.
    added = both.removeprefix(overview)
    assert "Quantised bases, new domain" in added
    assert "other" not in added
    for result in [*quantized, find(toy, methods.NONE), find(toy, methods.LORA)]:
        assert f"| {result['method']} |" in added
        assert format_value(result["metrics"][0]) in added
    assert methods.FULL not in added

    # They also make a report on their own, without the picture of float bases.
    (tmp_path / "tasks").mkdir()
    for result in quantized:
        append_result(tmp_path / "tasks" / "1.jsonl", {**result, "level": "full"})
    (path,) = write_task_report(tmp_path)
    assert methods.QLORA in path.read_text(encoding="utf-8")
    assert not (path.parent / "tasks.png").exists()
    assert make_overview(quantized).startswith("**Quantised bases, new domain**")


def test_v_only_is_compared_with_lora_by_the_larger_spread():
    def metric(*values, higher=True):
        return {"values": list(values), "is_better_higher": higher}

    lora = metric(0.8, 0.9, 1.0)
    assert targets.is_as_good(metric(0.81, 0.81, 0.81), lora)
    assert not targets.is_as_good(metric(0.79, 0.79, 0.79), lora)
    assert targets.is_as_good(metric(0.2, 0.2, higher=False), metric(0.3, 0.3))
    assert not targets.is_as_good(metric(0.4, 0.4, higher=False), metric(0.3, 0.3))

    one = {"time": "t", "seconds": 10.0, "metrics": [lora]}
    results = [
        {**one, "task": task, "method": method}
        for task in running.TABLE.sizes
        for method in (methods.V_ONLY, methods.LORA)
    ]
    # A later run of quantised bases does not count.
    later = {**one, "time": "u", "task": "topics", "method": methods.QLORA}
    found = {"quick": results[:3], "full": [*results, later]}
    lines = targets.evaluate_targets(found)
    assert "6 (at least 4) met" in lines[0]
    assert "no record" in lines[1]
    assert "120 (at most 3600) met" in lines[2]
    assert targets.count_as_good(results[:-1]) is None


@pytest.mark.parametrize(
    ("tasks", "pattern", "message"),
    [
        (["tpoics"], None, r"must be one of topics, .*, got tpoics"),
        (["topics"], "LoRa", r"must match one of .*QERA \(NF4\), got 'LoRa'"),
    ],
)
def test_a_wrong_name_of_a_task_or_method_is_refused(tasks, pattern, message):
    arguments = argparse.Namespace(quick=True, tasks=tasks, methods=pattern, out=None)
    with pytest.raises(ValueError, match=message):
        run_command(arguments)


@pytest.mark.parametrize(
    ("name", "packages", "steps"),
    [
        ("topics", ("chatterbot_corpus", "sklearn", "tokenizers"), (40,)),
        ("answers", ("chatterbot_corpus", "tokenizers"), (40,)),
        ("translation", ("babel", "django", "sphinx", "sacrebleu"), (1, 1)),
        ("images", ("sklearn",), (1, 1)),
        ("recommendation", ("sklearn",), (1, 1)),
        ("language", (), (1, 1)),
    ],
)
def test_every_task_trains_and_is_measured(name, packages, steps):
    for package in packages:
        pytest.importorskip(package)
    task = load_task(name, *steps)
    task = task._replace(sample=functools.partial(take_first, task), num_steps=1)
    before = task.measure(task.params)
    assert list(before) == [metric.name for metric in task.metrics]
    assert np.isfinite([*before.values(), task.validate(task.params)]).all()

    # A step moves the loss; test and training examples differ.
    method = next(each for each in methods.list_methods(2) if each.name == methods.LORA)
    run = Trainer(task, method).train(1e-2, seed=0)
    assert not run.has_diverged
    assert task.validate(run.params) != task.validate(task.params)


def make_encoder_layer(rng, width=24):
    """Return a random layer of the sentence encoder."""

    def matrix(rows, columns):
        return {
            "w": np.float32(rng.standard_normal((rows, columns)) / rows**0.5),
            "b": np.float32(rng.standard_normal(columns)),
        }

    norm = {"gain": np.ones(width, np.float32), "b": np.zeros(width, np.float32)}
    names = ("query", "key", "value", "out")
    attention = {name: matrix(width, width) for name in names}
    mlp = {"up": matrix(width, 4 * width), "down": matrix(4 * width, width)}
    return {"attention": {**attention, "norm": norm}, "mlp": {**mlp, "norm": norm}}


def test_moments_are_of_the_inputs_of_each_matrix_without_padding():
    rng = np.random.default_rng(0)
    layers = [make_encoder_layer(rng) for _ in range(2)]
    x = rng.standard_normal((3, 5, 24)).astype(np.float32)
    mask = np.int32(np.arange(5)[None] < np.array([5, 3, 1])[:, None])
    moments = measure_moments(layers, Sentences(x, mask))
    tokens = x[mask.astype(bool)]
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    compare(moments[0]["attention"]["query"]["w"], tokens.T @ tokens)

    # Padding changes nothing.
    padded = np.where(mask[..., None], x, 7)
    again = measure_moments(layers, Sentences(padded, mask))
    jax.tree.map(compare, again, moments)

    # The last layer's output follows from the inputs of its last three matrices.
    output, inputs = trace_layers(layers, x, mask)
    attention, mlp = inputs[1]["attention"], inputs[1]["mlp"]

    def project(block, name, read):
        weights = layers[1][block][name]
        return np.asarray(read[name]["w"]) @ weights["w"] + weights["b"]

    def normalize(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / x.std(-1, keepdims=True)

    after = normalize(attention["query"]["w"] + project("attention", "out", attention))
    compare(mlp["up"]["w"], after)
    compare(mlp["down"]["w"], jax.nn.gelu(project("mlp", "up", mlp), approximate=False))
    compare(output, normalize(after + project("mlp", "down", mlp)))


@pytest.mark.parametrize("name", ["topics", "answers"])
def test_moments_of_a_task_are_of_its_training_sentences(name):
    for package in ("chatterbot_corpus", "sklearn", "tokenizers"):
        pytest.importorskip(package)
    task = load_task(name, 40)
    moments = task.measure_moments()
    plan = jlora.make_plan(task.params, jlora.Rule(task.pattern, task.rank))
    shapes = {path: each.shape for path, each in list_leaves(moments)}
    assert shapes == {each.path: (each.shape[0],) * 2 for each in plan.entries}

    # Batches are epochs, so their mean is the training split's up to the last epoch.
    tokens = [x[mask.astype(bool)] for x, mask, _ in task.sample(0)]
    tokens = np.concatenate(tokens)
    expected = tokens.T @ tokens / len(tokens)
    found = np.asarray(moments["layers"][0]["attention"]["query"]["w"])
    found = found * np.trace(expected) / np.trace(found)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_translation_chooses_the_most_likely_tokens():
    size = TranslatorSize(20, 5, 6, width=16, num_layers=1, num_heads=2)
    params = init_translator(size, jax.random.key(0))
    source = np.array([[3, 7, 9, PADDING, PADDING], [4, 8, 8, 8, 5]])
    found = translate(params, source, 2, 6)

    # One token after the other, with nothing behind it.
    encoded = encode(params, source, 2)
    target = np.full((2, 1), START)
    for _ in range(6):
        logits = decode(params, encoded, source, target, 2)
        chosen = np.argmax(logits[:, -1], axis=-1)
        target = np.concatenate([target, chosen[:, None]], axis=1)
    np.testing.assert_array_equal(found, target[:, 1:])

    # Padding is not seen.
    positions = params["source_positions"][:3]
    shorter = translate({**params, "source_positions": positions}, source[:1, :3], 2, 6)
    np.testing.assert_array_equal(found[:1], shorter)


def test_the_other_models_run_on_adapted_trees():
    images = np.random.default_rng(0).random((3, 8, 8), np.float32)
    vision = init_patch_encoder(jax.random.key(0))
    world = generate_world(num_old=4, num_new=3, num_ratings=5)
    towers = init_towers(300, 24, 16, jax.random.key(1))
    items = world.new.items[:, 0]
    inputs = world.new.features, world.item_features[items], items
    for params, pattern, run in (
        (vision, "layers/.*/(qkv|out|up|down)", lambda p: run_patch_encoder(p, images)),
        (towers, "users/|items/features", lambda p: predict_ratings(p, *inputs)),
    ):
        rule = jlora.Rule(pattern, 4, init="lora", trainable="uv")
        plan = jlora.make_plan(params, rule)
        adapted = jlora.adapt(params, plan, key=jax.random.key(2))
        # v is zero, so the model is the plain one up to the order of sums.
        compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(compare, run(adapted), run(params))


def test_the_generated_ratings_follow_their_rules():
    world = generate_world()
    assert world.old.values.shape == (800, 30)
    assert len(np.unique(world.new.items[0])) == 30
    # Around 3, with more than the noise: tastes matter.
    assert abs(world.old.values.mean() - 3) < 0.2
    assert world.old.values.std() > 0.4
    again = generate_world()
    np.testing.assert_array_equal(world.new.values, again.new.values)
