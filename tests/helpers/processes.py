"""Programs that run in several processes of `jax.distributed` on this machine."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import NamedTuple

_ROOT = pathlib.Path(__file__).parent.parent.parent

# A process that fails ends at once. The others wait for each other at the end, because
# the end of the first process ends all of them.
_START = """
import faulthandler, json, os, sys, traceback
faulthandler.dump_traceback_later({limit})  # where a process that hangs stands
import jax

index, count, port = (int(text) for text in sys.argv[1:4])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.distributed.initialize(
    f"127.0.0.1:{{port}}", count, index, initialization_timeout=60,
    heartbeat_timeout_seconds=10,
)
import numpy as np
import jlora
from jlora import _processes

results = {{}}
try:
    exec(compile(sys.stdin.read(), "<program>", "exec"))
except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
print("RESULT", json.dumps(results))
sys.stdout.flush()
_processes.wait_for_all("end")
os._exit(0)
"""


class Ended(NamedTuple):
    """One process after its end."""

    # 0: the program ran to its end; negative: a signal ended it; None: it ran too long
    code: int | None
    results: dict  # `results` of the program; empty if it failed
    stderr: str


def run_processes(program, count, *, num_devices=2, timeout=120, arguments=()):
    """Run a program text in several processes and return `Ended` for each.

    The program finds `jax`, `np`, `jlora`, `index`, `count` and `sys.argv[4:]`, and
    puts values of JSON into the dict `results`. Every process is killed after
    `timeout` seconds.
    """
    running = start_processes(program, count, num_devices, timeout, arguments)
    limit = time.monotonic() + timeout
    ended = []
    try:
        for process in running:
            ended.append(_wait(process, limit))
    finally:
        for process in running:
            process.kill()
            process.wait()
    return ended


def run_well(program, count, **options):
    """Return the results of the processes, none of which may fail."""
    ended = run_processes(program, count, **options)
    for each in ended:
        assert each.code == 0, "\n".join(f"{e.code}: {e.stderr}" for e in ended)
    return [each.results for each in ended]


def start_processes(program, count, num_devices=2, timeout=120, arguments=()):
    """Start the processes and return them; the caller has to end them."""
    port = find_free_port()
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={num_devices}",
        "PYTHONPATH": str(_ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    start = _START.format(limit=0.9 * timeout)
    running = []
    for index in range(count):
        numbers = [str(number) for number in (index, count, port)]
        process = subprocess.Popen(
            [sys.executable, "-c", start, *numbers, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        process.stdin.write(program)
        process.stdin.close()
        process.stdin = None
        running.append(process)
    return running


def find_free_port():
    """Return a port that no program listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait(process, limit):
    try:
        seconds = max(limit - time.monotonic(), 0.1)
        stdout, stderr = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        code = None
    lines = [line for line in stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return Ended(code, {}, stderr)
    return Ended(0, json.loads(lines[-1].removeprefix("RESULT ")), stderr)
