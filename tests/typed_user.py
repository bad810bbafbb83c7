"""Calls of a user, for pyright: `assert_type` fails where a type is lost."""

from typing import Any, assert_type

import jax
import numpy as np
import optax

import jlora
from jlora.initializers import InitialFactors, Initializer


def use_kernels(a: jax.Array, key: jax.Array) -> jax.Array:
    svd = jlora.randomized_svd(a, 4, key=key)
    assert_type(svd, jlora.SVD)
    assert_type(jlora.truncated_svd(a, 4), jlora.SVD)
    assert_type(
        jlora.adaptive_svd(a, tolerance=0.1, max_rank=4, key=key).svd, jlora.SVD
    )
    factors = jlora.split_svd(svd, "right")
    assert_type(factors, jlora.Factors)
    assert_type(jlora.recompress(factors, 2), jlora.SVD)
    assert_type(jlora.concatenate_factors([factors, factors]), jlora.Factors)
    assert_type(jlora.choose_rank(np.asarray(svd.s)).rank, int)
    return jlora.apply_factors(a, factors, a, scale=2.0) + svd.u @ svd.vt


def use_models(params: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    plan = jlora.make_plan(params, jlora.Rule("w", 8, init=jlora.initializers.olora()))
    assert_type(plan, jlora.adaptation.Plan)
    adapted = jlora.adapt(params, plan, key=key)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        return ((batch @ params["w"]) ** 2).mean()

    result = jlora.fit(loss, adapted, optax.adam(1e-3), [np.ones((2, 4))])
    assert_type(result, jlora.training.FitResult)
    assert_type(result.stop_reason, str | None)
    assert_type(jlora.adaptation.get_factors(result.adapted), dict[str, jlora.Factors])
    return jlora.merge(result.adapted)


def my_initializer(
    w: jax.Array,
    rank: int,
    *,
    scale: Any,
    key: jax.Array,
    data: jax.Array | None = None,
) -> InitialFactors:
    del key, data
    factors = jlora.Factors(w[:, :rank], w[:rank] / scale)
    return InitialFactors.from_residual(w, factors, scale)


def use_own_parts() -> jlora.Rule:
    assert_type(jlora.initializers.pissa(residual=False), Initializer)
    optimizer = jlora.optimizers.scale_by_factor_gram()
    assert_type(optimizer, optax.GradientTransformationExtraArgs)
    return jlora.Rule("w", jlora.RankBudget(1000), init=my_initializer)
