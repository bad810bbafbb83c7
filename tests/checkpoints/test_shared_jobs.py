"""Jobs by several processes: the bytes of one process, whoever ends or dies first."""

import pytest

import jlora
from jlora.checkpoints import window_store
from jlora.checkpoints.locks import hold_lock
from jlora.cli.main import main
from tests.helpers.killed_runs import kill_parts, list_bytes
from tests.helpers.model_folders import write_job_inputs
from tests.helpers.processes import run_processes, run_well

JOBS = {
    "merge": "jlora.checkpoints.merge_checkpoint("
    "'{0}/base', '{0}/adapter', output, process=process, progress=False)",
    "stochastic merge": "import jax; jlora.checkpoints.merge_checkpoint("
    "'{0}/base', '{0}/adapter', output, rounding='stochastic', "
    "key=jax.random.key(1), process=process, progress=False)",
    "extract": "import jax; jlora.checkpoints.extract_checkpoint('{0}/base', "
    "'{0}/tuned', output, rank=3, key=jax.random.key(0), process=process, "
    "progress=False)",
    "init": "import jax; jlora.checkpoints.initialize_checkpoint('{0}/base', output, "
    "rank=3, key=jax.random.key(0), process=process, progress=False)",
    "init by energy": "import jax; jlora.checkpoints.initialize_checkpoint("
    "'{0}/base', output, energy=0.6, max_rank=9, key=jax.random.key(0), "
    "process=process, progress=False)",
    "quantised init": "import jax; jlora.checkpoints.initialize_checkpoint("
    "'{0}/base', output, rank=3, quantize='int4', key=jax.random.key(0), "
    "process=process, progress=False)",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_job_inputs(tmp_path_factory.mktemp("jobs") / "inputs")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(window_store, "_WINDOW_BYTES", 1)  # one matrix each


def run_part(inputs, job, output, process):
    """Return the report of a job, or of a part of it."""
    *setup, call = (JOBS | SMALL_JOBS)[job].format(inputs).split("; ")
    names = {"jlora": jlora, "output": output, "process": process}
    exec("\n".join(setup), names)
    return eval(call, names)


@pytest.mark.parametrize("job", JOBS)
def test_parts_give_the_bytes_of_one_process(inputs, tmp_path, job):
    expected_report = run_part(inputs, job, tmp_path / "one", None)
    expected = list_bytes(tmp_path / "one")
    for order in ((0, 1), (1, 0), (2, 0, 1)):
        output = tmp_path / f"by_{''.join(map(str, order))}"
        for index in order:
            assert not output.exists()
            report = run_part(inputs, job, output, (index, len(order)))
        assert list_bytes(output) == expected
        assert report == expected_report
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"one", "by_01", "by_10", "by_201"}


def test_a_part_writes_its_share_only(inputs, tmp_path, monkeypatch):
    numbers, put = [], window_store.WindowStore.put

    def count(store, number, arrays):
        numbers.append(number)
        put(store, number, arrays)

    monkeypatch.setattr(window_store.WindowStore, "put", count)
    report = run_part(inputs, "extract", tmp_path / "new", (0, 3))
    assert report.modules == ()
    assert numbers == [0, 1, 2, 3]  # of 12 matrices
    run_part(inputs, "extract", tmp_path / "new", (2, 3))
    assert numbers[4:] == [8, 9, 10, 11]
    # A run without parts takes the files of all, and does the rest.
    assert len(run_part(inputs, "extract", tmp_path / "new", None).modules) == 12
    assert numbers[8:] == [4, 5, 6, 7]


def test_more_processes_than_pieces(inputs, tmp_path):
    for index in range(14):
        assert not (tmp_path / "new").exists()
        run_part(inputs, "merge", tmp_path / "new", (index, 14))
    run_part(inputs, "merge", tmp_path / "one", None)
    assert list_bytes(tmp_path / "new") == list_bytes(tmp_path / "one")


