"""Every public function that takes arrays, with arguments and how its results scale."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from tests.helpers.matrices import X64

KEY = jax.random.key(0)
DTYPE = np.float64 if X64 else np.float32
RNG_SEED = 7


class Case(NamedTuple):
    """A function of arrays, and how its results scale."""

    name: str
    fn: Any  # (*arrays) -> tuple of arrays
    arrays: tuple[Any, ...]
    # (degrees of the arguments, degrees of the results)
    degrees: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    has_derivative: bool = True
    tolerance: float = 200.0  # in eps of the dtype, relative to the largest entry


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng((RNG_SEED, seed, *shape))
    return rng.standard_normal(shape).astype(DTYPE)


def draw_svd(m: int, n: int, r: int) -> tuple[np.ndarray, ...]:
    u, _ = np.linalg.qr(draw(m, r))
    v, _ = np.linalg.qr(draw(n, r, seed=1))
    s = np.asarray([4.0, 2.5, 1.0][:r], DTYPE)
    return u.astype(DTYPE), s, v.T.astype(DTYPE)


def as_svd(u: Any, s: Any, vt: Any) -> jlora.SVD:
    return jlora.SVD(u, s, vt)


A = draw(24, 18)
TALL = draw(400, 300)
SVD = draw_svd(12, 10, 3)
U, V = draw(12, 3), draw(3, 10)
BASE = draw(12, 10, seed=5)
X = draw(5, 12)


def run_adapt(init: str, **settings: Any) -> Any:
    """Return a function from a weight to base + scale u v, its base and its delta."""

    def fn(w: Any) -> tuple[Any, ...]:
        params = {"w": w}
        rule = jlora.Rule("w", 3, init=init, scale=0.5, **settings)
        adapted = jlora.adapt(params, jlora.make_plan(params, rule), key=KEY)
        weight = adapted["w"]
        delta = jlora.reconstruct(weight.factors, scale=weight.scale)
        base = w if weight.base is None else weight.base
        return base, delta

    return fn


FACTORIZATION = [
    Case(
        "randomized_svd",
        lambda a: jlora.randomized_svd(a, 4, key=KEY, num_passes=6, block_size=4),
        (A,),
        (((1,), (0, 1, 0)),),
        has_derivative=False,
    ),
    Case(
        "randomized_svd, wide core",
        lambda a: jlora.randomized_svd(a, 16, key=KEY).s,
        (TALL,),
        (((1,), (1,)),),
        has_derivative=False,
    ),
    Case(
        "randomized_svd, subspace",
        lambda a: jlora.randomized_svd(
            a, 4, key=KEY, method="subspace", block_size=8, num_passes=4
        ),
        (A,),
        (((1,), (0, 1, 0)),),
        has_derivative=False,
    ),
    Case(
        "truncated_svd",
        lambda a: jlora.truncated_svd(a, 4),
        (A,),
        (((1,), (0, 1, 0)),),
    ),
    Case(
        "adaptive_svd",
        lambda a: jlora.adaptive_svd(a, tolerance=0.6, max_rank=4, key=KEY).svd.s,
        (TALL,),
        (((1,), (1,)),),
        has_derivative=False,
    ),
    Case(
        "low_rank_approximation",
        lambda a: jlora.low_rank_approximation(a, 4, key=KEY),
        (A,),
        (((1,), (1,)),),
        tolerance=5000.0,  # the gap is 0.03 of the norm
    ),
    Case(
        "estimate_error",
        lambda a, *svd: jlora.estimate_error(a, as_svd(*svd), key=KEY),
        (BASE, *SVD),
        (((1, 0, 1, 0), (1,)),),
    ),
    Case(
        "estimate_sketch_error",
        lambda a: jlora.factorization.estimate_sketch_error(a, key=KEY),
        (draw(30, 6),),
        (((1,), (1,)),),
        has_derivative=False,
    ),
    Case(
        "split_svd",
        lambda *svd: jlora.split_svd(as_svd(*svd)),
        SVD,
        (((0, 1, 0), (0.5, 0.5)),),
    ),
    Case(
        "fix_signs",
        lambda *svd: jlora.factors.fix_signs(as_svd(*svd)),
        SVD,
        (((0, 1, 0), (0, 1, 0)),),
    ),
]

UPDATES = [
    Case(
        "add_low_rank",
        lambda u, s, vt, x, y: jlora.updates.add_low_rank(as_svd(u, s, vt), x, y),
        (*SVD, draw(12, 2), draw(2, 10)),
        (
            ((0, 1, 0, 1, 0), (0, 1, 0)),
            ((0, 1, 0, 0, 1), (0, 1, 0)),
            ((0, 0, 0, 1, -1), (0, 0, 0)),
        ),
    ),
    Case(
        "add_low_rank, columns of different scales",
        lambda s, x0, y0, x1, y1: (
            jlora.updates.add_low_rank(
                as_svd(SVD[0], s, SVD[2]),
                jnp.stack([x0, x1], -1),
                jnp.stack([y0, y1]),
            ).s
        ),
        (SVD[1], draw(12, seed=1), draw(10, seed=2), draw(12, seed=3), draw(10)),
        (((1, 1, 0, 0, 1), (1,)), ((0, 1, -1, -1, 1), (0,))),
    ),
    Case(
        "append_columns",
        lambda u, s, vt, c: jlora.updates.append_columns(as_svd(u, s, vt), c),
        (*SVD, draw(12, 2)),
        (((0, 1, 0, 1), (0, 1, 0)),),
    ),
    Case(
        "append_rows",
        lambda u, s, vt, c: jlora.updates.append_rows(as_svd(u, s, vt), c),
        (*SVD, draw(2, 10)),
        (((0, 1, 0, 1), (0, 1, 0)),),
    ),
    Case(
        "replace_columns",
        lambda u, s, vt, c: jlora.updates.replace_columns(as_svd(u, s, vt), [1, 4], c),
        (*SVD, draw(12, 2)),
        (((0, 1, 0, 1), (0, 1, 0)),),
    ),
    Case(
        "remove_columns",
        lambda *svd: jlora.updates.remove_columns(as_svd(*svd), 2),
        SVD,
        (((0, 1, 0), (0, 1, 0)),),
    ),
    Case(
        "set_columns of an SVD",
        lambda u, s, vt, c: jlora.set_columns(as_svd(u, s, vt), 2, c),
        (*SVD, draw(3, 2)),
        (((0, 1, 0, 1), (0, 1, 0)),),
    ),
    Case(
        "set_columns of factors",
        lambda u, v, c: jlora.set_columns(jlora.Factors(u, v), 2, c),
        (U, V, draw(3, 2)),
        (((1, 0, 0), (1, 0)), ((0, 1, 1), (0, 1))),
    ),
    Case(
        "concatenate_factors",
        lambda u, v, x, y: jlora.concatenate_factors(
            [jlora.Factors(u, v), jlora.Factors(x, y)], [0.5, 2.0]
        ),
        (U, V, draw(12, 2), draw(2, 10)),
        (((1, 0, 1, 0), (1, 0)), ((0, 1, 0, 1), (0, 1))),
    ),
    Case(
        "recompress",
        lambda u, v: jlora.recompress(jlora.Factors(u, v), 2),
        (U, V),
        (((1, 0), (0, 1, 0)), ((0, 1), (0, 1, 0)), ((1, -1), (0, 0, 0))),
    ),
    Case(
        "recompress with a key",
        lambda u, v: jlora.recompress(jlora.Factors(u, v), 2, key=KEY).s,
        (draw(300, 200), draw(200, 250)),
        (((1, 0), (1,)), ((0, 1), (1,)), ((1, -1), (0,))),
        has_derivative=False,
    ),
    Case(
        "balance",
        lambda u, v: jlora.updates.balance(jlora.Factors(u, v)),
        (U, V),
        (((1, 1), (1, 1)), ((1, -1), (0, 0))),
    ),
    Case(
        "orthogonalize_product",
        lambda u, v: jlora.updates.orthogonalize_product(jlora.Factors(u, v)),
        (U, V),
        (((1, 1), (0, 0)), ((1, -1), (0, 0)), ((1, 0), (0, 0))),
    ),
]

BANK = (draw(3, 12, 2), draw(3, 2, 10))
INDEX = jnp.asarray([0, 2, -1, 1, 0])

RECONSTRUCTION = [
    Case(
        "reconstruct",
        lambda u, v, base: (jlora.reconstruct(jlora.Factors(u, v), base, scale=0.5),),
        (U, V, BASE),
        (((1, 0, 1), (1,)), ((0, 1, 1), (1,)), ((1, -1, 0), (0,))),
    ),
    Case(
        "unmerge",
        lambda u, v, base: (
            jlora.reconstruction.unmerge(jlora.Factors(u, v), base, scale=0.5),
        ),
        (U, V, BASE),
        (((1, 0, 1), (1,)), ((0, 1, 1), (1,)), ((1, -1, 0), (0,))),
    ),
    Case(
        "apply_factors",
        lambda x, u, v, base: (jlora.apply_factors(x, jlora.Factors(u, v), base),),
        (X, U, V, BASE),
        (((1, 0, 0, 0), (1,)), ((0, 1, 0, 1), (1,)), ((0, 1, -1, 0), (0,))),
    ),
    *(
        Case(
            f"apply_many, {name}",
            lambda x, u, v, base, name=name: (
                jlora.apply_many(
                    x, jlora.Factors(u, v), INDEX, base, implementation=name
                ),
            ),
            (X, *BANK, BASE),
            (((1, 0, 0, 0), (1,)), ((0, 1, 0, 1), (1,)), ((0, 1, -1, 0), (0,))),
        )
        for name in ("gather", "sort")
    ),
    Case(
        "linear",
        lambda x, w: (jlora.linear(x, w),),
        (X, BASE),
        (((1, 0), (1,)), ((0, 1), (1,))),
    ),
    Case(
        "stack_factors",
        lambda u, v, x, y: jlora.stack_factors(
            [jlora.Factors(u, v), jlora.Factors(x, y)]
        ),
        (U, V, draw(12, 2), draw(2, 10)),
        (((1, 0, 1, 0), (1, 0)),),
    ),
    *(
        Case(name, lambda w, fn=fn: (fn(w),), (BASE,), (((1,), (1,)),), False)
        for name, fn in (
            ("quantize_int8", jlora.quantization.quantize_int8),
            ("quantize_nf4", jlora.quantization.quantize_nf4),
        )
    ),
]

TRAINING = [
    Case(
        "precondition_gradient",
        lambda u, v, du, dv: jlora.training.precondition_gradient(
            jlora.Factors(u, v), jlora.Factors(du, dv)
        ),
        (U, V, draw(12, 3, seed=2), draw(3, 10, seed=2)),
        (
            ((0, 0, 1, 1), (1, 1)),
            ((1, 0, 0, 1), (0, -1)),
            ((0, 1, 1, 0), (-1, 0)),
            ((1, 1, 1, 1), (-1, -1)),
        ),
    ),
    Case(
        "project_gradient_out",
        lambda g, basis: (jlora.training.project_gradient_out(g, basis),),
        (BASE, SVD[0]),
        (((1, 0), (1,)),),
    ),
    Case(
        "project_tangent",
        lambda u, s, vt, g: jlora.training.project_tangent(as_svd(u, s, vt), g),
        (*SVD, BASE),
        (((0, 1, 0, 1), (1, 1, 1)),),
    ),
    Case(
        "retract",
        lambda u, s, vt, g: jlora.training.retract(
            as_svd(u, s, vt),
            jlora.training.project_tangent(as_svd(u, s, vt), g),
            -0.1,
        ),
        (*SVD, BASE),
        (((0, 1, 0, 1), (0, 1, 0)),),
    ),
    Case(
        "integrate_low_rank",
        lambda u, s, vt, g: (
            jlora.training.integrate_low_rank(as_svd(u, s, vt), g, tolerance=0.01).svd
        ),
        (*SVD, 0.1 * BASE),
        (((0, 1, 0, 1), (0, 1, 0)),),
        has_derivative=False,
    ),
    Case(
        "integrate_low_rank of factors",
        lambda u, s, vt, x, y: (
            jlora.training.integrate_low_rank(as_svd(u, s, vt), jlora.Factors(x, y)).svd
        ),
        (*SVD, 0.1 * U, V),
        (((0, 1, 0, 1, 0), (0, 1, 0)), ((0, 0, 0, 1, -1), (0, 0, 0))),
        has_derivative=False,
    ),
    Case(
        "transport_moments",
        lambda first, second, old, new: jlora.training.transport_moments(
            first, second, old, new
        ),
        (draw(3, 4), draw(3, 4) ** 2 + 1, SVD[0], np.linalg.qr(U)[0].astype(DTYPE)),
        (((0.5, 1, 0, 0), (0.5, 1)),),
    ),
]

ADAPTATION = [
    Case(
        f"adapt, {init}",
        run_adapt(init),
        (BASE,),
        (((1,), (1, 1)),),
        has_derivative=False,
    )
    for init in ("pissa", "milora", "lora", "svf", "loftq", "qpissa")
] + [
    Case(
        "adapt, olora",
        lambda w: run_adapt("olora")(w)[1:],
        (BASE,),
        # Its factors are orthonormal on one side, whatever the scale of the weight.
        (((1,), (1,)),),
        has_derivative=False,
    ),
    Case(
        "diagnose",
        lambda w: (run_diagnosis(w),),
        (BASE,),
        (((1,), (0,)),),
        has_derivative=False,
    ),
]


def run_diagnosis(w: Any) -> Any:
    params = {"w": w}
    plan = jlora.make_plan(params, jlora.Rule("w", 3, init="pissa"))
    diagnosis = jlora.diagnose(params, jlora.adapt(params, plan, key=KEY), key=KEY)
    return jnp.asarray([diagnosis.energy_captured[0], diagnosis.stable_rank[0]])


CASES = FACTORIZATION + UPDATES + RECONSTRUCTION + TRAINING + ADAPTATION


def to_tuple(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, tuple) else (results,)
