"""Jobs that are killed: the next run completes them with the same bytes."""

import json

import ml_dtypes
import numpy as np
import pytest

import jlora
from tests.helpers.killed_runs import kill_runs, list_bytes

NUM_LAYERS = 6
NAMES = [
    f"model.layers.{i}.{name}_proj" for i in range(NUM_LAYERS) for name in ("q", "up")
]


@pytest.fixture
def inputs(tmp_path):
    """Write a base of several files, a tuned model, and an adapter."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)

    folder = tmp_path / "inputs"
    for kind in ("base", "tuned"):
        (folder / kind).mkdir(parents=True)
        places = {}
        for i in range(NUM_LAYERS):
            file = f"model-{i}.safetensors"
            arrays = {
                f"{name}.weight": draw(48, 32) for name in NAMES[2 * i : 2 * i + 2]
            }
            jlora.save_arrays(folder / kind / file, arrays)
            places |= dict.fromkeys(arrays, file)
        index = folder / kind / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": places}))
    factors = {name: jlora.Factors(draw(32, 4), draw(4, 48)) for name in NAMES}
    jlora.save_peft(folder / "adapter", factors)
    return folder


SMALL_WINDOWS = """
import jlora
from jlora.checkpoints import window_store
window_store._WINDOW_BYTES = 1  # one matrix each
"""
JOBS = {
    "merge": "jlora.checkpoints.merge_checkpoint("
    "'{0}/base', '{0}/adapter', output, progress=False)",
    "extract": "import jax; jlora.checkpoints.extract_checkpoint("
    "'{0}/base', '{0}/tuned', output, rank=3, key=jax.random.key(0), progress=False)",
    "init": "import jax; jlora.checkpoints.initialize_checkpoint("
    "'{0}/base', output, rank=3, key=jax.random.key(0), progress=False)",
    "resize": "jlora.checkpoints.resize_adapter("
    "'{0}/adapter', output, rank=2, progress=False)",
}


@pytest.mark.parametrize(
    ("job", "num_kills"), [("merge", 20), ("extract", 20), ("init", 5), ("resize", 5)]
)
def test_killed_runs_are_completed_with_the_same_bytes(
    inputs, tmp_path, job, num_kills
):
    before = list_bytes(inputs)
    (tmp_path / "results").mkdir()
    code = JOBS[job].format(inputs)
    results = kill_runs(code, tmp_path / "results", num_kills, SMALL_WINDOWS)
    expected = list_bytes(results[0])
    assert len(expected) > 1
    for result in results[1:]:
        assert list_bytes(result) == expected
    assert list_bytes(inputs) == before
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {path.name for path in results}
