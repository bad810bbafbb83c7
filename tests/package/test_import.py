"""`import jlora` is cheap."""

import subprocess
import sys

import pytest


def test_import_loads_no_extra():
    extras = ("quax", "orbax", "matplotlib", "torch", "scipy.linalg")
    code = f"import sys, jlora; print([n for n in {extras!r} if n in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_import_adds_at_most_a_tenth(tmp_path, monkeypatch):
    # As installed: with byte code, even where none can be written beside the source.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))

    # A full garbage collection of all that JAX holds takes three times as long as our
    # whole import, and the versions of other packages decide in which of the two it
    # falls. The clock is read before Python tears everything down.
    plain, ours = (
        f"import gc, time; gc.disable(); import {names}; print(time.process_time())"
        for names in ("jax, optax", "jlora")
    )
    run_python(ours)  # writes the byte code

    # Processor time, which a busy machine hardly moves; the minimum, as noise only
    # adds.
    least = {plain: float("inf"), ours: float("inf")}
    for repetition in range(24):
        for code, seconds in least.items():
            least[code] = min(seconds, float(run_python(code)))
        if repetition >= 4 and least[ours] <= 1.1 * least[plain]:
            return
    pytest.fail(
        f"import jlora takes {least[ours]:.3f} s, jax and optax {least[plain]:.3f} s"
    )


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
