"""Several processes: one is the first, and they compare, wait and fail together."""

import functools

import numpy as np
import pytest

from jlora import _processes
from tests.helpers.processes import run_processes, run_well

PROGRAM = """
import time, warnings
from jlora import Rule
from jlora._progress import Progress, report, warn
from jlora.initializers import loftq

def note(name, function):
    try:
        results[name] = function()
    except Exception as error:
        results[name] = [type(error).__name__, str(error)]

def draw(seed):
    return jax.random.normal(jax.random.key(seed), (3,))

def make_settings(rank):
    plan = (Rule("q_proj", rank, init=loftq(num_rounds=2)), draw, np.arange(3))
    return {"plan": plan, "key": jax.random.key(rank), "names": {"a", "b"}}

results["first"] = _processes.is_first_process()
results["count"] = _processes.count_processes()
mesh = jax.make_mesh((jax.device_count(),), ("x",))
rows = jax.NamedSharding(mesh, jax.P("x"))
numbers = np.arange(16.0, dtype=np.float32)
sharded = jax.make_array_from_callback((16,), rows, lambda index: numbers[index])

note("same", lambda: _processes.check_same(make_settings(4), "settings"))
note("same global array", lambda: _processes.check_same(sharded, "x"))
with jax.set_mesh(mesh):
    note("same under a mesh", lambda: _processes.check_same(1, "settings"))
for name, value in {
    "rank": make_settings(4 + index // (count - 1)),
    "key": jax.random.key(index),
    "array": np.full(3, index),
    "dtype": np.zeros(3, [np.int32, np.float32][index % 2]),
    "function": draw if index else note,
}.items():
    note(f"another {name}", lambda: _processes.check_same(value, name))

def fail_on_last():
    with _processes.raising_on_all():
        if index == count - 1:
            open("/missing/file")

def fail_oddly():
    with _processes.raising_on_all():
        if index == count - 1:
            {}["a key"]

note("file error", fail_on_last)
note("key error", fail_oddly)
note("no error", lambda: _processes.share_error(None))
note("shared", lambda: _processes.share_json({"index": index, "text": "é" * 500}))

if index == 0:
    time.sleep(0.5)
results["came"] = time.time()
_processes.wait_for_all("there")
results["left"] = time.time()

with Progress("a loop", 2, every=1) as bar:
    bar.advance(1)
report("a report")
warnings.simplefilter("always")
warn("a warning")
"""


@functools.cache
def run_program(count):
    return run_processes(PROGRAM, count)


@pytest.fixture(params=[2, 4])
def ended(request):
    found = run_program(request.param)
    for each in found:
        assert each.code == 0, each.stderr
    return found


def test_the_first_of_all_processes_is_known(ended):
    assert [each.results["first"] for each in ended] == [True] + [False] * (
        len(ended) - 1
    )
    assert {each.results["count"] for each in ended} == {len(ended)}


@pytest.mark.parametrize("name", ["same", "same global array", "same under a mesh"])
def test_equal_values_are_accepted(ended, name):
    assert [each.results[name] for each in ended] == [None] * len(ended)


@pytest.mark.parametrize("name", ["rank", "key", "array", "dtype", "function"])
def test_other_values_are_refused_on_all_processes(ended, name):
    messages = {tuple(each.results[f"another {name}"]) for each in ended}
    other = len(ended) - 1 if name == "rank" else 1
    text = (
        f"`{name}` must be the same on all processes, got another one on process "
        f"{other} than on process 0. Pass the same everywhere."
    )
    assert messages == {("ValueError", text)}


def test_an_error_of_one_process_is_raised_on_all(ended):
    expected = [
        "FileNotFoundError",
        "[Errno 2] No such file or directory: '/missing/file'",
    ]
    for each in ended:
        assert each.results["file error"] == expected
        assert each.results["key error"] == ["KeyError", "'a key'"]
        assert each.results["no error"] is None


def test_the_value_of_the_first_process_is_shared(ended):
    for each in ended:
        assert each.results["shared"] == {"index": 0, "text": "é" * 500}


def test_all_wait_for_the_slowest(ended):
    last = max(each.results["came"] for each in ended)
    assert last == ended[0].results["came"]
    assert all(each.results["left"] >= last for each in ended)


def test_only_the_first_process_reports_and_warns(ended):
    for i, each in enumerate(ended):
        for text in ("a loop: step 1/2", "a report", "UserWarning: a warning"):
            assert (text in each.stderr) == (i == 0), text


@pytest.mark.parametrize("dead", [0, 1])
def test_the_others_end_with_an_error_when_one_dies(dead):
    program = f"""
import os, signal
_processes.wait_for_all("begin")
if index == {dead}:
    os.kill(os.getpid(), signal.SIGKILL)
_processes.check_same(1, "settings")
"""
    ended = run_processes(program, 3, timeout=40)
    assert ended[dead].code == -9
    for i, each in enumerate(ended):
        # The service in process 0 may end the others before they see it themselves.
        assert i == dead or each.code in (1, -6), each
        text = "all processes must reach this place" if each.code == 1 else "died"
        assert i == dead or text in each.stderr


def test_one_process_needs_no_others():
    assert _processes.is_first_process()
    assert _processes.count_processes() == 1
    _processes.wait_for_all("there")
    _processes.check_same(object(), "value")
    assert _processes.share_json([1]) == [1]
    with pytest.raises(OSError, match="missing"), _processes.raising_on_all():
        raise OSError("missing")


@pytest.mark.parametrize("value", [1, "a", (1, np.ones(2)), {"b": None}])
def test_equal_values_have_one_text(value):
    assert _processes._identify(value) == _processes._identify(value)
    assert _processes._identify(value) != _processes._identify([value, value])


def test_a_failed_program_is_reported():
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_well("1 / 0", 1)
    (ended,) = run_processes("import time; time.sleep(60)", 1, timeout=3)
    assert ended.code is None
