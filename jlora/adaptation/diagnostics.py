"""What adapting and training did to each weight, in numbers and as a table."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._numerics import frobenius_norm, matmul, safe_divide, to_compute
from jlora.adaptation.adapted_weight import is_adapted
from jlora.adaptation.paths import fold_path, list_leaves
from jlora.adaptation.plan import format_table
from jlora.factorization.svd import randomized_svd
from jlora.factors import Factors
from jlora.layouts import view_matrix
from jlora.reconstruction.dense import reconstruct

# A direction of the new weight is an intruder if no old one comes nearer than this: 2410.21228.
_INTRUDER_COSINE = 0.5
_COLUMNS = {
    "rank": "{:d}",
    "energy_captured": "{:.4f}",
    "residual": "{:.4f}",
    "stable_rank": "{:.1f}",
    "change": "{:.2e}",
    "angle": "{:.1f}°",
    "num_intruders": "{:d}",
}


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """One row a matrix, in arrays of one length; prints as a table.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.diag(jnp.array([2.0, 1.0, 0.0]))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> found = jlora.diagnose(params, adapted, key=jax.random.key(1))
        >>> print(str(found).splitlines()[0])
        path  rank  energy_captured  residual  stable_rank  change    angle  num_intruders
        >>> print(found.paths, f"{found.energy_captured[0]:.4f} {found.stable_rank[0]:.2f}")
        ('w',) 0.8000 1.25
    """

    paths: tuple[str, ...]  # with the place in a stack, "layers/q[3]"
    rank: np.ndarray  # int, of the factors
    energy_captured: np.ndarray  # part of ‖w‖² that the factors hold, 1 - residual²
    residual: (
        np.ndarray
    )  # ‖w - s u v‖ / ‖w‖; above 1 where the factors point away from w
    stable_rank: np.ndarray  # ‖w‖² / σ₁²
    change: (
        np.ndarray
    )  # ‖w_new - w‖ / ‖w‖: how far the weight has moved, rounding included
    angle: (
        np.ndarray
    )  # degrees, the largest between the leading left subspaces, old and new
    num_intruders: (
        np.ndarray
    )  # int, leading new directions that no leading old one is near to

    def __str__(self):
        rows = [("path", *_COLUMNS)]
        for i, path in enumerate(self.paths):
            cells = (
                style.format(getattr(self, name)[i]) for name, style in _COLUMNS.items()
            )
            rows.append((path, *cells))
        return "\n".join(format_table(rows))


def diagnose(params, adapted, *, key, num_directions=10):
    """Return the `Diagnosis` of each adapted weight against what it was.

    Args:
        params: the tree of plain weights before adapting.
        adapted: the tree from `adapt`, before or after training.
        key: one typed PRNG key, consumed; folded with each path.
        num_directions: static, leading singular directions that are compared; fewer where min(m,
            n) is smaller, and not less than 1.

    Returns:
        `Diagnosis`. Right after adapting `change` is what rounding the base has cost.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: a weight that is not in `params`, or in another shape (with the path).

    Cost: for each matrix two decompositions of rank num_directions, see `randomized_svd`, and the
        memory of two matrices.

    Accuracy: norms to rounding; angles to that of `randomized_svd`. An intruder is a leading left
        singular vector of the new weight whose cosine with each of the leading old ones is below
        1/2.

    Source: Shuttleworth, Andreas, Torralba, Sharma, "LoRA vs full fine-tuning: an illusion of
        equivalence", 2024. Differs: a new direction is held against the 2 num_directions leading
        old ones, not against all.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(1))
        >>> found = jlora.diagnose(params, adapted, key=jax.random.key(2))
        >>> bool(found.change[0] < 1e-6), int(found.num_intruders[0])
        (True, 0)
    """
    _checks.check_key(key)
    num_directions = _checks.check_integer(num_directions, "num_directions")
    plain = dict(list_leaves(params))
    rows = []
    for path, leaf in list_leaves(adapted, is_leaf=is_adapted):
        if is_adapted(leaf):
            rows += _diagnose_leaf(
                path, plain.get(path), leaf, fold_path(key, path), num_directions
            )
    if not rows:
        raise ValueError(
            "`adapted` must hold an adapted weight, got none. Call jlora.adapt first."
        )
    paths, numbers = zip(*rows, strict=True)
    columns = zip(*jax.device_get(numbers), strict=True)
    return Diagnosis(paths, *(np.asarray(column) for column in columns))


def _diagnose_leaf(path, w, leaf, key, num_directions):
    """Return [(name, numbers)] of the matrices of a weight."""
    if w is None or tuple(w.shape) != leaf.shape:
        found = "none" if w is None else tuple(w.shape)
        raise ValueError(
            f"{path}: `params` must hold this weight in shape {leaf.shape}, got {found}. "
            "Pass the tree that adapt was given."
        )
    w = view_matrix(w, leaf.layout)
    base = None if leaf.base is None else view_matrix(leaf.base, leaf.layout)
    factors = leaf.factors
    rank, num_directions = leaf.u.shape[-1], min(num_directions, *w.shape[-2:])
    rows = []
    for index in np.ndindex(w.shape[:-2]):
        parts = [
            None if part is None else jnp.asarray(part[index])
            for part in (w, base, *factors)
        ]
        numbers = _compare(*parts, leaf.scale, key, num_directions)
        rows.append(
            (
                f"{path}[{', '.join(map(str, index))}]" if index else path,
                (rank, *numbers),
            )
        )
    return rows


@functools.partial(jax.jit, static_argnames="k")
def _compare(w, base, u, v, scale, key, k):
    """Return the numbers of one matrix, in the order of `Diagnosis`."""
    w = to_compute(w)
    new = reconstruct(Factors(u, v), base, scale=scale, dtype=w.dtype)
    left = reconstruct(Factors(u, v), w, scale=-scale)
    norm = frobenius_norm(w)
    residual = safe_divide(frobenius_norm(left), norm)
    change = safe_divide(frobenius_norm(new - w), norm)
    old_key, new_key = jax.random.split(key)
    old = randomized_svd(w, min(2 * k, *w.shape), key=old_key)
    directions = randomized_svd(new, k, key=new_key).u
    stable_rank = safe_divide(norm, old.s[0]) ** 2
    cosines = matmul(old.u.T, directions)
    num_intruders = jnp.sum(jnp.max(jnp.abs(cosines), axis=0) < _INTRUDER_COSINE)
    # From the sine too: the cosine alone tells nothing of angles below a hundredth of a degree.
    outside = directions - matmul(old.u[:, :k], cosines[:k])
    sine = jnp.linalg.norm(outside, 2)
    cosine = jnp.min(jnp.linalg.svd(cosines[:k], compute_uv=False))
    angle = jnp.degrees(jnp.arctan2(sine, cosine))
    return 1 - residual**2, residual, stable_rank, change, angle, num_intruders
