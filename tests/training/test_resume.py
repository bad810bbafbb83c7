"""Checkpoints of `fit`: a resumed run has the bits of an undisturbed one."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.helpers.killed_runs import kill_runs, list_bytes

pytest.importorskip("orbax.checkpoint")
pytestmark = pytest.mark.usefixtures("standard_promotion")
KEY = jax.random.key(3)


def make_run(rule=None, seed=0):
    """Return (adapted, batches): a weight, and batches that differ."""
    rng = np.random.default_rng(seed)
    params = {"w": rng.standard_normal((10, 6), np.float32), "bias": np.zeros(6, "f4")}
    rule = rule or jlora.Rule("w", 4, trainable="uv")
    plan = jlora.make_plan(params, rule)
    adapted = jlora.adapt(params, plan, key=jax.random.key(1))
    batches = [
        (
            rng.standard_normal((8, 10), np.float32),
            rng.standard_normal((8, 6), np.float32),
        )
        for _ in range(40)
    ]
    return adapted, batches


def noisy_loss(params, batch, key):
    x, y = batch
    keep = jax.random.bernoulli(key, 0.9, x.shape)
    residual = jlora.linear(x * keep, params["w"]) + params["bias"][None] - y
    value = jnp.mean(residual**2)
    return value, {"largest": jnp.max(jnp.abs(residual))}


class StopHereError(Exception):
    pass


def stop_after(batches, count):
    for number, batch in enumerate(batches):
        if number == count:
            raise StopHereError
        yield batch


def fit(adapted, batches, **settings):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.02))
    scores = lambda tree: float(jnp.sum(tree["w"].v ** 2))  # noqa: E731
    settings = {
        "key": KEY,
        "has_aux": True,
        "evaluate": scores,
        "evaluate_every": 7,
        "checkpoint_every": 5,
        "progress": False,
    } | settings
    return jlora.fit(noisy_loss, adapted, optimizer, batches, **settings)


def assert_same_bits(one, other):
    for name in ("adapted", "opt_state", "losses", "metrics", "best"):
        pairs = (jax.tree.leaves(getattr(each, name)) for each in (one, other))
        for a, b in zip(*pairs, strict=True):
            np.testing.assert_array_equal(a, b)
    assert one.evaluations == other.evaluations


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("stop", [3, 5, 23, 39])
def test_an_interrupted_run_goes_on(tmp_path, steps, stop):
    adapted, batches = make_run()
    settings = {"steps_per_dispatch": steps, "metrics_file": tmp_path / "run.jsonl"}
    expected = fit(adapted, batches, **settings)
    lines = (tmp_path / "run.jsonl").read_text()

    settings["checkpoint"] = tmp_path / "run"
    with pytest.raises(StopHereError) as caught:
        fit(adapted, stop_after(batches, stop), **settings)
    assert len(caught.value.fit_result.losses) <= stop
    found = fit(adapted, batches, **settings)
    assert_same_bits(found, expected)
    assert (tmp_path / "run.jsonl").read_text() == lines
    # A finished run is not made again.
    assert_same_bits(fit(adapted, batches, **settings), expected)


def test_an_interrupt_is_saved_at_its_own_step(tmp_path):
    adapted, batches = make_run()
    with pytest.raises(StopHereError):
        fit(adapted, stop_after(batches, 13), checkpoint=tmp_path / "run")
    read = []

    def count():
        for batch in batches:
            read.append(1)
            yield batch

    steps = []
    fit(
        adapted,
        count(),
        checkpoint=tmp_path / "run",
        callback=lambda step, values: steps.append(step),
        log_every=1,
    )
    assert min(steps) >= 13
    names = sorted(int(path.name) for path in (tmp_path / "run").iterdir())
    assert names == [35, 40]  # the newest two


class CountingIterator:
    """An iterator with a state, as Grain's have."""

    def __init__(self, batches):
        self.batches, self.position, self.num_read = batches, 0, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == len(self.batches):
            raise StopIteration
        self.position += 1
        self.num_read += 1
        return self.batches[self.position - 1]

    def get_state(self):
        return json.dumps({"position": self.position}).encode()

    def set_state(self, state):
        self.position = json.loads(state)["position"]


