"""`LiftedWeight`: an array that stays base + u @ v while a program moves it about."""

import equinox
import jax
import jax.numpy as jnp
import quax

from jlora._numerics import matmul
from jlora.layouts import invert, list_axes, sort_axes


class LiftedWeight(quax.ArrayValue):
    """An array whose axes are batch axes, inputs and outputs, in any order: base + u @ v.

    u has the batch axes, the inputs and the rank; v the batch axes, the rank and the outputs; each
    in the order in which the array has them. The scale is in u.
    """

    base: jax.Array | None
    u: jax.Array
    v: jax.Array
    letters: str = equinox.field(static=True)  # "b", "i" or "o" for each axis
    path: str = equinox.field(static=True)
    dtype_seen: object = equinox.field(static=True)  # what the program takes it for
    can_form: bool = equinox.field(static=True)  # whether the whole array may be formed

    def aval(self):
        return jax.core.ShapedArray(find_shape(self), self.dtype_seen)

    def materialise(self):
        return form(self, "a value of the result")

    @staticmethod
    def default(primitive, values, params):
        """Form the weights that an operation without a rule needs whole, or refuse to."""
        arrays = [
            form(value, f"`{primitive}`") if isinstance(value, LiftedWeight) else value
            for value in values
        ]
        return primitive.bind(*arrays, **params)


def form(weight, operation):
    """Return the whole array, or raise if the user did not allow that."""
    if not weight.can_form:
        raise ValueError(
            f"{weight.path}: `fn` must use an adapted weight in products, lookups, convolutions, "
            f"casts, slices and reshapes alone, got {operation} on shape {find_shape(weight)}. "
            "Pass materialize=True, leave the weight out of the plan, or use jlora.on_merged."
        )
    num_batch = weight.letters.count("b")
    batch = weight.u.shape[:num_batch]
    inputs, outputs = weight.u.shape[num_batch:-1], weight.v.shape[num_batch + 1 :]
    u = weight.u.reshape(*batch, -1, weight.u.shape[-1])
    v = weight.v.reshape(*batch, weight.v.shape[num_batch], -1)
    delta = matmul(u, v).reshape(*batch, *inputs, *outputs)
    delta = jnp.transpose(delta, invert(sort_axes(weight.letters)))
    total = delta if weight.base is None else weight.base.astype(delta.dtype) + delta
    return total.astype(weight.dtype_seen)


def settle(weight):
    """Return the weight, or its values where it has lost its inputs or its outputs: vectors."""
    if "i" in weight.letters and "o" in weight.letters:
        return weight
    return form(replace(weight, can_form=True), "a vector")


def replace(weight, **changes):
    """Return the weight with some fields changed."""
    names = ("base", "u", "v", "letters", "path", "dtype_seen", "can_form")
    return LiftedWeight(**{name: getattr(weight, name) for name in names} | changes)


def find_shape(weight):
    num_batch = weight.letters.count("b")
    sizes = {
        "b": iter(weight.u.shape[:num_batch]),
        "i": iter(weight.u.shape[num_batch:-1]),
        "o": iter(weight.v.shape[num_batch + 1 :]),
    }
    return tuple(next(sizes[letter]) for letter in weight.letters)


def locate(letters, axis):
    """Return [(name, axis)] of the factors that have an axis of the array."""
    num_batch, kind = letters.count("b"), letters[axis]
    place = list_axes(letters, kind).index(axis)
    if kind == "b":
        return [("u", place), ("v", place)]
    return [("u", num_batch + place)] if kind == "i" else [("v", num_batch + 1 + place)]


def map_arrays(weight, fn):
    """Return the weight with fn(name, array) in place of its base and of each factor."""
    base = None if weight.base is None else fn("base", weight.base)
    return replace(weight, base=base, u=fn("u", weight.u), v=fn("v", weight.v))


def reshape_weight(weight, shape):
    """Return the weight of another shape, or None where that mixes inputs with outputs."""
    letters = _match_letters(find_shape(weight), weight.letters, shape)
    if letters is None:
        return None
    sizes = {kind: [shape[axis] for axis in list_axes(letters, kind)] for kind in "bio"}
    rank = weight.u.shape[-1]
    return replace(
        weight,
        base=None if weight.base is None else weight.base.reshape(shape),
        u=weight.u.reshape(*sizes["b"], *sizes["i"], rank),
        v=weight.v.reshape(*sizes["b"], rank, *sizes["o"]),
        letters=letters,
    )


def _match_letters(old_shape, letters, new_shape):
    """Return the letters of the new axes: each run of axes that is joined or cut has one kind."""
    new_letters, new_axis = [None] * len(new_shape), 0
    old = [
        (size, letter)
        for size, letter in zip(old_shape, letters, strict=True)
        if size != 1
    ]
    rest = [axis for axis, size in enumerate(new_shape) if size != 1]
    at = 0
    while at < len(old):
        old_size, kind = old[at]
        at += 1
        if new_axis == len(rest):
            return None
        run = [rest[new_axis]]
        new_size = new_shape[rest[new_axis]]
        new_axis += 1
        while old_size != new_size:
            if old_size < new_size:
                if at == len(old) or old[at][1] != kind:
                    return None
                old_size *= old[at][0]
                at += 1
            else:
                if new_axis == len(rest):
                    return None
                run.append(rest[new_axis])
                new_size *= new_shape[rest[new_axis]]
                new_axis += 1
        for axis in run:
            new_letters[axis] = kind
    return _name_ones(new_letters)


def _name_ones(letters):
    """Return the letters with one for each axis of size one: as the next axis, else the last."""
    following = None
    for axis in reversed(range(len(letters))):
        letters[axis] = following = letters[axis] or following
    previous = "i"
    for axis, letter in enumerate(letters):
        letters[axis] = previous = letter or previous
    return "".join(letters)