def test_parts_of_another_job_are_refused(inputs, tmp_path):
    output = tmp_path / "new"
    run_part(inputs, "stochastic merge", output, (0, 2))
    before = list_bytes(tmp_path)
    with pytest.raises(ValueError, match="got those of another one with a different r"):
        run_part(inputs, "merge", output, (1, 2))
    after = list_bytes(tmp_path)
    after = {name: data for name, data in after.items() if "process-1" not in name}
    assert after == before
    run_part(inputs, "stochastic merge", output, (1, 2))
    assert output.is_dir()


def test_a_part_at_work_is_refused(inputs, tmp_path, monkeypatch):
    from jlora.checkpoints import shared_output

    monkeypatch.setattr(shared_output, "_NUM_TRIES", 2)
    partial = tmp_path / ".new.partial"
    partial.mkdir()
    with hold_lock(partial / ".process-1.lock") as is_held:
        assert is_held
        with pytest.raises(ValueError, match=r"got 1 of 2, which is at work\. Number"):
            run_part(inputs, "merge", tmp_path / "new", (1, 2))
        run_part(inputs, "merge", tmp_path / "new", (0, 2))
    with hold_lock(partial / ".lock"):
        text = "by one run at a time, got another run at work"
        for process in (None, (1, 2)):
            with pytest.raises(ValueError, match=text):
                run_part(inputs, "merge", tmp_path / "new", process)
    with hold_lock(partial / ".lock", is_shared=True):
        with pytest.raises(ValueError, match=text):
            run_part(inputs, "merge", tmp_path / "new", None)
        run_part(inputs, "merge", tmp_path / "new", (1, 2))  # others are at work
        assert not (tmp_path / "new").exists()
    run_part(inputs, "merge", tmp_path / "new", (1, 2))
    assert (tmp_path / "new").is_dir()


@pytest.mark.parametrize(
    ("process", "kind", "text"),
    [
        ((2, 2), ValueError, r"with an index below the count, got \(2, 2\)"),
        ((-1, 2), ValueError, "`process` must be at least 0, got -1"),
        ((0.5, 2), TypeError, "`process` must be an integer, got 0.5"),
        ("0/2", TypeError, r"`process` must be a tuple \(index, count\), got str"),
        ((0, 1, 2), TypeError, r"`process` must be a tuple \(index, count\), got tup"),
    ],
)
@pytest.mark.parametrize("job", ["merge", "extract", "init"])
def test_a_wrong_process_is_refused(inputs, tmp_path, job, process, kind, text):
    with pytest.raises(kind, match=text):
        run_part(inputs, job, tmp_path / "new", process)
    assert list(tmp_path.iterdir()) == []


def test_commands_do_parts(inputs, tmp_path, capsys):
    commands = {
        "merge": ["merge", f"{inputs}/base", f"{inputs}/adapter"],
        "extract": ["extract", f"{inputs}/base", f"{inputs}/tuned", "--rank", "2"],
        "init": ["init", f"{inputs}/base", "--rank", "2"],
    }
    for name, command in commands.items():
        output = tmp_path / name
        assert main([*command, "-o", str(output), "--process", "1/2"]) == 0
        text = f"part 1/2 of {output} is done; the last of the other parts completes it"
        assert capsys.readouterr().out == f"{text}\n"
        assert main([*command, "-o", str(output), "--process", "0/2"]) == 0
        assert f"wrote {output}: " in capsys.readouterr().out
        assert main([*command, "-o", f"{output}_1"]) == 0
        assert list_bytes(output) == list_bytes(tmp_path / f"{name}_1")
        capsys.readouterr()
    for text in ("2/2", "1", "a/b", "-1/2", "1/2/3"):
        option = f"--process={text}"
        assert main([*commands["merge"], "-o", str(tmp_path / "x"), option]) == 2
        assert "`--process` must be I/N with 0 <= I < N" in capsys.readouterr().err
    new = str(tmp_path / "x")
    assert main([*commands["init"], "-o", new, "--process", "0/2", "--dry-run"]) == 0
    assert "would write" in capsys.readouterr().out


SMALL_WINDOWS = """
import jlora
from jlora.checkpoints import window_store
window_store._WINDOW_BYTES = 1
"""