def test_an_iterator_with_a_state_is_set_and_not_read_again(tmp_path):
    adapted, batches = make_run()
    expected = fit(adapted, batches)
    first = CountingIterator(batches)
    fit(adapted, first, checkpoint=tmp_path / "run", num_steps=20)
    again = CountingIterator(batches)
    found = fit(adapted, again, checkpoint=tmp_path / "run", num_steps=40)
    assert again.num_read < 40
    assert_same_bits(found, expected)


def test_a_checkpoint_of_another_job_is_refused_by_path(tmp_path):
    adapted, batches = make_run()
    fit(adapted, batches[:10], checkpoint=tmp_path / "run")

    other, _ = make_run(jlora.Rule("w", 3, trainable="uv"))
    cases = [
        (lambda s: fit(other, batches, **s), r"trained\['w'\]\.u"),
        (lambda s: fit(make_run(seed=1)[0], batches, **s), r"frozen\['w'\]\.base"),
        (lambda s: fit(adapted, batches, key=jax.random.key(9), **s), "key is"),
        (
            lambda s: fit(adapted, batches, also_train="bias", **s),
            r"trained\['bias'\]|frozen\['bias'\]",
        ),
        (
            lambda s: jlora.fit(
                noisy_loss, adapted, optax.sgd(0.1), batches, key=KEY, has_aux=True, **s
            ),
            "optimizer",
        ),
    ]
    for run, text in cases:
        with pytest.raises(ValueError, match=f"of another: {text}"):
            run({"checkpoint": tmp_path / "run", "progress": False})


def test_folders_that_cannot_be_used(tmp_path):
    adapted, batches = make_run()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="must be a folder, got a file"):
        fit(adapted, batches, checkpoint=tmp_path / "file")
    with pytest.raises(ValueError, match="that can be written to, got none"):
        fit(adapted, batches, checkpoint=tmp_path / "no" / "run")


def test_a_half_written_checkpoint_is_not_read(tmp_path):
    adapted, batches = make_run()
    expected = fit(adapted, batches)
    fit(adapted, batches[:20], checkpoint=tmp_path / "run")
    # As a run that was killed while it wrote leaves it behind.
    half = tmp_path / "run" / "25.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "arrays").mkdir()
    assert_same_bits(fit(adapted, batches, checkpoint=tmp_path / "run"), expected)


FULL = """
import resource, sys
from tests.training.test_resume import fit, make_run
adapted, batches = make_run()
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try:
    fit(adapted, batches, checkpoint=sys.argv[1])
except OSError as error:
    print(len(error.fit_result.losses), error)
"""


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(folder)], capture_output=True, text=True
    )
    number, text = done.stdout.strip().split(" ", 1)
    assert int(number) >= 5
    assert f"{folder}: `checkpoint` must be written whole, got: " in text
    assert "File too large" in text
    adapted, batches = make_run()
    found = fit(adapted, batches, checkpoint=folder)
    assert_same_bits(found, fit(adapted, batches))


KILLED = """
from tests.training.test_resume import fit, make_run
adapted, batches = make_run()
def slow():
    for batch in batches:
        time.sleep(0.01)
        yield batch
run = pathlib.Path(str(output) + "-run")
result = fit(adapted, slow(), checkpoint=run, steps_per_dispatch=2)
weight = result.adapted["w"]
new = output.with_name("new-" + output.name)
shutil.rmtree(new, ignore_errors=True)
new.mkdir()
arrays = {"u": weight.u, "v": weight.v, "losses": result.losses}
jlora.save_arrays(new / "w.npz", arrays)
new.rename(output)
shutil.rmtree(run)
"""


def test_killed_runs_end_with_the_same_bits(tmp_path):
    setup = "import jlora, optax, pytest, shutil, orbax.checkpoint"
    results = kill_runs(KILLED, tmp_path, 20, setup)
    expected = list_bytes(results[0])
    assert set(expected) == {"w.npz"}
    for result in results[1:]:
        assert list_bytes(result) == expected


def test_the_environment_has_orbax_without_its_messages(tmp_path, capfd):
    adapted, batches = make_run()
    fit(adapted, batches, checkpoint=tmp_path / "run")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert os.listdir(tmp_path) == ["run"]
