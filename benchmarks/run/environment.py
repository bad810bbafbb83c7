"""The machine, the versions and the state of the working tree, as records hold them."""

import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterable

import jax

ROOT = pathlib.Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = (
    "jlora",
    "jax",
    "jaxlib",
    "numpy",
    "scipy",
    "optax",
    "torch",
    "scikit-learn",
    "fbpca",
    "matfree",
    "peft",
    "transformers",
    "qwix",
    "flax",
    "threadpoolctl",
    "cupy-cuda13x",
    "cupy-cuda12x",
)


@functools.cache
def describe_environment() -> dict:
    """Return the fields that all records of a run share."""
    device = jax.devices()[0]
    changes = _run_git("status", "--porcelain", "--", "jlora", "benchmarks/**.py")

    return {
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "host": {
            "processor": _read_processor(),
            "threads": count_threads(),
            "openblas_num_threads": os.environ.get("OPENBLAS_NUM_THREADS", ""),
        },
        "versions": {"python": platform.python_version(), **_read_versions()},
        "commit": _run_git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(changes),
    }


def name_device_folder(kind: str | None = None) -> str:
    """Return the name of the results folder of a kind of device; None: of this one."""
    kind = jax.devices()[0].device_kind if kind is None else kind
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def count_threads() -> int:
    """Return the number of cores of this process: the threads of every contender."""
    return len(os.sched_getaffinity(0))


def measure_load() -> float:
    """Return the one-minute load average."""
    return round(os.getloadavg()[0], 2)


def read_processor_seconds() -> tuple[float, float] | None:
    """Return the processor time of (all processes, this process) in seconds.

    The first counts from boot, the second from the start of the process. The load
    average includes this process; the difference of these two does not. None if the
    system does not tell.
    """
    try:
        fields = pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    except OSError:
        return None

    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def count_others_cores(
    before: tuple[float, float] | None,
    after: tuple[float, float] | None,
    seconds: float,
) -> float | None:
    """Return the mean number of cores that other processes kept busy, or None.

    Args:
        before: Result of `read_processor_seconds` at the start.
        after: Result of `read_processor_seconds` at the end.
        seconds: Time between the two.
    """
    if before is None or after is None:
        return None
    all_seconds, own_seconds = after[0] - before[0], after[1] - before[1]
    return round(max(all_seconds - own_seconds, 0.0) / max(seconds, 1e-9), 2)


def why_missing(modules: Iterable[str]) -> str | None:
    """Return a sentence about the first module that is not installed, or None."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return None


def _read_versions():
    """Return {package: version} of the installed packages that matter here."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _read_processor():
    """Return the name of the processor."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*:\s*(.*)", text)
    return found[1].strip() if found else platform.machine()


def _run_git(*arguments):
    """Return the output of a git command in this repository, "" if there is no git."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
