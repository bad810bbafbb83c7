"""`make_plan`: which weights are adapted, and how, as a static, hashable value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jlora import _checks
from jlora._types import PRNGKey, Tree
from jlora.adaptation.adapted_weight import is_adapted
from jlora.adaptation.costs import DeviceRates, choose_rates
from jlora.adaptation.data import find_data, list_data
from jlora.adaptation.lazy_arrays import open_tree
from jlora.adaptation.mesh_plans import (
    ChosenWay,
    WeightOnMesh,
    check_mesh,
    choose_ways,
)
from jlora.adaptation.paths import fold_path, list_leaves
from jlora.adaptation.placements import Entries, find_sharding, list_entries
from jlora.adaptation.plan_tables import format_plan
from jlora.adaptation.rank_choice import RankRequest, choose_ranks
from jlora.adaptation.rule import Rule
from jlora.adaptation.rule_matches import (
    Match,
    check_every_rule_used,
    check_rules,
    match_leaves,
)
from jlora.adaptation.tree_checks import check_layout_given, check_paths, find_tied
from jlora.layouts import matrix_shape
from jlora.quantization.quantized_array import QuantizedArray, count_bytes


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """One weight of a plan: path, shape, and its rule with rank and scale as numbers.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> plan = jlora.make_plan({"w": jnp.ones((4, 3))}, [jlora.Rule("w", 2)])
        >>> plan.entries[0].path, plan.entries[0].shape, plan.entries[0].rule.rank
        ('w', (4, 3), 2)
    """

    path: str
    shape: tuple[int, ...]
    rule: Rule
    num_bytes: int = 0  # of the stored weight
    dtype: str = "float32"  # of the stored weight
    # The entries of its PartitionSpec, one for each axis; None: it is on no mesh.
    sharding: Entries | None = None

    @property
    def num_base_bytes(self) -> int:
        """Bytes of the base after adapting."""
        if not self.rule.initializer.keeps_residual:
            return 0
        if self.rule.format is None:
            return self.num_bytes
        return count_bytes(self.rule.format, self.matrix_shape)

    @property
    def rank(self) -> int:
        """The rank, which is a number in a plan."""
        assert isinstance(self.rule.rank, int)
        return self.rule.rank

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """[..., m, n], the shape of the weight as a matrix."""
        return matrix_shape(self.shape, self.rule.layout)

    @property
    def num_parameters(self) -> int:
        """Elements of the factors and of the core, batch axes included."""
        *batch, m, n = self.matrix_shape
        core = {"core": self.rank**2, "s": self.rank}.get(self.rule.trainable or "", 0)
        return math.prod(batch) * (self.rank * (m + n) + core)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The weights that `adapt` changes: static, hashable, printable. See `make_plan`.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> print(jlora.make_plan({"w": jnp.ones((4, 3))}, [jlora.Rule("w", 2)]))
        path  shape  rank  parameters  init   trainable
        w     4×3    2     14          pissa  v
    """

    entries: tuple[PlanEntry, ...]  # in the order of the tree's leaves
    skipped: tuple[tuple[str, str], ...] = ()  # (path, reason) of matches not adapted
    tied: tuple[tuple[str, ...], ...] = ()  # paths of one array, at least one adapted
    mesh: Any = None  # the mesh that it was made for
    rates: DeviceRates | None = None  # of the devices of the mesh

    def list_ways(self) -> list[ChosenWay]:
        """Return how the groups of weights are decomposed on the plan's mesh."""
        if self.mesh is None or self.rates is None:
            return []
        weights = [
            WeightOnMesh(e.path, e.shape, jnp.dtype(e.dtype), e.rule, e.sharding)
            for e in self.entries
        ]
        return choose_ways(weights, self.mesh, self.rates)

    def __str__(self) -> str:
        return "\n".join(format_plan(self))


