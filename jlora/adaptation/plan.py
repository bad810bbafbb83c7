"""Which weights are adapted, and how: a static, hashable plan."""

import dataclasses
import difflib
import math
import re

from jlora import _checks
from jlora.adaptation.initialize import INITIALIZATIONS
from jlora.adaptation.weights import list_leaves, why_not_a_matrix

PARTS = ("v", "u", "uv")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the weights whose path matches `pattern` are adapted.

    Args:
        pattern: regular expression, searched for anywhere in the path ("layers/0/attention/q").
        rank: static, ≥ 1.
        scale: of the delta, w = base + scale * u @ v. Finite, not zero.
        init: "pissa" (the leading singular triplets), "milora" (the last ones), "olora" (of a QR
            decomposition), "lora" (u random, v zero) or "orthogonal" (both random, their product
            zero; an even rank).
        part: what is trained: "v", "u" or "uv".
        columns: static k: of v, only the last k columns are trained. Needs part "v".
            None: all of them.
        residual: keep what the factors leave out in the base, so that the weight is unchanged
            (True), or drop it, w ≈ u v, as a compression (False), which needs "pissa".

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a value outside those above.

    Example:
        >>> import jlora
        >>> jlora.Rule("attention/(q|v)$", 8).part
        'v'
    """

    pattern: str
    rank: int
    _: dataclasses.KW_ONLY
    scale: float = 1.0
    init: str = "pissa"
    part: str = "v"
    columns: int | None = None
    residual: bool = True

    def __post_init__(self):
        _compile_pattern(self.pattern)
        object.__setattr__(self, "rank", _checks.check_integer(self.rank, "rank"))
        _check_scale(self.scale)
        _checks.check_choice(self.init, tuple(INITIALIZATIONS), "init")
        _checks.check_choice(self.part, PARTS, "part")
        if self.columns is not None:
            _checks.check_integer(self.columns, "columns")
            _checks.check_choice(self.part, ("v",), "part (with columns)")
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(
                f"`rank` must be even for init='orthogonal', got {self.rank}. Add one."
            )
        if not self.residual:
            _checks.check_choice(self.init, ("pissa",), "init (with residual=False)")


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """One weight of a plan: its path and shape, and the rule that it follows.

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
    def num_parameters(self):
        """Numbers in the factors, batch axes included."""
        *batch, m, n = self.shape
        return math.prod(batch) * self.rule.rank * (m + n)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `adapt` does: static, hashable, printable. Made by `make_plan`.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> print(jlora.make_plan({"w": jnp.ones((4, 3))}, [jlora.Rule("w", 2)]))
        path  shape  rank  parameters  init   part
        w     4×3    2     14          pissa  v
    """

    entries: tuple[PlanEntry, ...]  # in the order of the tree's leaves
    skipped: tuple[tuple[str, str], ...] = ()  # (path, reason) of matched leaves left alone

    def __str__(self):
        rows = [("path", "shape", "rank", "parameters", "init", "part")]
        rows += [
            (e.path, "×".join(map(str, e.shape)), e.rule.rank, e.num_parameters, e.rule.init,
             _describe_part(e.rule))
            for e in self.entries
        ]  # fmt: skip
        widths = [max(len(str(row[i])) for row in rows) for i in range(6)]
        lines = [
            "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        lines += [f"{path}: left alone, it {reason}" for path, reason in self.skipped]
        return "\n".join(line.rstrip() for line in lines)


def make_plan(params, rules):
    """Return the Plan of the first matching rule for each weight of a tree.

    Leaves that match but are no matrix (biases, counters) are left alone and named in
    `Plan.skipped`.

    Args:
        params: pytree of arrays (or jax.ShapeDtypeStruct); leading axes are batch axes.
        rules: one `Rule` or a sequence; on each path the first match wins.

    Returns:
        `Plan`.

    Raises:
        TypeError: something that is not a Rule.
        ValueError: a rule that matches no matrix (with the paths there are), a rank above
            min(m, n) or columns above n (with the path).

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> params = {"q": jnp.ones((4, 3)), "bias": jnp.ones(3)}
        >>> [e.path for e in jlora.make_plan(params, jlora.Rule(".*", 2)).entries]
        ['q']
    """
    rules = (rules,) if isinstance(rules, Rule) else tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(
                f"`rules` must hold jlora.Rule objects, got {type(rule).__name__}. "
                "Write jlora.Rule(pattern, rank)."
            )
    leaves = list_leaves(params)
    matched = [(path, leaf, _first_match(path, rules)) for path, leaf in leaves]
    matched = [(path, leaf, rule) for path, leaf, rule in matched if rule is not None]
    reasons = {path: why_not_a_matrix(leaf) for path, leaf, _ in matched}
    entries = tuple(_make_entry(*match) for match in matched if reasons[match[0]] is None)
    _check_every_rule_used(rules, entries, leaves, reasons)
    return Plan(entries, tuple((path, reason) for path, reason in reasons.items() if reason))


def _first_match(path, rules):
    return next((rule for rule in rules if re.search(rule.pattern, path)), None)


def _make_entry(path, leaf, rule):
    shape = tuple(leaf.shape)
    try:
        _checks.check_rank(rule.rank, shape)
        if rule.columns is not None:
            _checks.check_integer(rule.columns, "columns", maximum=shape[-1])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return PlanEntry(path, shape, rule)


def _check_every_rule_used(rules, entries, leaves, reasons):
    used = {id(entry.rule) for entry in entries}
    for rule in rules:
        if id(rule) not in used:
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


def _describe_part(rule):
    return rule.part if rule.columns is None else f"v, last {rule.columns} columns"


def _compile_pattern(pattern):
    if not isinstance(pattern, str):
        raise TypeError(
            f"`pattern` must be a string, got {type(pattern).__name__}. "
            "Write a regular expression on the path."
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`pattern` must be a regular expression, got {pattern!r} ({error}). Escape it."
        ) from None


def _check_scale(scale):
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(
            f"`scale` must be a Python number, got {type(scale).__name__}. Convert it with float()."
        )
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"`scale` must be finite and not zero, got {scale}. Choose another.")
