"""What this device can do at most: a large matrix product per dtype and precision, a large copy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.run.cases import Case
from benchmarks.run.harness import Contender, Group, measure_group
from benchmarks.run.preparation import prepare_jax

SUITE = "limits"
_PRODUCTS = (("float32", "highest"), ("float32", "default"), ("bfloat16", "default"))


class Limits(NamedTuple):
    """Measured rates of this run; empty while they are being measured."""

    flops_per_s: dict  # (dtype, precision) → rate of a large product
    bytes_per_s: float = float("nan")  # read and written, of a large copy

    def describe(self, dtype, precision):
        """Return the limits that count for a dtype: the nearest product that was measured."""
        if not self.flops_per_s:
            return {}
        if dtype != "float32":
            dtype, precision = "bfloat16", "default"
        return {
            "flops_per_s": self.flops_per_s[dtype, precision],
            "bytes_per_s": self.bytes_per_s,
        }


def measure_limits(level, emit):
    """Return the `Limits` of this device, and give their records to `emit`."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    rates = {}
    for dtype, precision in _PRODUCTS:
        (record,) = measure_group(
            _make_product(size, dtype, precision), level, Limits({})
        )
        emit([record])
        rates[dtype, precision] = record["flops"] / _fastest_seconds(record)
    (record,) = measure_group(_make_copy(2 * size), level, Limits({}))
    emit([record])
    return Limits(rates, record["bytes"] / _fastest_seconds(record))


def _fastest_seconds(record):
    return min(record["times_ms"]) / 1e3


def _make_product(size, dtype, precision):
    def prepare(a, b):
        return prepare_jax(lambda a, b: jnp.matmul(a, b, precision=precision), a, b)

    def measure_errors(inputs, result):
        # A few rows tell the precision: all of them would take float64 minutes.
        a, b = (np.asarray(x, np.float64) for x in (inputs[0][:8], inputs[1]))
        return _relative(np.asarray(result[:8], np.float64), a @ b)

    case = LimitCase(size, dtype)
    contender = Contender(f"jnp.matmul, precision {precision}", prepare, role="limit")
    return Group(
        SUITE,
        f"matrix product {dtype} {precision}",
        case,
        lambda: _make_inputs(size, dtype),
        (contender,),
        measure_errors,
        flops=2.0 * size**3,
    )


def _make_copy(size):
    def prepare(a):
        # Added to and donated, so that no fresh pages are touched: the copy alone is timed.
        return prepare_jax(lambda a: a + jnp.float32(1), a, donate=(0,))

    def measure_errors(inputs, result):
        return _relative(
            np.asarray(result[:8], np.float64), inputs[0][:8].astype(np.float64) + 1
        )

    contender = Contender("x + 1 in place", prepare, role="limit")
    return Group(
        SUITE,
        "copy",
        LimitCase(size, "float32"),
        lambda: _make_inputs(size, "float32")[:1],
        (contender,),
        measure_errors,
        bytes=8.0 * size**2,
    )


class LimitCase(NamedTuple):
    """A square problem of no model, with the interface of a Case."""

    size: int
    dtype: str

    @property
    def shape(self):
        return self.size, self.size

    @property
    def name(self):
        return f"{self.size}×{self.size}, {self.dtype}"

    def describe(self):
        m, n = self.shape
        fields = Case("none", "square", 0, "normal", self.dtype)._asdict()
        return {**fields, "name": self.name, "m": m, "n": n}


def _make_inputs(size, dtype):
    rng = np.random.default_rng(0)
    return tuple(
        rng.standard_normal((size, size), np.float32).astype(jnp.dtype(dtype))
        for _ in range(2)
    )


def _relative(found, expected):
    return {
        "relative error": np.linalg.norm(found - expected) / np.linalg.norm(expected)
    }
