import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.models.minilm import find_minilm
from benchmarks.run.contenders import Level
from benchmarks.run.environment import ROOT
from benchmarks.run.harness import measure_group
from benchmarks.run.limits import Limits
from benchmarks.run.records import check_record
from benchmarks.suites import adaptation
from benchmarks.suites.adaptation import (
    adapted_layers,
    encoder_steps,
    jlora_models,
    lifted_steps,
    llama_weights,
    whole_models,
)

# One run of each: the tests check that it runs and how exact it is, not how fast.
ONCE = Level("quick", 1, 0.1)
LIMITS = Limits({("float32", "highest"): 1e11, ("float32", "default"): 1e11}, 1e10)
PEERS = {"torch", "peft", "transformers", "qwix", "flax", "threadpoolctl"}


def measure(group):
    """Return {contender: errors} of those that were measured, every record checked."""
    records = measure_group(group, ONCE, LIMITS)
    for record in records:
        check_record(json.loads(json.dumps(record)))
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


def test_lists_import_no_peer():
    code = (
        "import sys; from benchmarks.suites.adaptation import list_groups\n"
        "for level in ('quick', 'full'):\n"
        "    for platform in ('cpu', 'gpu', 'tpu'): assert list_groups(level, "
        f"platform)\nprint({PEERS!r} & set(sys.modules))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("level", ["quick", "full"])
def test_each_contender_has_a_record_of_its_own(level, platform):
    groups = adaptation.list_groups(level, platform)
    keys = [
        (group.operation, group.case.name, contender.name)
        for group in groups
        for contender in group.contenders
    ]
    assert len(set(keys)) == len(keys)
    for group in groups:
        assert group.contenders[0].role == "jlora"
        assert group.case.describe()["name"] == group.case.name


def test_weights_of_one_shape_differ_but_in_their_singular_values():
    model = llama_weights.make_model(64, 2, "float32")
    assert len(model.arrays) == 14
    assert model.arrays["layers/1/gate"].shape == (64, 172)
    squares = [a for a in model.arrays.values() if a.shape == (64, 64)]
    values = [np.linalg.svd(a, compute_uv=False) for a in squares]
    for i in range(1, len(squares)):
        np.testing.assert_allclose(values[i], values[0], rtol=1e-4)
        assert np.abs(squares[i] - squares[0]).max() > 0.1


def test_a_deep_model_is_adapted_in_repeats():
    model = llama_weights.make_model(16, 32, "bfloat16")
    assert (len(model.arrays), model.num_repeats) == (8 * 7, 4)
    (group,) = [
        group
        for group in adaptation.list_groups("full", "gpu")
        if "rank 128" in group.case.name and len(group.contenders) > 1
    ]
    assert "8 layers at a time, 4 times" in group.contenders[0].setting


def test_whole_models_are_initialised_near_the_optimum():
    group = whole_models.make_model_group(64, 2, 4, "float32", is_full=True)
    found = measure(group)
    assert {"jlora adapt", "jlora adapt, stacked"} <= set(found)
    kinds = ("weights changed by repeating", "weights changed by another layer")
    assert [found["jlora adapt"][kind] for kind in kinds] == [0, 0]
    for name, errors in found.items():
        assert next(iter(errors)) == "excess error"
        # randomized_svd documents 1e-4 at its defaults. Sketches of peft have no more
        # columns than the rank, and stay some percent above.
        assert abs(errors["excess error"]) < (0.1 if "niter" in name else 1e-4)


def test_first_call_compiles_and_finds_the_same(monkeypatch):
    cleared = []
    # Emptying the real caches would make every later test compile again.
    monkeypatch.setattr(jlora_models.jax, "clear_caches", lambda: cleared.append(True))
    (errors,) = measure(whole_models.make_cold_group(128, 1, 4, "float32")).values()
    assert cleared
    assert abs(errors["excess error"]) < 1e-4


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # qwix calls a deprecated part of flax
def test_layers_err_like_one_product(standard_promotion):
    found = measure(adapted_layers.make_layer_group(96, 24, 8))
    assert {"jlora apply_factors", "jax plain"} <= set(found)
    for errors in found.values():
        # Sums of 96 terms in float32 err by about 5 eps of 1.2e-7.
        assert errors["relative error"] < 2e-6


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # qwix calls a deprecated part of flax
def test_lifted_steps_agree_with_the_peers(standard_promotion):
    found = measure(lifted_steps.make_lifted_group(64, 1, 16, 4))
    assert {"jlora lift", "hand-written apply_factors"} <= set(found)

    expected = found["hand-written apply_factors"]
    assert expected["loss after a step"] < 1
    for errors in found.values():
        # A mean of a thousand squares in float32.
        assert errors["loss difference"] < 1e-6
        # Adam's first step has a fixed size in each number, and signs of gradients near
        # zero may differ.
        assert (
            abs(errors["loss after a step"] / expected["loss after a step"] - 1) < 1e-4
        )


def test_training_steps_start_from_the_loss_of_the_plain_weights(standard_promotion):
    try:
        find_minilm()
    except FileNotFoundError as error:
        pytest.skip(str(error))

    found = measure(encoder_steps.make_step_group(4, 2, 6))
    assert len(found) == 3
    for errors in found.values():
        # Embeddings agree to 2e-6 (test_minilm); the logits are twenty times their
        # products.
        assert errors["loss difference"] < 1e-4

    trained = [errors["trained numbers"] for errors in found.values()]
    assert trained == sorted(trained)
