"""What the ways to decompose sharded matrices cost, and which one is chosen.

The formulas count the products and the orthonormalisation of block Krylov, at rates
from data sheets. They rank the ways; they do not predict a time to better than a factor
of a few, because small products run below the peak rates.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from jlora import _checks
from jlora._numerics import compute_dtype
from jlora.factorization.passes import plan_iteration


class DeviceRates(NamedTuple):
    """The rates of one device, for estimates.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> rates = jlora.adaptation.DeviceRates("mine", 1e14, 6, 1e12, 1e11)
        >>> mesh = jax.sharding.AbstractMesh((8,), ("model",))
        >>> params, rule = {"w": jnp.ones((64, 48))}, jlora.Rule("w", 4)
        >>> plan = jlora.make_plan(params, rule, mesh=mesh, rates=rates)
        >>> plan.list_ways()[0].cost.parallel
        'layers'
    """

    name: str
    flops: float  # a second, of products in bfloat16
    float32_factor: float  # how many times longer a product in float32 takes
    memory: float  # bytes a second
    link: float  # bytes a second that it sends to other devices
    latency: float = 20e-6  # seconds of a collective, assumed
    capacity: float = 8e9  # bytes of memory


# Peak rates of the data sheets. "cpu" is measured on two cores.
RATES = {
    "h200": DeviceRates("h200", 989e12, 15, 4.8e12, 450e9, capacity=141e9),
    "h100": DeviceRates("h100", 989e12, 15, 3.35e12, 450e9, capacity=80e9),
    "v5p": DeviceRates("v5p", 459e12, 6, 2.77e12, 600e9, capacity=95e9),
    "v5e": DeviceRates("v5e", 197e12, 6, 0.82e12, 200e9, capacity=16e9),
    "cpu": DeviceRates("cpu", 0.1e12, 1, 20e9, 10e9),
}
_PARTS = 3  # a 16-bit matrix is multiplied by a float32 panel in three parts
_COLLECTIVES_PER_PASS = 3


class MatrixGroup(NamedTuple):
    """Matrices of one shape that are decomposed in the same way."""

    m: int
    n: int
    dtype: Any
    num_matrices: int
    rank: int
    decomposition: str  # of the initializer
    num_devices: int
    num_shards: int  # devices that one matrix is split over
    is_stack_sharded: bool  # whether a stack is sharded along its batch axes


class GroupCost(NamedTuple):
    """The cost of a group for the busiest device."""

    parallel: str
    flops: float
    num_bytes: float  # sent to other devices
    memory: float  # bytes beside the weights
    compute_seconds: float
    link_seconds: float

    @property
    def seconds(self) -> float:
        """Time without overlap of work and traffic."""
        return self.compute_seconds + self.link_seconds


def choose_parallel(group: MatrixGroup, rates: DeviceRates) -> str:
    """Return the way to decompose a group, see `placements.PARALLEL`."""
    if group.num_shards == 1:
        return "layers"
    if group.is_stack_sharded or group.decomposition == "full":
        return "exchange"
    if group.decomposition == "none":
        return "matrix"
    whole = estimate_cost(group, "exchange", rates)
    split = estimate_cost(group, "matrix", rates)
    fits = whole.memory <= rates.capacity / 4
    return "exchange" if fits and whole.seconds <= split.seconds else "matrix"


def estimate_cost(group: MatrixGroup, parallel: str, rates: DeviceRates) -> GroupCost:
    """Return the cost of a group decomposed in one of the ways."""
    m, n, itemsize = group.m, group.n, group.dtype.itemsize
    passes, block, width = plan_iteration((m, n), group.rank)
    if group.decomposition == "none":
        passes, block, width = 0, 0, group.rank
    is_short = itemsize < compute_dtype(group.dtype).itemsize
    factor = min(_PARTS, rates.float32_factor) if is_short else rates.float32_factor

    # One matrix on one device.
    products = 2.0 * m * n * block * passes
    flops = products + 6.0 * (m + n) * width**2
    work = factor * products + rates.float32_factor * (flops - products)
    seconds = max(work / rates.flops, m * n * itemsize * passes / rates.memory)
    if group.decomposition == "full":
        flops += 14.0 * m * n * min(m, n)
    memory = m * n * (itemsize + 4) + 12.0 * (m + n) * width

    if parallel == "matrix":
        shards, num = group.num_shards, group.num_matrices
        others = (shards - 1) / shards
        panel = 3.0 * block * min(m, n) + 2.0 * (block * width + 6 * block**2)
        sent = num * passes / 2 * others * 4 * panel
        waits = num * passes * _COLLECTIVES_PER_PASS * rates.latency * (shards > 1)
        return GroupCost(
            parallel,
            num * flops / shards,
            sent,
            memory / shards,
            num * seconds / shards,
            sent / rates.link + waits,
        )

    num_rounds = math.ceil(group.num_matrices / group.num_devices)
    sent = waits = 0.0
    if parallel == "exchange":
        others = (group.num_shards - 1) / group.num_shards
        sent = 2.0 * num_rounds * m * n * itemsize * others
        waits = 2 * num_rounds * rates.latency
    return GroupCost(
        parallel,
        num_rounds * flops,
        sent,
        memory,
        num_rounds * seconds,
        sent / rates.link + waits,
    )


def choose_rates(rates: DeviceRates | str | None, mesh: Any) -> DeviceRates:
    """Return the given rates, those of a name, or those of the devices of a mesh."""
    if isinstance(rates, DeviceRates):
        return rates
    if rates is None:
        return find_device_rates(mesh)
    return RATES[_checks.check_choice(rates, tuple(RATES), "rates")]


def find_device_rates(mesh: Any) -> DeviceRates:
    """Return the rates of the devices of a mesh, and of a CPU for an unknown kind."""
    if isinstance(mesh, jax.sharding.Mesh):
        kind = mesh.devices.flat[0].device_kind
    else:
        kind = getattr(mesh.abstract_device, "device_kind", None) or "cpu"
    kind = kind.lower().replace(" ", "")
    names = {"v5lite": "v5e", "v5e": "v5e", "v5": "v5p", "h200": "h200", "h100": "h100"}
    found = (name for part, name in names.items() if part in kind)
    return RATES[next(found, "cpu")]
