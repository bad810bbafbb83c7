"""Adapters taken out of a tree, written as deltas, swapped, merged, and looked at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

KEY = jax.random.key(0)
EPS = float(jnp.finfo(jnp.float32).eps)
HALF = float(jnp.finfo(jnp.bfloat16).eps) / 2  # one rounding to bfloat16
PATHS = ("q", "stack", "torch")


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


PARAMS = {
    "bias": draw(0, 8),
    "q": draw(1, 12, 8),
    "stack": draw(2, 3, 12, 8),
    "torch": draw(3, 8, 12),
}
U, S, VT = np.linalg.svd(np.asarray(PARAMS["q"], np.float64))


def adapt(params, rank=3, **settings):
    """Adapt all matrices of 12 inputs and 8 outputs; "torch" is stored outputs first."""
    rules = (
        [jlora.Rule("torch", rank, layout="oi", **settings)]
        if "torch" in params
        else []
    )
    plan = jlora.make_plan(params, [*rules, jlora.Rule(".", rank, **settings)])
    return jlora.adapt(params, plan, key=KEY)


def train(adapted):
    """Return the tree with noise on all that is trained."""
    trainable, frozen = jlora.split_trainable(adapted)
    moved = jax.tree.map(
        lambda leaf: leaf + 0.1 * draw(leaf.size, *leaf.shape), trainable
    )
    return jlora.join(moved, frozen)


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


def view(array, path=""):
    matrix = np.asarray(array, np.float64)
    return matrix.mT if path == "torch" else matrix


def get_change(w):
    """Return scale * u @ core @ v in float64."""
    core = np.eye(w.u.shape[-1]) if w.core is None else view(w.core)
    core = core[..., None] * np.eye(w.u.shape[-1]) if w.trainable == "s" else core
    return float(w.scale) * view(w.u) @ core @ view(w.v)


def multiply(factors):
    return view(factors.u) @ view(factors.v)


def cut(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u * s[..., None, :])[..., :rank] @ vt[..., :rank, :]


def close(found, expected):
    # Float32 sums of at most some dozen terms, of the size of the largest number.
    atol = 64 * EPS * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("part", ["v", "u", "uv", "core", "s"])
@pytest.mark.parametrize("init", ["pissa", "olora", "milora"])
def test_the_delta_on_the_plain_weights_is_the_trained_model(init, part):
    initial = adapt(PARAMS, init=init, trainable=part, scale=-2.0)
    trained = train(initial)
    merged, delta = (
        jlora.merge(trained),
        jlora.adaptation.extract_delta(initial, trained),
    )
    assert list(delta) == list(PATHS)
    for path, (u, v) in delta.items():
        assert (u.shape[-2:], v.shape[-2:]) == ((12, 6), (6, 8))
        close(
            multiply(jlora.adaptation.get_factors(trained)[path]),
            get_change(trained[path]),
        )
        change = get_change(trained[path]) - get_change(initial[path])
        assert np.abs(change).max() > 0.01
        close(multiply(delta[path]), change)
        close(view(PARAMS[path]) + view(change, path), view(merged[path]))
    swapped = jlora.adaptation.set_factors(adapt(PARAMS, 6, init="lora"), delta)
    jax.tree.map(close, jlora.merge(swapped), merged)


@pytest.mark.parametrize(("rank", "kept"), [(4, 4), (50, 10)])
def test_a_delta_cut_to_a_rank_is_the_best_of_that_rank(rank, kept):
    initial = adapt(
        {"stack": PARAMS["stack"]}, 5, trainable="uv"
    )  # the change has rank 8
    trained = train(initial)
    factors = jlora.adaptation.extract_delta(initial, trained, rank=rank)["stack"]
    assert factors.u.shape[-1] == factors.v.shape[-2] == kept
    close(
        multiply(factors),
        cut(get_change(trained["stack"]) - get_change(initial["stack"]), rank),
    )


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
            same = close if own else np.testing.assert_array_equal
            same(view(merged[path], path), view(PARAMS[path], path) + sum(own))
    assert len(traces) == 1


def test_merge_rounds_16_bits_as_it_is_told():
    base, delta = draw(1, 3, 12, 8).astype(jnp.bfloat16), ONE["stack"]
    slots = adapt(
        {"host": np.array(base), "full": draw(2, 12, 8), "same": base}, 4, init="lora"
    )
    adapted = jlora.adaptation.set_factors(
        slots, dict(host=delta, same=delta, full=ONE["q"]), scale=1e-3
    )
    exact = view(base) + 1e-3 * multiply(delta)
    nearest, pair = jlora.merge(adapted), jlora.merge(adapted, rounding="compensated")
    keys = jax.random.split(KEY, 16)
    drawn = [
        jlora.merge(adapted, rounding="stochastic", key=key) for key in (*keys, keys[0])
    ]

    def measure(found, bound):
        assert np.all(
            np.abs(view(found) - exact) <= (bound + 4 * EPS) * np.abs(exact) + 4 * EPS
        )
        return np.linalg.norm(view(found) - exact)

    for path, plain in (("host", np.array(base)), ("same", base)):
        for part in (nearest[path], *pair[path], drawn[0][path]):
            assert (type(part), part.shape, part.dtype) == (
                type(plain),
                plain.shape,
                plain.dtype,
            )
        error = measure(nearest[path], HALF)
        assert isinstance(pair[path], jlora.reconstruction.CompensatedWeight)
        assert (
            measure(view(pair[path].high) + view(pair[path].low), HALF**2) < error / 100
        )
        each = np.stack([view(merged[path]) for merged in drawn])
        measure(each, 2 * HALF)
        # One draw is √2 times as far off as the nearest, and the mean of 16 a fourth of that.
        assert measure(each[:-1].mean(axis=0), 2 * HALF) < 0.6 * error
        np.testing.assert_array_equal(each[-1], each[0])
    np.testing.assert_array_equal(
        [pair["full"], drawn[0]["full"]], [nearest["full"]] * 2
    )
    assert np.any(
        view(drawn[0]["host"]) != view(drawn[0]["same"])
    )  # a key for each path


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
def test_every_layout_is_merged_as_it_was_stored(layout, shape, kind, see):
    plain = kind(draw(1, *shape).astype(jnp.bfloat16))
    adapted = adapt({"w": plain}, layout=layout, scale=0.5)
    merged = jlora.merge(adapted)["w"]
    for array in (adapted["w"].base, merged):
        assert (type(array), array.shape, array.dtype) == (
            type(plain),
            shape,
            plain.dtype,
        )
    # The base is rounded, and the sum.
    np.testing.assert_allclose(
        view(merged), view(plain), atol=2 * HALF * np.abs(view(plain)).max()
    )
    close(
        multiply(jlora.adaptation.get_factors(adapted)["w"]), cut(see(view(plain)), 3)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_trained", [True, False])
def test_diagnosis_against_float64(dtype, is_trained):
    params = jax.tree.map(lambda w: w.astype(dtype), PARAMS)
    adapted = adapt(params, trainable="uv", scale=-2.0)
    adapted = train(adapted) if is_trained else adapted
    found = jlora.diagnose(params, adapted, key=KEY, num_directions=2)
    assert found.paths == ("q", "stack[0]", "stack[1]", "stack[2]", "torch")
    assert [line.split()[0] for line in str(found).splitlines()] == [
        "path",
        *found.paths,
    ]
    for i, path in enumerate(("q", "stack", "stack", "stack", "torch")):
        parts = (
            view(params[path], path),
            get_change(adapted[path]),
            view(adapted[path].base, path),
        )
        w, change, base = (part[i - 1] for part in parts) if path == "stack" else parts
        (old, s, _), (new, *_) = np.linalg.svd(w), np.linalg.svd(base + change)
        norm, left = np.linalg.norm(w), np.linalg.norm(w - change)
        cosines = old[:, :4].T @ new[:, :2]
        sine = np.linalg.norm(new[:, :2] - old[:, :2] @ cosines[:2], 2)
        expected = {
            "rank": 3,
            "energy_captured": 1 - (left / norm) ** 2,
            "residual": left / norm,
            "stable_rank": (norm / s[0]) ** 2,
            "change": np.linalg.norm(base + change - w) / norm,
            "angle": np.degrees(np.arctan2(sine, np.linalg.norm(cosines[:2], -2))),
            "num_intruders": np.sum(np.abs(cosines).max(axis=0) < 0.5),
        }
        for name, value in expected.items():
            # Some roundings; of singular vectors over their gaps, in degrees.
            atol = np.degrees(64 * EPS) if name == "angle" else 8 * EPS
            np.testing.assert_allclose(
                getattr(found, name)[i], value, rtol=1e-5, atol=atol
            )
        if not is_trained:
            eps = float(jnp.finfo(dtype).eps) + 8 * EPS
            assert 0 < found.change[i] <= eps
            # Wedin: a subspace turns by the change over the gap.
            assert found.angle[i] <= np.degrees(eps * norm / (s[1] - s[2]))
            assert found.num_intruders[i] == 0


def test_planted_intruders_and_rotations_are_found():
    slots = adapt({"q": PARAMS["q"]}, init="lora")

    def diagnose(u, v):
        swapped = jlora.adaptation.set_factors(
            slots, {"q": jlora.Factors(jnp.float32(u), jnp.float32(v))}
        )
        found = jlora.diagnose(PARAMS, swapped, key=KEY, num_directions=2)
        return found.angle[0], found.num_intruders[0]

    # Left directions that the weight has not, or has among its first four.
    for lefts, count in (([8], 1), ([9, 11], 2), ([0], 0), ([3], 0), ([3, 8], 1)):
        assert diagnose(U[:, lefts], 10 * S[0] * VT[: -1 - len(lefts) : -1])[1] == count
    for angle in (0.01, 1.0, 30.0, 75.0, 90.0):
        turned = (
            np.cos(np.radians(angle)) * U[:, 1] + np.sin(np.radians(angle)) * U[:, 9]
        )
        found, count = diagnose((turned - U[:, 1])[:, None], S[1] * VT[1:2])
        # Rounding turns singular vectors by itself over the gap.
        np.testing.assert_allclose(
            found, angle, atol=np.degrees(16 * EPS * S[0] / (S[1] - S[2]))
        )
        assert count == (angle > 60)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda t: jlora.adaptation.extract_delta(t, t | {"q": PARAMS["q"]}),
            ValueError,
            "`trained` must adapt the weights that `initial` does, got q in one alone",
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
            "^q: `adapted` must hold plain factors to be swapped, got part 'core'",
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
        (
            lambda t: jlora.diagnose(PARAMS, t, key=0),
            TypeError,
            "`key` must be a typed PRNG key",
        ),
        (
            lambda t: jlora.diagnose(PARAMS, PARAMS, key=KEY),
            ValueError,
            "`adapted` must hold an",
        ),
        (
            lambda t: jlora.diagnose({}, t, key=KEY),
            ValueError,
            r"^q: `params` must hold this weight in shape \(12, 8\), got none",
        ),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call(adapt(PARAMS, rank=4, init="lora"))
