"""Which weights are adapted, and how: a static, hashable plan."""

import dataclasses
import difflib
import math

from jlora import _checks
from jlora.adaptation.paths import fold_path, list_leaves, why_not_a_matrix
from jlora.adaptation.rank_choice import RankRequest, choose_ranks
from jlora.adaptation.rule import Rule
from jlora.initializers.from_weight import INITIALIZATIONS
from jlora.layouts import complete_layout, matrix_shape


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """One weight of a plan: its path and shape, and the rule that it follows, rank and scale set.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> plan = jlora.make_plan({"w": jnp.ones((4, 3))}, [jlora.Rule("w", 2)])
        >>> plan.entries[0].path, plan.entries[0].shape, plan.entries[0].rule.rank
        ('w', (4, 3), 2)
    """

    path: str
    shape: tuple[int, ...]
    rule: Rule

    @property
    def matrix_shape(self):
        """[..., m, n], the shape of the weight as a matrix."""
        return matrix_shape(self.shape, self.rule.layout)

    @property
    def num_parameters(self):
        """Numbers in the factors and between them, batch axes included."""
        *batch, m, n = self.matrix_shape
        rank = self.rule.rank
        between = {"core": rank**2, "s": rank}.get(self.rule.trainable, 0)
        return math.prod(batch) * (rank * (m + n) + between)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `adapt` does: static, hashable, printable. Made by `make_plan`.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> print(jlora.make_plan({"w": jnp.ones((4, 3))}, [jlora.Rule("w", 2)]))
        path  shape  rank  parameters  init   trainable
        w     4×3    2     14          pissa  v
    """

    entries: tuple[PlanEntry, ...]  # in the order of the tree's leaves
    skipped: tuple[
        tuple[str, str], ...
    ] = ()  # (path, reason) of matched leaves left alone

    def __str__(self):
        rows = [("path", "shape", "rank", "parameters", "init", "trainable")]
        rows += [
            (
                e.path,
                _describe_shape(e),
                e.rule.rank,
                e.num_parameters,
                e.rule.init,
                _describe_part(e.rule),
            )
            for e in self.entries
        ]
        lines = format_table(rows)
        lines += [f"{path}: left alone, it {reason}" for path, reason in self.skipped]
        return "\n".join(lines)


def make_plan(params, rules, *, data=None, key=None):
    """Return the Plan of the first matching rule for each weight of a tree.

    Leaves that match but are no matrix (biases, counters) are left alone and named in
    `Plan.skipped`, as are those whose chosen rank is zero.

    Args:
        params: pytree of arrays: nested dicts, the state of a flax.nnx module (its paths end in
            "/value"), an Equinox module, a dict of names in a checkpoint. With ranks given as
            numbers, jax.ShapeDtypeStruct will do.
        rules: one `Rule` or a sequence; on each path the first match wins.
        data: as in `adapt`; needed here for ranks chosen by it. None: none.
        key: one typed PRNG key, consumed: a rank with a `maximum` is then chosen from as many
            leading singular values by `randomized_svd`. None: from all, by a full decomposition.

    Returns:
        `Plan`.

    Raises:
        TypeError: something that is not a Rule; traced or abstract weights where a rank is to be
            chosen by their values.
        ValueError: a rule that matches no matrix (with the nearest paths), a rank above
            min(m, n) or columns above n (with the path), a budget that does not cover the
            minimum ranks, no `data` for a rank that is chosen by it.

    Cost: nothing for ranks given as numbers; else a decomposition of each weight concerned.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> params = {"q": jnp.ones((4, 3)), "bias": jnp.ones(3)}
        >>> [e.path for e in jlora.make_plan(params, jlora.Rule(".*", 2)).entries]
        ['q']
    """
    rules = (rules,) if isinstance(rules, Rule) else tuple(rules)
    if not rules:
        raise ValueError(
            "`rules` must hold at least one jlora.Rule, got none. Write jlora.Rule(pattern, rank)."
        )
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(
                f"`rules` must hold jlora.Rule objects, got {type(rule).__name__}. "
                "Write jlora.Rule(pattern, rank)."
            )
    if key is not None:
        _checks.check_key(key)
    leaves = list_leaves(params)
    matched = [(path, leaf, _first_match(path, rules)) for path, leaf in leaves]
    matched = [match for match in matched if match[2] is not None]
    reasons = {
        path: why_not_a_matrix(leaf, rules[at].layout) for path, leaf, at in matched
    }
    _check_every_rule_used(rules, matched, leaves, reasons)
    usable = [
        (path, leaf, rules[at]) for path, leaf, at in matched if reasons[path] is None
    ]
    ranks = _choose_open_ranks(usable, data, key)
    entries = [
        _make_entry(path, leaf, rule, ranks)
        for path, leaf, rule in usable
        if ranks.get(path) != 0
    ]
    reasons |= {path: "gets rank 0" for path, rank in ranks.items() if rank == 0}
    if not entries and leaves:
        raise ValueError(
            "`rules` must leave a weight with a rank above 0, got rank 0 for all. "
            "Set `minimum` to 1 or change the rule of the rank."
        )
    skipped = tuple((path, reason) for path, reason in reasons.items() if reason)
    return Plan(tuple(entries), skipped)


def check_data(path, rule, data, shape):
    """Return what `data` holds for a weight, checked; None for initialisations without."""
    kind = INITIALIZATIONS[rule.init]
    wanted = kind.data
    if wanted is None:
        return None
    found = data.get(path)
    if found is None:
        raise ValueError(
            f"{path}: `data` must hold an array at this path for init={rule.init!r} ({wanted}), "
            "got none. Pass data={path: array} or a tree like params."
        )
    found = _checks.check_floating(found, f"data[{path!r}]")
    *batch, m, _ = matrix_shape(shape, rule.layout)
    if kind.data_is_stored:
        expected = tuple(shape)
    elif rule.init == "corda":
        expected = (*batch, m, m)
    else:
        expected = (*batch, found.shape[-2] if found.ndim > 1 else 1, m)
    _checks.check_shape(found.shape, expected, f"data[{path!r}]", wanted)
    if rule.init == "eva" and rule.has_rank and found.shape[-2] < rule.rank:
        raise ValueError(
            f"{path}: `data` must hold at least rank = {rule.rank} rows of activations, got "
            f"{found.shape[-2]}. Pass more of them, or lower the rank."
        )
    return found


def list_data(data):
    """Return {path: array} of `data`, a dict of paths or a tree like the parameters."""
    return {} if data is None else dict(list_leaves(data))


def format_table(rows):
    """Return the lines of a table whose first row is its head."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _first_match(path, rules):
    return next((at for at, rule in enumerate(rules) if rule.matches(path)), None)


