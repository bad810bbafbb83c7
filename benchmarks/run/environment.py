"""What a record says about the machine, the versions and the state of the tree."""

import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import subprocess

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
def describe_environment():
    """Return the fields that all records of a run share."""
    device = jax.devices()[0]
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
        "dirty": bool(
            _run_git("status", "--porcelain", "--", "jlora", "benchmarks/**.py")
        ),
    }


def name_device_folder(kind=None):
    """Return the results folder's name of a kind of device; None: of this one."""
    kind = jax.devices()[0].device_kind if kind is None else kind
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def count_threads():
    """Return the cores this process may use: the thread count of every contender."""
    return len(os.sched_getaffinity(0))


def measure_load():
    """Return the one-minute load average."""
    return round(os.getloadavg()[0], 2)


def read_processor_seconds():
    """Return (seconds that all processes kept the cores busy, seconds of this one) since boot.

    The load average counts this process too; the difference of these two does not.
    """
    try:
        fields = pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy, sum(os.times()[:4])


def count_others_cores(before, after, seconds):
    """Return how many cores others kept busy on average between two readings, or None."""
    if before is None or after is None:
        return None
    others = (after[0] - before[0]) - (after[1] - before[1])
    return round(max(others, 0.0) / max(seconds, 1e-9), 2)


def why_missing(modules):
    """Return the first of some modules that is not installed, as a sentence, or None."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return None


def _read_versions():
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _read_processor():
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*:\s*(.*)", text)
    return found[1].strip() if found else platform.machine()


def _run_git(*arguments):
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
