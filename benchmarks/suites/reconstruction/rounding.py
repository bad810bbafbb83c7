"""A small update to a bfloat16 weight, at each rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from benchmarks.run.cases import Case, NamedCase
from benchmarks.run.contenders import Contender, Group
from benchmarks.run.preparation import prepare_jax
from benchmarks.suites.reconstruction.layers import SUITE

_NUM_KEYS = 64


def make_rounding_group(size=1024, rank=16):
    """Return the group that shows how much of the update each rounding keeps."""
    contenders = (
        Contender(
            "nearest",
            functools.partial(prepare_jax, functools.partial(_merge, "nearest")),
            "jlora",
            "one rounding of the float32 sum",
        ),
        Contender(
            "stochastic", _prepare_stochastic, "jlora", f"judged over {_NUM_KEYS} keys"
        ),
        Contender(
            "compensated",
            functools.partial(prepare_jax, functools.partial(_merge, "compensated")),
            "jlora",
            "judged by high + low",
        ),
    )

    name = "bfloat16 base of rms 0.02, delta of rms 1e-4"
    fields = Case("none", "none", rank, "factors", "bfloat16")
    return Group(
        SUITE,
        "rounding",
        NamedCase(name, (size, size), fields),
        lambda: _make_inputs(size, rank),
        contenders,
        _measure_errors,
        flops=2.0 * size * size * rank,
        bytes=4.0 * size * size,
    )


def _make_inputs(size, rank):
    rng = np.random.default_rng(0)
    w = 0.02 * rng.standard_normal((size, size))
    u = rng.standard_normal((size, rank), np.float32)
    v = 1e-4 / rank**0.5 * rng.standard_normal((rank, size))
    return w.astype(jnp.bfloat16), u, v.astype(np.float32)


def _merge(rounding, w, u, v, key=None):
    return jlora.reconstruct(jlora.Factors(u, v), w, rounding=rounding, key=key)


def _prepare_stochastic(w, u, v):
    """Prepare one merge as the timed run; the errors are taken over many keys."""
    merge = functools.partial(_merge, "stochastic")
    prepared = prepare_jax(functools.partial(merge, key=jax.random.key(0)), w, u, v)
    merge = jax.jit(functools.partial(merge, w, u, v))

    def fetch(result):
        keys = jax.random.split(jax.random.key(1), _NUM_KEYS)
        return np.stack([np.asarray(merge(key=key), np.float32) for key in keys])

    return prepared._replace(fetch=fetch)


def _measure_errors(inputs, found):
    w, u, v = (np.asarray(each, np.float64) for each in inputs)
    delta = u @ v
    norm = np.linalg.norm(delta)

    found = np.asarray(found, np.float64)
    if found.ndim == 3 and len(found) == 2:  # compensated: a high and a low part
        found = found.sum(axis=0)
    errors = found - w - delta
    if errors.ndim == 2:
        return {"error of the delta": np.linalg.norm(errors) / norm}

    # Stochastic: one result for each key.
    bias = abs(errors.mean()) / (errors.std() / np.sqrt(errors.size))
    return {
        "error of the delta": np.linalg.norm(errors[0]) / norm,
        "bias in standard errors": bias,
        "error of the mean": np.linalg.norm(errors.mean(axis=0)) / norm,
    }
