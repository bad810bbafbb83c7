import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

import jlora
from benchmarks.report.targets import training as targets
from benchmarks.run.contenders import Level
from benchmarks.run.environment import ROOT
from benchmarks.run.harness import measure_group
from benchmarks.run.limits import Limits
from benchmarks.run.records import check_record
from benchmarks.suites import training
from benchmarks.suites.adaptation.llama_network import run_network
from benchmarks.suites.training import (
    fit_loops,
    rank_trials,
    step_methods,
    step_programs,
    torch_steps,
)
from benchmarks.suites.training.transformers import (
    Sizes,
    attend,
    make_transformer,
    plain_loss,
)

# optax and jax.nn.dot_product_attention promote dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

# One run of each: the tests check that it runs and how exact it is, not how fast.
ONCE = Level("quick", 1, 0.1)
LIMITS = Limits({("float32", "default"): 1e11}, 1e10)
SMALL = Sizes(hidden=32, layers=1, tokens=8, rank=4)
NUM_WEIGHTS = 4 * 32 * 32 + 3 * 32 * 86
STATE = "optimizer state over trained parameters"


def measure(group):
    """Return {contender: errors} of those that were measured, every record checked."""
    group = group._replace(
        contenders=tuple(each._replace(least_runs=1) for each in group.contenders)
    )
    records = measure_group(group, ONCE, LIMITS)
    for record in records:
        check_record(record)
        # A peer may be missing here; it may not fail where it is installed.
        missing = record["role"] != "jlora" and "is not installed" in (
            record["reason"] or ""
        )
        assert missing or record["status"] == "measured", record["reason"]
    return {
        record["implementation"]: record["errors"]
        for record in records
        if record["status"] == "measured"
    }


@pytest.mark.parametrize("level", ["quick", "full"])
def test_each_contender_has_a_record_of_its_own(level):
    groups = training.list_groups(level, "cpu")
    keys = [
        (group.operation, group.case.name, contender.name)
        for group in groups
        for contender in group.contenders
    ]
    assert len(set(keys)) == len(keys)
    for group in groups:
        assert group.contenders[0].role == "jlora"
        assert all(contender.setting for contender in group.contenders)
        assert group.case.describe()["name"] == group.case.name


