"""Time the decompositions beside the full one: medians of interleaved runs, error beside them."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # why: see tests/conftest.py

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import jlora

_SIZE, _RANK, _REPETITIONS = 512, 16, 5


def main():
    """Print one line for each method: its median time and its error over the best possible."""
    a = _make_spiked_matrix(_SIZE)
    key = jax.random.key(1)
    methods = {
        "jnp.linalg.svd": jax.jit(lambda a: jnp.linalg.svd(a, full_matrices=False)),
        "truncated_svd": lambda a: jlora.truncated_svd(a, _RANK),
        "randomized_svd krylov": lambda a: jlora.randomized_svd(a, _RANK, key=key),
        "randomized_svd subspace": lambda a: jlora.randomized_svd(
            a, _RANK, key=key, method="subspace"
        ),
    }
    results = {name: jax.block_until_ready(method(a)) for name, method in methods.items()}
    times = {name: [] for name in methods}
    for _ in range(_REPETITIONS):
        for name, method in methods.items():
            start = time.perf_counter()
            jax.block_until_ready(method(a))
            times[name].append(1e3 * (time.perf_counter() - start))
    print(f"{_SIZE}x{_SIZE}, rank {_RANK}, bulk plus spikes, {jax.devices()[0].device_kind}")
    for name, (u, s, vt) in results.items():
        excess = _measure_excess(a, u[:, :_RANK], s[:_RANK], vt[:_RANK])
        spread = f"{min(times[name]):.1f}..{max(times[name]):.1f}"
        median = statistics.median(times[name])
        print(f"{name:25} {median:8.1f} ms ({spread})  excess error {excess:.1e}")


def _make_spiked_matrix(size):
    rng = np.random.default_rng(0)
    bulk = rng.standard_normal((size, size)) / size**0.5
    u, v = (np.linalg.qr(rng.standard_normal((size, 12)))[0] for _ in range(2))
    return jnp.asarray(bulk + (u * np.geomspace(8, 2.3, 12)) @ v.T, jnp.float32)


def _measure_excess(a, u, s, vt):
    a, u, s, vt = (np.asarray(part, np.float64) for part in (a, u, s, vt))
    tail = np.linalg.svd(a, compute_uv=False)[_RANK:]
    return np.linalg.norm(a - (u * s) @ vt) / np.linalg.norm(tail) - 1


if __name__ == "__main__":
    main()
