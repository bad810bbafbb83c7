"""The data that initializers read beside the weights, by path and checked."""

from __future__ import annotations

from typing import Any

from jlora import _checks
from jlora._types import Tree
from jlora.adaptation.paths import list_leaves
from jlora.adaptation.rule import Rule
from jlora.layouts import matrix_shape


def list_data(data: Tree | None) -> dict[str, Any]:
    """Return {path: array} of `data`, a dict of paths or a tree like the parameters."""
    return {} if data is None else dict(list_leaves(data))


def find_data(
    path: str, rule: Rule, data: dict[str, Any], shape: tuple[int, ...]
) -> Any:
    """Return the data of one weight, checked, or None if its initializer needs none."""
    init = rule.initializer
    if init.data_meaning is None:
        return None

    found = data.get(path)
    if found is None:
        if not init.is_data_required:
            return None
        raise ValueError(
            f"{path}: `data` must hold an array at this path for init={init.label!r} "
            f"({init.data_meaning}), got none. Pass data={{path: array}} or a tree "
            "like params."
        )

    name = f"data[{path!r}]"
    found = _checks.check_floating(found, name)
    expected = _find_shape(rule, found.shape, shape)
    _checks.check_shape(found.shape, expected, name, init.data_meaning)
    _check_rank(path, rule, found, shape)
    return found


def _find_shape(
    rule: Rule, found: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the shape that the data must have; free sizes are the found ones."""
    init = rule.initializer
    if init.is_data_stored:
        return tuple(shape)

    *batch, m, n = matrix_shape(shape, rule.layout)
    own = init.data_shape(m, n)
    if own is None:
        return (*batch, *found[len(batch) :])

    last = found[-len(own) :] if len(found) >= len(own) else (1,) * len(own)
    filled = (
        size if expected is None else expected
        for size, expected in zip(last, own, strict=True)
    )
    return (*batch, *filled)


def _check_rank(path: str, rule: Rule, data: Any, shape: tuple[int, ...]) -> None:
    """Refuse data that supports fewer ranks than the rule asks for."""
    m, n = matrix_shape(shape, rule.layout)[-2:]
    init = rule.initializer
    limit = init.max_rank(m, n, data)
    if isinstance(rule.rank, int) and limit < min(rule.rank, init.max_rank(m, n)):
        raise ValueError(
            f"{path}: `data` must allow rank {rule.rank} for init={init.label!r} "
            f"({init.data_meaning}), got shape {tuple(data.shape)}, which allows "
            f"{limit}. Pass more of it, or lower the rank."
        )
