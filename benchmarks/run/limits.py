"""The rates that this device reaches at most, in large matrix products and a copy."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.run.cases import Case
from benchmarks.run.contenders import Contender, Group, Level
from benchmarks.run.harness import measure_group
from benchmarks.run.preparation import prepare_jax

SUITE = "limits"
_PRODUCTS = (("float32", "highest"), ("float32", "default"), ("bfloat16", "default"))


class Limits(NamedTuple):
    """The rates measured in this run; empty while they are being measured."""

    flops_per_s: dict  # (dtype, precision) → rate of a large product
    bytes_per_s: float = float("nan")  # read and written, of a large copy

    def describe(self, dtype: str, precision: str) -> dict:
        """Return the limits of a dtype: every dtype but float32 counts as bfloat16."""
        if not self.flops_per_s:
            return {}
        if dtype != "float32":
            dtype, precision = "bfloat16", "default"
        return {
            "flops_per_s": self.flops_per_s[dtype, precision],
            "bytes_per_s": self.bytes_per_s,
        }


class LimitCase(NamedTuple):
    """A square matrix of no model, with the interface of a `Case`."""

    size: int
    dtype: str

    @property
    def shape(self):
        return self.size, self.size

    @property
    def name(self):
        return f"{self.size}×{self.size}, {self.dtype}"

    def describe(self):
        """Return the fields of a record's case."""
        m, n = self.shape
        fields = Case("none", "square", 0, "normal", self.dtype)._asdict()
        return {**fields, "name": self.name, "m": m, "n": n}


def measure_limits(level: Level, emit: Callable[[list[dict]], None]) -> Limits:
    """Return the `Limits` of this device.

    Args:
        emit: Called with the record of each measurement, in a list.
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192

    rates = {}
    for dtype, precision in _PRODUCTS:
        group = _make_product(size, dtype, precision)
        (record,) = measure_group(group, level, Limits({}))
        emit([record])
        rates[dtype, precision] = record["flops"] / _find_least_seconds(record)

    (record,) = measure_group(_make_copy(2 * size), level, Limits({}))
    emit([record])
    return Limits(rates, record["bytes"] / _find_least_seconds(record))


def _find_least_seconds(record):
    return min(record["times_ms"]) / 1e3


def _make_product(size, dtype, precision):
    """Return the group of one square matrix product."""

    def prepare(a, b):
        return prepare_jax(lambda a, b: jnp.matmul(a, b, precision=precision), a, b)

    def measure_errors(inputs, result):
        # A few rows show the precision; all rows would take minutes in float64.
        a, b = (np.asarray(x, np.float64) for x in (inputs[0][:8], inputs[1]))
        return _measure_error(np.asarray(result[:8], np.float64), a @ b)

    contender = Contender(f"jnp.matmul, precision {precision}", prepare, role="limit")
    return Group(
        SUITE,
        f"matrix product {dtype} {precision}",
        LimitCase(size, dtype),
        lambda: _make_inputs(size, dtype),
        (contender,),
        measure_errors,
        flops=2.0 * size**3,
    )


def _make_copy(size):
    """Return the group that copies one square float32 matrix."""

    def prepare(a):
        # Donated, so that no fresh pages are touched and only the copy is timed. A
        # plain copy into its own memory would be no work, so 1 is added.
        return prepare_jax(lambda a: a + jnp.float32(1), a, donate=(0,))

    def measure_errors(inputs, result):
        expected = inputs[0][:8].astype(np.float64) + 1
        return _measure_error(np.asarray(result[:8], np.float64), expected)

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


def _make_inputs(size, dtype):
    rng = np.random.default_rng(0)
    return tuple(
        rng.standard_normal((size, size), np.float32).astype(jnp.dtype(dtype))
        for _ in range(2)
    )


def _measure_error(found, expected):
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    return {"relative error": error}
