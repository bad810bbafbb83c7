"""Jobs that are killed: the next run completes them with the same bytes."""

import pytest

from tests.helpers.killed_runs import kill_runs, list_bytes
from tests.helpers.model_folders import write_job_inputs


@pytest.fixture
def inputs(tmp_path):
    return write_job_inputs(tmp_path / "inputs")


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
