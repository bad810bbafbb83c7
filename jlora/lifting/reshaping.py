"""Reshapes of a `LiftedWeight` that join or split axes of one kind."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from jlora.layouts import list_axes
from jlora.lifting.lifted_weight import LiftedWeight, find_shape, replace
from jlora.quantization.quantized_array import QuantizedArray


def reshape_weight(weight: LiftedWeight, shape: Sequence[int]) -> LiftedWeight | None:
    """Return the weight in another shape, or None if that joins inputs with outputs."""
    layout = _match_layout(find_shape(weight), weight.layout, shape)
    if layout is None:
        return None

    batch, inputs, outputs = (
        [shape[axis] for axis in list_axes(layout, letter)] for letter in "bio"
    )
    rank = weight.u.shape[-1]
    return replace(
        weight,
        base=_reshape_base(weight.base, shape, layout),
        u=weight.u.reshape(*batch, *inputs, rank),
        v=weight.v.reshape(*batch, rank, *outputs),
        layout=layout,
    )


def _reshape_base(base: Any, shape: Sequence[int], layout: str) -> Any:
    if isinstance(base, QuantizedArray):
        return base.view(layout, shape)
    return None if base is None else base.reshape(shape)


def _match_layout(
    old_shape: Sequence[int], layout: str, new_shape: Sequence[int]
) -> str | None:
    """Return the layout of the new shape, or None if an axis would get two letters.

    Both shapes are read from the left, in runs: the fewest old axes and the fewest new
    axes with equally many elements. (2, 3, 4) to (6, 2, 2) has the runs (2, 3) to (6,)
    and (4,) to (2, 2). The new axes of a run get the letter of its old axes, which must
    be one letter. Axes of size one are in no run and get theirs last.
    """
    old = deque(
        (size, letter)
        for size, letter in zip(old_shape, layout, strict=True)
        if size != 1
    )
    new = deque(axis for axis, size in enumerate(new_shape) if size != 1)
    new_layout: list[str | None] = [None] * len(new_shape)

    while old:
        # Start a run with one axis of each shape.
        if not new:
            return None
        old_size, letter = old.popleft()
        run = [new.popleft()]
        new_size = new_shape[run[0]]

        # Extend the smaller side until both have equally many elements.
        while old_size != new_size:
            if old_size < new_size:
                if not old or old[0][1] != letter:
                    return None
                old_size *= old.popleft()[0]
            else:
                if not new:
                    return None
                run.append(new.popleft())
                new_size *= new_shape[run[-1]]

        for axis in run:
            new_layout[axis] = letter
    return _label_unit_axes(new_layout)


def _label_unit_axes(layout: list[str | None]) -> str:
    """Return the layout with a letter for axes of size one.

    An axis of size one gets the letter of the next larger axis. After the last larger
    axis it gets the letter of that one. If all axes have size one, all are inputs.
    """
    labelled, following = list(layout), None
    for axis in reversed(range(len(layout))):
        labelled[axis] = following = layout[axis] or following

    # The trailing axes have no next one.
    previous = "i"
    letters = []
    for letter in labelled:
        previous = letter or previous
        letters.append(previous)
    return "".join(letters)