def _choose_open_ranks(usable, data, key):
    data = list_data(data)
    candidates = []
    for path, leaf, rule in usable:
        if not rule.has_rank:
            found = check_data(path, rule, data, leaf.shape)
            own_key = None if key is None else fold_path(key, path)
            candidates.append(RankRequest(path, leaf, rule, found, own_key))
    return choose_ranks(candidates)


def _make_entry(path, leaf, rule, ranks):
    shape = tuple(leaf.shape)
    as_matrix = matrix_shape(shape, rule.layout)
    try:
        rule = rule.with_rank(ranks[path]) if path in ranks else rule
        _checks.check_rank(rule.rank, as_matrix)
        if rule.init == "lora_ga":
            _checks.check_rank(2 * rule.rank, as_matrix, "2 rank (init='lora_ga')")
        if rule.num_columns is not None:
            _checks.check_integer(
                rule.num_columns, "num_columns", maximum=as_matrix[-1]
            )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return PlanEntry(path, shape, rule)


def _check_every_rule_used(rules, matched, leaves, reasons):
    used = {at for path, _, at in matched if reasons[path] is None}
    for at, rule in enumerate(rules):
        if at not in used:
            paths = _sort_by_likeness([path for path, _ in leaves], rule.pattern)
            named = [_name_leaf(path, reasons.get(path)) for path in paths]
            listed = ", ".join(named[:8]) + (", ..." if len(named) > 8 else "")
            raise ValueError(
                f"`rules` must each match a matrix that no earlier rule took, got pattern "
                f"{rule.pattern!r} without one. The nearest paths are: {listed or 'none'}."
            )


def _sort_by_likeness(paths, pattern):
    def measure(path):
        return difflib.SequenceMatcher(None, pattern, path, autojunk=False).ratio()

    return sorted(paths, key=measure, reverse=True)


def _name_leaf(path, reason):
    return path if reason is None else f"{path} ({reason})"


def _describe_shape(entry):
    """Return the shape as text, and as a matrix where its layout makes another one of it."""
    shape = "×".join(map(str, entry.shape))
    if complete_layout(entry.rule.layout, len(entry.shape)).lstrip("b") == "io":
        return shape
    m, n = entry.matrix_shape[-2:]
    return f"{shape} as {m}×{n}"


def _describe_part(rule):
    return (
        rule.trainable
        if rule.num_columns is None
        else f"v, last {rule.num_columns} columns"
    )
