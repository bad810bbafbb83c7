"""The leaves of a tree that match the rules of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jlora.adaptation.adapted_weight import is_adapted
from jlora.adaptation.paths import (
    sort_by_likeness,
    why_not_a_matrix,
    why_stacked_vectors,
)
from jlora.adaptation.rule import Rule


class Match(NamedTuple):
    """A leaf and the first rule that matches its path."""

    path: str
    leaf: Any
    index: int  # of the rule
    rule: Rule
    reason: str | None  # why the leaf is no matrix; None: it is one


def check_rules(rules: Rule | Sequence[Rule]) -> tuple[Rule, ...]:
    """Return the rules as a tuple of at least one."""
    checked = (rules,) if isinstance(rules, Rule) else tuple(rules)
    if not checked:
        raise ValueError(
            "`rules` must hold at least one jlora.Rule, got none. "
            "Write jlora.Rule(pattern, rank)."
        )

    for rule in checked:
        if not isinstance(rule, Rule):
            raise TypeError(
                f"`rules` must hold jlora.Rule objects, got {type(rule).__name__}. "
                "Write jlora.Rule(pattern, rank)."
            )
    return checked


def match_leaves(leaves: list[tuple[str, Any]], rules: tuple[Rule, ...]) -> list[Match]:
    """Return the leaves that a rule matches, each with the first such rule."""
    matches = []
    for path, leaf in leaves:
        found = (i for i, rule in enumerate(rules) if rule.matches(path))
        index = next(found, None)
        if index is not None:
            rule = rules[index]
            reason = "is adapted already"
            if not is_adapted(leaf):
                reason = why_not_a_matrix(leaf, rule.layout)
                reason = reason or why_stacked_vectors(path, rule.pattern)
            matches.append(Match(path, leaf, index, rule, reason))
    return matches


def check_every_rule_used(
    rules: tuple[Rule, ...], matches: list[Match], leaves: list[tuple[str, Any]]
) -> None:
    """Refuse a rule that matches no matrix, and name the nearest paths."""
    used = {match.index for match in matches if match.reason is None}
    reasons = {match.path: match.reason for match in matches}

    for index, rule in enumerate(rules):
        if index in used:
            continue
        paths = sort_by_likeness([path for path, _ in leaves], rule.pattern)
        named = [_name_path(path, reasons.get(path)) for path in paths]
        listed = ", ".join(named[:8]) + (", ..." if len(named) > 8 else "")
        raise ValueError(
            "`rules` must each match a matrix that no earlier rule took, got pattern "
            f"{rule.pattern!r} without one. The nearest paths are: {listed or 'none'}."
        )


def _name_path(path: str, reason: str | None) -> str:
    return path if reason is None else f"{path} ({reason})"
