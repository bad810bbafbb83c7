"""Jobs that are killed at random moments, again and again, until they are whole."""

import os
import pathlib
import subprocess
import sys

# A process forks one child for each run, before JAX starts any thread: that saves the
# import, and so the kills fall into the work itself.
_LOOP = """
import os, pathlib, random, signal, sys, time
{setup}

def run(output):
    {job}

output, spare = (pathlib.Path(path) for path in sys.argv[1:3])
rng = random.Random(0)

def start(path):
    child = os.fork()
    if child:
        return child
    run(path)
    os._exit(0)

before = time.perf_counter()
assert os.waitpid(start(spare), 0)[1] == 0
duration = time.perf_counter() - before
num_killed = num_whole = 0
while num_killed < int(sys.argv[3]):
    child = start(output)
    time.sleep(rng.uniform(0.1, 0.9) * duration)
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == signal.SIGKILL:
        num_killed += 1
        print("killed", flush=True)
    if output.exists():
        num_whole += 1
        output.rename(spare.with_name(f"whole-{{num_whole}}"))
assert os.waitpid(start(output), 0)[1] == 0
"""


# Each round starts a child for each part and kills one of them; then only that part is
# run again.
_SHARED_LOOP = """
import os, pathlib, random, signal, sys, time
{setup}

def run(output, process):
    {job}

folder, count, rounds = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(0)

def start(output, process):
    child = os.fork()
    if child:
        return child
    try:
        run(output, process)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def run_parts(output, parts):
    return [start(output, (index, count)) for index in parts]

assert os.waitpid(start(folder / "undisturbed", None), 0)[1] == 0
before = time.perf_counter()
for child in run_parts(folder / "together", range(count)):
    assert os.waitpid(child, 0)[1] == 0
duration = time.perf_counter() - before
assert (folder / "together").is_dir()
num_killed = 0
while num_killed < rounds:
    output, dead = folder / f"whole-{{num_killed}}", rng.randrange(count)
    children = run_parts(output, range(count))
    time.sleep(rng.uniform(0.2, 0.9) * duration)
    os.kill(children[dead], signal.SIGKILL)
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert codes[:dead] + codes[dead + 1 :] == [0] * (count - 1), codes
    if codes[dead] != signal.SIGKILL or output.exists():
        # It had written everything, and another one completed the folder.
        output.rename(folder / f"early-{{time.monotonic_ns()}}")
        continue
    num_killed += 1
    print("killed", flush=True)
    assert os.waitpid(run_parts(output, [dead])[0], 0)[1] == 0
    assert output.is_dir()
"""


def kill_parts(
    job: str, folder: pathlib.Path, count: int, num_rounds: int, setup: str
) -> list[pathlib.Path]:
    """Return the results of a job in parts, of which one died and was run again.

    Args:
        job: code that writes `output` as the part `process` of the job.
        folder: for the results; the first one is of a single process.
        count: of the parts.
        num_rounds: how many times one of them is killed.
        setup: code that runs once, before all jobs; it must not start a device.
    """
    code = _SHARED_LOOP.format(job=job.replace("\n", "\n    "), setup=setup)
    command = [sys.executable, "-c", code, str(folder), str(count), str(num_rounds)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["killed"] * num_rounds
    assert not list(folder.glob(".*.partial"))
    return [folder / "undisturbed", *(p for p in folder.iterdir())]


def kill_runs(
    job: str, folder: pathlib.Path, num_kills: int, setup: str = "import jlora"
) -> list[pathlib.Path]:
    """Return the results of a job that was killed many times, the last one completed.

    Args:
        job: code that writes `output` with `jlora`.
        folder: for the results.
        num_kills: how many runs are killed.
        setup: code that runs once, before all jobs; it must not start a device.
    """
    code = _LOOP.format(job=job.replace("\n", "\n    "), setup=setup)
    command = [sys.executable, "-c", code]
    command += [str(folder / name) for name in ("out", "undisturbed")]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, str(num_kills)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["killed"] * num_kills
    assert not list(folder.glob(".out.partial"))
    return [folder / "undisturbed", folder / "out", *folder.glob("whole-*")]


def list_bytes(folder: pathlib.Path) -> dict[str, bytes]:
    """Return {relative path: content} of all files of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
