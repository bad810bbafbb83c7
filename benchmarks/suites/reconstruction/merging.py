"""Groups of the reconstruction suite: many adapters at once, roundings, compiled programs."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from benchmarks.run.ahead_of_time import TARGETS
from benchmarks.run.cases import Case, NamedCase, WholeCase
from benchmarks.run.compiled import make_compile_group
from benchmarks.run.harness import Contender, Group
from benchmarks.run.preparation import prepare_jax, prepare_torch

_NUM_ADAPTERS = 16
_NUM_KEYS = 64


def make_many_group(suite, case):
    """Return the group of one batch whose rows use sixteen adapters, beside the base alone."""
    m, n = case.shape

    def make_inputs():
        rng = np.random.default_rng(zlib.crc32(case.name.encode()))

        def draw(*shape, scale):
            values = rng.standard_normal(shape, np.float32) * np.float32(scale)
            return values.astype(jnp.dtype(case.dtype))

        index = rng.integers(0, _NUM_ADAPTERS, case.tokens).astype(np.int32)
        return (
            draw(case.tokens, m, scale=1),
            draw(m, n, scale=m**-0.5),
            draw(_NUM_ADAPTERS, m, case.rank, scale=m**-0.5),
            draw(_NUM_ADAPTERS, case.rank, n, scale=0.1 * case.rank**-0.5),
            index,
        )

    def run_ours(x, w, u, v, index):
        return jlora.apply_many(x, jlora.Factors(u, v), index, w)

    def run_loop(x, w, u, v, index):
        y = x @ w
        for adapter in range(_NUM_ADAPTERS):
            rows = index == adapter
            y[rows] += (x[rows] @ u[adapter]) @ v[adapter]
        return y

    def measure_errors(inputs, y):
        x, w, u, v, index = (np.asarray(part, np.float64) for part in inputs)
        rows = np.unique(np.linspace(0, len(x) - 1, 32).astype(int))
        expected = np.stack(
            [x[i] @ w + (x[i] @ u[int(index[i])]) @ v[int(index[i])] for i in rows]
        )
        return {
            "relative error": np.linalg.norm(np.asarray(y, np.float64)[rows] - expected)
            / np.linalg.norm(expected)
        }

    contenders = (
        Contender(
            "jlora apply_many",
            functools.partial(prepare_jax, run_ours),
            "jlora",
            f"{_NUM_ADAPTERS} adapters, the form chosen by default",
        ),
        Contender(
            "jax base alone",
            functools.partial(prepare_jax, lambda x, w, *_: x @ w),
            setting="x @ w without adapters, its error that of leaving them out",
        ),
        Contender(
            "torch loop over adapters",
            functools.partial(prepare_torch, run_loop),
            setting="x @ w, then the rows of each adapter picked out and added",
            requires=("torch",),
        ),
    )
    itemsize = jnp.dtype(case.dtype).itemsize
    sizes = case.tokens * (m + n) + m * n + _NUM_ADAPTERS * case.rank * (m + n)
    return Group(
        suite,
        "apply many",
        case,
        make_inputs,
        contenders,
        measure_errors,
        precision="default",
        flops=2.0 * case.tokens * (m * n + case.rank * (m + n)),
        bytes=float(itemsize * sizes),
    )


def make_rounding_group(suite, size=1024, rank=16):
    """Return the group of what each rounding leaves of a small update to a bfloat16 weight."""

    def make_inputs():
        rng = np.random.default_rng(0)
        w = (0.02 * rng.standard_normal((size, size))).astype(jnp.bfloat16)
        u = rng.standard_normal((size, rank), np.float32)
        return (
            w,
            u,
            (1e-4 / rank**0.5 * rng.standard_normal((rank, size))).astype(np.float32),
        )

    def run(rounding, w, u, v, key=None):
        return jlora.reconstruct(jlora.Factors(u, v), w, rounding=rounding, key=key)

    def prepare_stochastic(w, u, v):
        """One run is one merge; the result judged is that of many keys."""
        merge = functools.partial(run, "stochastic")
        one = prepare_jax(functools.partial(merge, key=jax.random.key(0)), w, u, v)
        merge = jax.jit(functools.partial(merge, w, u, v))

        def fetch(result):
            keys = jax.random.split(jax.random.key(1), _NUM_KEYS)
            return np.stack([np.asarray(merge(key=key), np.float32) for key in keys])

        return one._replace(fetch=fetch)

    def measure_errors(inputs, found):
        w, u, v = (np.asarray(part, np.float64) for part in inputs)
        delta = u @ v
        found = np.asarray(found, np.float64)
        if found.ndim == 3 and len(found) == 2:  # a high and a low part
            found = found.sum(axis=0)
        errors = found - w - delta
        size = np.linalg.norm(delta)
        if errors.ndim == 2:
            return {"error of the delta": np.linalg.norm(errors) / size}
        bias = abs(errors.mean()) / (errors.std() / np.sqrt(errors.size))
        each = np.linalg.norm(errors[0]) / size
        return {
            "error of the delta": each,
            "bias in standard errors": bias,
            "error of the mean": np.linalg.norm(errors.mean(axis=0)) / size,
        }

    contenders = (
        Contender(
            "nearest",
            functools.partial(prepare_jax, functools.partial(run, "nearest")),
            "jlora",
            "one rounding of the float32 sum",
        ),
        Contender(
            "stochastic", prepare_stochastic, "jlora", f"judged over {_NUM_KEYS} keys"
        ),
        Contender(
            "compensated",
            functools.partial(prepare_jax, functools.partial(run, "compensated")),
            "jlora",
            "judged by high + low",
        ),
    )
    fields = Case("none", "none", rank, "factors", "bfloat16")
    case = NamedCase(
        "bfloat16 base of rms 0.02, delta of rms 1e-4", (size, size), fields
    )
    return Group(
        suite,
        "rounding",
        case,
        make_inputs,
        contenders,
        measure_errors,
        flops=2.0 * size * size * rank,
        bytes=4.0 * size * size,
    )


def list_compile_groups(suite):
    """Return the groups that compile a donated merge for accelerators that need not be here."""
    return [
        make_compile_group(
            suite,
            WholeCase(target),
            target,
            "reconstruct bfloat16, rank 16",
            "jlora reconstruct",
            "4096×4096 bfloat16, rank 16, donated",
            ("temporary_bytes", "alias_bytes", "num_kernels", "compile_ms"),
        )
        for target in TARGETS
    ]