def test_lists_import_no_peer():
    code = (
        "import sys; from benchmarks.suites import list_suite\n"
        "for level in ('quick', 'full'): list_suite('training', level, 'cpu')\n"
        "print({'torch', 'peft', 'threadpoolctl'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.strip() == "set()"


def test_steps_start_at_the_loss_of_the_plain_model_and_know_their_cost():
    found = measure(step_methods.make_step_group(SMALL))
    for errors in found.values():
        assert errors["first loss difference"] < 1e-5
        assert errors[STATE] == 2

    # The sums of m and n over all weights, the factors' sizes over the rank.
    sum_n = 4 * 32 + 2 * 86 + 32
    sum_m = 4 * 32 + 2 * 32 + 86
    trained = {name: errors["trained parameters"] for name, errors in found.items()}
    assert trained[step_methods.V_ONLY] == 4 * sum_n
    assert trained[step_methods.U_AND_V] == 4 * (sum_m + sum_n)
    assert trained[step_methods.COLUMNS] == 4 * 8 * 7
    assert trained[step_methods.FULL] == NUM_WEIGHTS
    assert trained.get(step_methods.PEFT, 4 * (sum_m + sum_n)) == 4 * (sum_m + sum_n)

    for kind in ("flops", "peak bytes"):
        values = {name: errors.get(kind) for name, errors in found.items()}
        assert values[step_methods.V_ONLY] < values[step_methods.U_AND_V]
        assert values[step_methods.COLUMNS] < values[step_methods.FULL]
        assert step_methods.PEFT not in found or values[step_methods.PEFT] is None


def test_a_prepared_step_is_train_step():
    model = make_transformer(SMALL)
    prepared = step_methods._prepare_adapted({"trainable": "v"}, model)
    losses = [prepared.fetch(prepared.run()).loss for _ in range(2)]

    optimizer, loss = optax.adam(step_methods.RATE), jlora.lift(plain_loss)
    adapted = step_methods.adapt_transformer(model, trainable="v")
    state, frozen = jlora.init_train(adapted, optimizer)
    for expected in losses:
        state, value = jlora.train_step(
            loss, optimizer, state, frozen, model.batches[0]
        )
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert losses[1] < losses[0]


def test_full_fine_tuning_does_not_change_the_inputs_of_other_contenders():
    model = make_transformer(SMALL)
    before = {path: weight.copy() for path, weight in model.weights.items()}
    prepared = step_methods._prepare_full(model)
    prepared.run()
    jax.tree.map(np.testing.assert_array_equal, model.weights, before)


def test_unknown_figures_have_no_error_kind():
    model = make_transformer(SMALL)
    figures = step_programs.StepFigures(model.loss, 10, 80)
    errors = step_programs.measure_figures((model,), figures)
    assert errors == {"first loss difference": 0, "trained parameters": 10, STATE: 2}


def test_torch_runs_the_same_network():
    torch = pytest.importorskip("torch")
    # Two heads.
    model = make_transformer(Sizes(hidden=256, layers=2, tokens=6, rank=2))
    x, _ = model.batches[0]

    expected = run_network(x, 2, lambda path, x: x @ model.weights[path])
    weights = {path: torch.tensor(weight) for path, weight in model.weights.items()}
    found = torch_steps._run_network(
        torch.tensor(x), 2, lambda path, x: x @ weights[path]
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_attention_is_the_one_of_jax():
    q, k, v = np.random.default_rng(0).standard_normal((3, 6, 256), np.float32)
    expected = jax.nn.dot_product_attention(
        *(each.reshape(1, 6, 2, 128) for each in (q, k, v)), is_causal=True
    )
    np.testing.assert_allclose(attend(q, k, v), expected.reshape(6, 256), atol=1e-5)


@pytest.mark.parametrize(
    "make_group",
    [
        fit_loops.make_fit_group,
        fit_loops.make_checkpoint_group,
        fit_loops.make_dispatch_group,
    ],
)
def test_loops_take_the_same_steps(make_group):
    found = measure(make_group(SMALL, num_steps=25))
    assert len(found) == 2
    for errors in found.values():
        assert errors["first loss difference"] < 1e-5
        assert errors["steps"] == 25
    first, second = (errors["last loss"] for errors in found.values())
    np.testing.assert_allclose(first, second, rtol=1e-6)


def make_records():
    """Return {key: record} of the full level, with the figures of each contender."""
    times = {step_methods.V_ONLY: 30.0, step_methods.FULL: 60.0}
    found = {}
    for group in training.list_groups("full", "cpu"):
        for contender in group.contenders:
            key = (group.suite, group.operation, group.case.name, contender.name)
            size = 1.0 if contender.name == step_methods.V_ONLY else 4.0
            found[key] = {
                "suite": group.suite,
                "operation": group.operation,
                "case": {"name": group.case.name},
                "time": "2026-01-02T03:04:05+00:00",
                "times_ms": [times.get(contender.name, 40.0)] * 3,
                "rounds": [0, 1, 2],
                "errors": {"flops": size, "peak bytes": 2 * size, STATE: 2.5},
            }
    return found


def test_targets_name_records_of_the_full_level():
    found = make_records()
    values = {target.name: target.measure(found) for target in targets.TARGETS}
    assert None not in values.values()
    assert values["V-only step, time over full fine-tuning"] == 0.5
    assert values["V-only step, time over peft and torch"] == 0.75
    assert values["V-only step, peak bytes over full fine-tuning"] == 0.25
    (state,) = [value for name, value in values.items() if "difference from 2" in name]
    assert state == 0.5


def test_targets_of_absent_records_have_no_value():
    assert {target.measure({}) for target in targets.TARGETS} == {None}


def test_candidates_of_a_cross_validation_are_the_same_one_by_one():
    found = measure(rank_trials.make_trial_group(size=16, num_steps=2))
    smallest = [errors["smallest mean error"] for errors in found.values()]
    # Sums in another order in float32.
    assert smallest[0] == pytest.approx(smallest[1], rel=1e-4)