def make_plan(
    params: Tree,
    rules: Rule | Sequence[Rule],
    *,
    data: Tree | None = None,
    key: PRNGKey | None = None,
    mesh: Any = None,
    rates: DeviceRates | str | None = None,
) -> Plan:
    """Return the plan of the first matching rule for each weight of a tree.

    Leaves that match but are no matrix (biases, counters) are not adapted; they are
    named in `Plan.skipped`, as are weights whose chosen rank is zero. A leaf whose name
    ends in "bias" or "scale" is taken for stacked vectors, unless the pattern contains
    that word. Weights that are
    tied, one array under several paths, are named in `Plan.tied`: adapting unties them.
    To keep them tied, give `adapt` a tree with one of the paths, from which the model
    reads the weight for both.

    Args:
        params: pytree of arrays: nested dicts, the state of a flax.nnx module (its
            paths end in "/value"), an Equinox module, a dict of names in a checkpoint,
            an open checkpoint (`jlora.checkpoints.open_checkpoint`).
            With ranks given as numbers, jax.ShapeDtypeStruct will do.
        rules: one `Rule` or a sequence; on each path the first match wins.
        data: as in `adapt`; needed here for ranks chosen by it. None: none.
        key: one typed PRNG key, consumed: a rank with a `maximum` is then chosen from
            as many leading singular values by `randomized_svd`. None: from all of them,
            by a full decomposition.
        mesh: static. The printed plan then says for each group of weights in which way
            `adapt` decomposes them there, and for each device the flops, the bytes that
            it sends, the memory of its work and the time at the peak rates, which is
            for comparing the ways only. The weights may be `jax.ShapeDtypeStruct`s with
            a sharding, and the mesh a `jax.sharding.AbstractMesh`, to plan for devices
            that are not there. None: not said.
        rates: static, of the devices of the mesh: "h200", "h100", "v5p", "v5e" or
            "cpu", from data sheets, or your own `jlora.adaptation.DeviceRates`. None:
            of their kind, and of a CPU for an unknown kind.

    Returns:
        `Plan`.

    Raises:
        TypeError: an entry of `rules` that is not a Rule; traced or abstract weights
            where a rank is to be chosen by their values.
        ValueError: two leaves with one path, a rule that matches no matrix (with the
            nearest paths), an array of more than two axes whose layout has to be given
            (with the layouts that fit), a rank above
            the initializer's largest or num_columns above n (with the path), a budget
            that does not cover the minimum ranks, no `data` for a rank chosen by it.

    Cost: none for ranks given as numbers; else a decomposition of each weight
        concerned.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> params = {"q": jnp.ones((4, 3)), "bias": jnp.ones(3)}
        >>> [e.path for e in jlora.make_plan(params, jlora.Rule(".*", 2)).entries]
        ['q']
    """
    checked = check_rules(rules)
    if mesh is not None:
        check_mesh(mesh)
    chosen = None if mesh is None else choose_rates(rates, mesh)
    if key is not None:
        _checks.check_key(key)

    leaves = list_leaves(open_tree(params), is_leaf=is_adapted)
    check_paths(leaves)
    matches = match_leaves(leaves, checked)
    check_every_rule_used(checked, matches, leaves)

    usable = [match for match in matches if match.reason is None]
    ranks = _choose_open_ranks(usable, data, key)
    entries = [
        _make_entry(match, ranks) for match in usable if ranks.get(match.path) != 0
    ]
    if not entries and leaves:
        raise ValueError(
            "`rules` must leave a weight with a rank above 0, got rank 0 for all. "
            "Set `minimum` to 1 or change the rule of the rank."
        )

    skipped = [(m.path, m.reason) for m in matches if m.reason is not None]
    skipped += [(path, "gets rank 0") for path, rank in ranks.items() if rank == 0]
    planned = {entry.path for entry in entries}
    plan = Plan(
        tuple(entries), tuple(skipped), find_tied(leaves, planned), mesh, chosen
    )
    plan.list_ways()  # refuses a way that a sharding does not allow
    return plan


def _choose_open_ranks(
    matches: list[Match], data: Tree | None, key: PRNGKey | None
) -> dict[str, int]:
    by_path = list_data(data)
    requests = []
    for path, leaf, _, rule, _ in matches:
        if not rule.has_rank:
            found = find_data(path, rule, by_path, leaf.shape)
            own_key = None if key is None else fold_path(key, path)
            requests.append(RankRequest(path, leaf, rule, found, own_key))
    return choose_ranks(requests)


def _make_entry(match: Match, ranks: dict[str, int]) -> PlanEntry:
    path, shape, rule = match.path, tuple(match.leaf.shape), match.rule
    as_matrix = matrix_shape(shape, rule.layout)
    m, n = as_matrix[-2:]
    try:
        rule = rule.with_rank(ranks[path]) if path in ranks else rule
        assert isinstance(rule.rank, int)
        _checks.check_rank(rule.rank, as_matrix)
        if rule.num_columns is not None:
            _checks.check_integer(rule.num_columns, "num_columns", maximum=n)
    except ValueError as error:
        raise ValueError(
            f"{path}: {error} Give it a rule of its own, before the others, or "
            "exclude it."
        ) from None

    entry = PlanEntry(
        path,
        shape,
        rule,
        _count_bytes(match.leaf),
        jnp.dtype(match.leaf.dtype).name,
        _list_entries(match.leaf),
    )
    check_layout_given(entry.path, shape, rule.layout, entry.num_parameters)
    limit = rule.initializer.max_rank(m, n)
    if entry.rank > limit:
        raise ValueError(
            f"{path}: `rank` must be at most {limit} for "
            f"init={rule.initializer.label!r} and a matrix of shape ({m}, {n}), got "
            f"{entry.rank}. Choose a smaller rank in a rule of its own, or exclude it."
        )
    return entry


def _list_entries(leaf: Any) -> Entries | None:
    sharding = find_sharding(leaf)
    return None if sharding is None else list_entries(sharding, len(leaf.shape))


def _count_bytes(leaf: Any) -> int:
    """Return the bytes of a stored weight."""
    if isinstance(leaf, QuantizedArray):
        return leaf.nbytes
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