@pytest.mark.parametrize(("job", "num_rounds"), [("merge", 5), ("init by energy", 3)])
def test_only_the_part_that_died_is_run_again(inputs, tmp_path, job, num_rounds):
    code = JOBS[job].format(inputs)
    results = kill_parts(code, tmp_path, 3, num_rounds, SMALL_WINDOWS)
    expected = list_bytes(results[0])
    assert len(results) >= num_rounds + 2
    assert all(list_bytes(result) == expected for result in results)


JOINT = """
from jlora.checkpoints import window_store
import os
window_store._WINDOW_BYTES = 1
folder = sys.argv[4]
process = None

def note(name, function):
    try:
        results[name] = function()
    except Exception as error:
        results[name] = [type(error).__name__, str(error)]
"""


# Small jobs, which the first process does for all.
SMALL_JOBS = {
    "resize": "jlora.checkpoints.resize_adapter("
    "'{0}/adapter', output, rank=2, progress=False)",
    "combine": "jlora.checkpoints.combine_adapters("
    "{{'{0}/adapter': 0.5}}, output, progress=False)",
}


@pytest.mark.parametrize("count", [2, 4])
def test_processes_of_jax_share_a_job(inputs, tmp_path, count):
    program, jobs = JOINT, JOBS | SMALL_JOBS
    for i, job in enumerate(jobs):
        *setup, call = jobs[job].format(inputs).split("; ")
        call = call.replace("progress=False", "progress=None")
        program += "\n".join(["", *setup, f'output = f"{{folder}}/{i}"'])
        program += f"\nresults[{job!r}] = str({call})"
        program += f"\nassert os.path.isdir(output), {job!r}"
    ended = run_processes(program, count, num_devices=1, arguments=[tmp_path])
    for each in ended:
        assert each.code == 0, each.stderr
    for i, job in enumerate(jobs):
        report = run_part(inputs, job, tmp_path / job, None)
        assert {each.results[job] for each in ended} == {str(report)}
        assert list_bytes(tmp_path / str(i)) == list_bytes(tmp_path / job)
    # Progress is shown by the first process only.
    assert "merge: " in ended[0].stderr
    assert not any("merge: " in each.stderr for each in ended[1:])


def test_processes_of_jax_fail_together(inputs, tmp_path):
    init = JOBS["init"].format(inputs).removeprefix("import jax; ")
    program = f"""{JOINT}
from jlora.checkpoints import init_run
output = folder + "/new"
note("key", lambda: {init.replace("key(0)", "key(index)")})
results["no folder"] = os.listdir(folder)
fill = init_run.fill_initial_factors
def fail(*arguments):
    raise OSError(28, "No space left on device", folder)
if index == 1:
    init_run.fill_initial_factors = fail
note("full", lambda: {init})
init_run.fill_initial_factors = fill
note("again", lambda: len({init}.modules))
"""
    for each in run_well(program, 2, num_devices=1, arguments=[tmp_path]):
        kind, text = each["key"]
        assert kind == "ValueError"
        assert "`arguments` must be the same on all processes, got another" in text
        assert each["no folder"] == []
        assert each["full"][0] == "OSError"
        assert "No space left" in each["full"][1]
        assert each["again"] == 12


def test_a_process_of_jax_that_dies_ends_the_others(inputs, tmp_path):
    init = JOBS["init"].format(inputs).removeprefix("import jax; ")
    program = f"""{JOINT}
import signal
from jlora.checkpoints import window_store
output = folder + "/new"
put = window_store.WindowStore.put
def die(store, number, arrays):
    put(store, number, arrays)
    os.kill(os.getpid(), signal.SIGKILL)
if index == 1:
    window_store.WindowStore.put = die
{init}
"""
    other, dead = run_processes(
        program, 2, num_devices=1, timeout=40, arguments=[tmp_path]
    )
    assert dead.code == -9
    assert other.code in (1, -6)
    assert not (tmp_path / "new").exists()
    # Its first file stays, and the next run, here of one process, goes on from it.
    run_part(inputs, "init", tmp_path / "new", None)
    run_part(inputs, "init", tmp_path / "one", None)
    assert list_bytes(tmp_path / "new") == list_bytes(tmp_path / "one")
