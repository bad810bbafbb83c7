"""Adapters extracted from a tree, written as deltas, swapped, summed and merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.adapted_trees import (
    EPS,
    KEY,
    PARAMS,
    adapt,
    draw,
    get_change,
    train,
    view,
)

HALF = float(jnp.finfo(jnp.bfloat16).eps) / 2  # one rounding to bfloat16
PATHS = ("q", "stack", "torch")


def make_adapter(seed, rank, paths=PATHS):
    batches = {path: (3,) if path == "stack" else () for path in paths}
    return {
        path: jlora.Factors(
            draw(seed, *batch, 12, rank), draw(seed + 1, *batch, rank, 8)
        )
        for path, batch in batches.items()
    }


ONE, TWO, THREE = (
    make_adapter(10, 4),
    make_adapter(20, 1),
    make_adapter(30, 2, ("q", "torch")),
)


def multiply(factors):
    return view(factors.u) @ view(factors.v)


def truncate(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u * s[..., None, :])[..., :rank] @ vt[..., :rank, :]


def assert_close(found, expected):
    # Float32 sums of at most some dozen terms, of the size of the largest value.
    atol = 64 * EPS * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("trainable", ["v", "u", "uv", "core", "s"])
@pytest.mark.parametrize("init", ["pissa", "olora", "milora"])
def test_the_delta_on_the_plain_weights_is_the_trained_model(init, trainable):
    initial = adapt(PARAMS, init=init, trainable=trainable, scale=-2.0)
    trained = train(initial)
    merged = jlora.merge(trained)
    factors = jlora.adaptation.get_factors(trained)
    delta = jlora.adaptation.extract_delta(initial, trained)
    assert list(delta) == list(PATHS)

    for path, (u, v) in delta.items():
        assert (u.shape[-2:], v.shape[-2:]) == ((12, 6), (6, 8))
        assert_close(multiply(factors[path]), get_change(trained[path]))

        change = get_change(trained[path]) - get_change(initial[path])
        assert np.abs(change).max() > 0.01
        assert_close(multiply(delta[path]), change)
        assert_close(view(PARAMS[path]) + view(change, path), view(merged[path]))

    swapped = jlora.adaptation.set_factors(adapt(PARAMS, 6, init="lora"), delta)
    jax.tree.map(assert_close, jlora.merge(swapped), merged)


@pytest.mark.parametrize(("rank", "kept"), [(4, 4), (50, 10)])
def test_a_truncated_delta_is_the_best_approximation_of_its_rank(rank, kept):
    # The change has rank 8.
    initial = adapt({"stack": PARAMS["stack"]}, 5, trainable="uv")
    trained = train(initial)
    factors = jlora.adaptation.extract_delta(initial, trained, rank=rank)["stack"]
    assert factors.u.shape[-1] == factors.v.shape[-2] == kept
    change = get_change(trained["stack"]) - get_change(initial["stack"])
    assert_close(multiply(factors), truncate(change, rank))


def test_adapters_are_swapped_and_summed_on_one_base_without_recompiling():
    traces, slots = [], adapt(PARAMS, rank=4, init="lora")
    merge = jax.jit(lambda adapted: traces.append(1) or jlora.merge(adapted))

    for adapters, scale in [
        (ONE, 0.5),
        (TWO, jnp.float32(-3)),
        ([THREE], 2.0),
        ({}, 1.0),
        ([THREE, TWO], [-2.0, 0.25]),
        ([TWO, THREE, TWO], jnp.array([1.0, 0.5, -4.0], jnp.float32)),
        ((TWO, TWO), 0.5),
    ]:
        swapped = jlora.adaptation.set_factors(slots, adapters, scale=scale)
        merged = merge(swapped)
        adapters = [adapters] if isinstance(adapters, dict) else adapters
        pairs = list(zip(adapters, np.broadcast_to(scale, len(adapters)), strict=True))

        for path in PATHS:
            own = [
                scale * multiply(adapter[path])
                for adapter, scale in pairs
                if path in adapter
            ]
            assert swapped[path].base is PARAMS[path]
            check = assert_close if own else np.testing.assert_array_equal
            check(view(merged[path], path), view(PARAMS[path], path) + sum(own))

    assert len(traces) == 1


def test_merge_rounds_16_bits_by_the_given_rounding():
    base, delta = draw(1, 3, 12, 8).astype(jnp.bfloat16), ONE["stack"]
    params = {"host": np.array(base), "full": draw(2, 12, 8), "same": base}
    factors = {"host": delta, "same": delta, "full": ONE["q"]}
    slots = adapt(params, 4, init="lora")
    adapted = jlora.adaptation.set_factors(slots, factors, scale=1e-3)
    exact = view(base) + 1e-3 * multiply(delta)

    nearest, pair = jlora.merge(adapted), jlora.merge(adapted, rounding="compensated")
    keys = jax.random.split(KEY, 16)
    drawn = [
        jlora.merge(adapted, rounding="stochastic", key=key) for key in (*keys, keys[0])
    ]

    def measure(found, bound):
        """Check the error of each entry, and return the norm of all errors."""
        error = view(found) - exact
        assert np.all(np.abs(error) <= (bound + 4 * EPS) * np.abs(exact) + 4 * EPS)
        return np.linalg.norm(error)

    for path in ("host", "same"):
        plain = params[path]
        for part in (nearest[path], *pair[path], drawn[0][path]):
            assert type(part) is type(plain)
            assert (part.shape, part.dtype) == (plain.shape, plain.dtype)

        error = measure(nearest[path], HALF)
        assert isinstance(pair[path], jlora.reconstruction.CompensatedWeight)
        total = view(pair[path].high) + view(pair[path].low)
        assert measure(total, HALF**2) < error / 100

        each = np.stack([view(merged[path]) for merged in drawn])
        measure(each, 2 * HALF)
        # The error of one draw is √2 times the error of rounding to nearest. The mean
        # of 16 draws has a fourth of it.
        assert measure(each[:-1].mean(axis=0), 2 * HALF) < 0.6 * error
        np.testing.assert_array_equal(each[-1], each[0])

    np.testing.assert_array_equal(
        [pair["full"], drawn[0]["full"]], [nearest["full"]] * 2
    )
    # Each path has a key of its own.
    assert np.any(view(drawn[0]["host"]) != view(drawn[0]["same"]))


@pytest.mark.parametrize(
    ("layout", "shape", "kind", "see"),
    [
        ("oi", (8, 12), np.array, lambda w: w.T),
        ("ioo", (2, 12, 2, 4), jnp.array, lambda w: w.reshape(2, 12, 8)),
        ("iio", (3, 4, 8), np.array, lambda w: w.reshape(12, 8)),
        ("ibo", (12, 2, 8), np.array, lambda w: w.transpose(1, 0, 2)),
        ("iiio", (3, 2, 2, 8), jnp.array, lambda w: w.reshape(12, 8)),
        ("oiii", (2, 8, 3, 2, 2), jnp.array, lambda w: w.reshape(2, 8, 12).mT),
    ],
)
def test_every_layout_is_merged_into_its_stored_shape(layout, shape, kind, see):
    plain = kind(draw(1, *shape).astype(jnp.bfloat16))
    adapted = adapt({"w": plain}, layout=layout, scale=0.5)
    merged = jlora.merge(adapted)["w"]
    for array in (adapted["w"].base, merged):
        assert type(array) is type(plain)
        assert (array.shape, array.dtype) == (shape, plain.dtype)

    # The base is rounded once, and the sum once.
    np.testing.assert_allclose(
        view(merged), view(plain), atol=2 * HALF * np.abs(view(plain)).max()
    )
    factors = jlora.adaptation.get_factors(adapted)["w"]
    assert_close(multiply(factors), truncate(see(view(plain)), 3))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda t: jlora.adaptation.extract_delta(t, t | {"q": PARAMS["q"]}),
            ValueError,
            "`trained` must adapt the same weights as `initial`, got q in only one",
        ),
        (
            lambda t: jlora.adaptation.extract_delta(
                t, t | adapt({"q": ONE["q"].u}, 4)
            ),
            ValueError,
            "^q: ",
        ),
        (
            lambda t: jlora.adaptation.extract_delta(t, t, rank=1.5),
            TypeError,
            "`rank` must be an integer",
        ),
        (
            lambda t: jlora.adaptation.set_factors(t, {"x": ONE["q"]}),
            ValueError,
            "`factors` must be of adapted weights, got 'x' beside q, stack, torch",
        ),
        (
            lambda t: jlora.adaptation.set_factors(t, [ONE, TWO]),
            ValueError,
            "^q: `factors` must have a rank of at most 4 in all, the tree's, got 5",
        ),
        (
            lambda t: jlora.adaptation.set_factors(t, {"q": ONE["stack"]}),
            ValueError,
            r"`factors\['q'\].u` must have shape \(12, 4\) .*, got \(3, 12, 4\)",
        ),
        (
            lambda t: jlora.adaptation.set_factors(t, [ONE], scale=[1.0, 2.0]),
            ValueError,
            "`scale` must be a number or one for each of the adapters, got 2 for 1",
        ),
        (
            lambda t: jlora.adaptation.set_factors(t, ONE["q"]),
            TypeError,
            "`factors` must",
        ),
        (
            lambda t: jlora.adaptation.set_factors(
                adapt(PARAMS, trainable="core"), ONE
            ),
            ValueError,
            "^q: `adapted` must hold plain factors to be replaced, got trainable 'co",
        ),
        (
            lambda t: jlora.merge(t, rounding="stochastic"),
            TypeError,
            "`key` must be given for",
        ),
        (
            lambda t: jlora.merge(t, key=KEY),
            ValueError,
            "`key` must be left out with rounding='n",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call(adapt(PARAMS, rank=4, init="lora"))
