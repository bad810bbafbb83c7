"""Initializers and quantisers against their formulas in float64."""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.initializers.lookup import list_names

KEY = jax.random.key(0)
UNMOVED = ("lora", "orthogonal", "lora_xs", "eva", "difference")  # the base is w
M, N, R = 20, 14, 4  # of nearly every matrix here, so that few programs compile
QUANTIZED = ("loftq", "qpissa", "qera")
KEEPING = [init for init in list_names() if init not in (*QUANTIZED, "difference")]
WIDE = jax.dtypes.canonicalize_dtype(np.float64)  # float64 in the run that has it


def draw(seed, *shape):
    """Return float64 matrices with singular values 2, 1.6, 1.28, ..."""
    u, s, vt = np.linalg.svd(np.random.default_rng(seed).standard_normal(shape), False)
    return (u * (2 * 0.8 ** np.arange(s.shape[-1]))) @ vt


# For this seed no entry is near the middle of two levels in loftq and qpissa.
W = draw(28, 3, M, N)
FINE_TUNED = W + draw(1, 3, M, N)
GRADIENT, ACTIVATIONS = draw(2, 3, M, N), draw(3, 3, 30, M)
INPUTS = draw(4, 3, 10, M)  # fewer rows than M: their second moments are singular
DATA = {
    "corda": INPUTS.mT @ INPUTS,
    "qera": INPUTS.mT @ INPUTS,
    "eva": ACTIVATIONS,
    "lora_ga": GRADIENT,
    "difference": FINE_TUNED,
}


def adapt(w, init, data=None, *, rank=R, **settings):
    plan = jlora.make_plan({"w": w}, jlora.Rule("w", rank, init=init, **settings))
    return jlora.adapt(
        {"w": w}, plan, key=KEY, data=None if data is None else {"w": data}
    )["w"]


def to_float32(a):
    return None if a is None else jnp.asarray(a, jnp.float32)


def to_float64(*arrays):
    wide = tuple(np.asarray(a, np.float64) for a in arrays)
    return wide[0] if len(wide) == 1 else wide


def find_product(found):
    """Return scale * u @ v in float64, with the core in between if there is one."""
    u, v = to_float64(found.u, found.v)
    if found.core is not None:
        core = to_float64(found.core)
        v = core[..., None] * v if found.trainable == "s" else core @ v
    return float(found.scale) * u @ v


def truncate(a, rank):
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def round_nf4(w):
    return to_float64(jax.jit(jlora.quantization.quantize_nf4)(to_float32(w)))


def orient(vectors, found):
    """Return the columns with the signs of the found ones."""
    return vectors * np.sign(
        np.sum(vectors * to_float64(found), axis=-2, keepdims=True)
    )


def find_formula(init, found):
    """Return (base, scale * u @ v) for W by the formula of the method's paper."""
    if init == "difference":
        return W, truncate(FINE_TUNED - W, R)
    if init == "qpissa":  # one round
        return round_nf4(W - truncate(W, R)), truncate(W, R)
    if init == "loftq":  # two rounds
        base = round_nf4(W - truncate(W - round_nf4(W), R))
        return base, truncate(W - base, R)

    if init == "qera":
        error = W - round_nf4(W)
        z = np.linalg.svd(INPUTS @ error)[2][..., :R, :].mT
        return W - error, error @ z @ z.mT

    product = find_formula_of_product(init, found)
    return W - product, product


def find_formula_of_product(init, found):
    """Return scale * u @ v for an initializer whose base is W - scale * u @ v."""
    product = np.zeros_like(W)

    if init in ("pissa", "svf"):
        product = truncate(W, R)
    elif init == "milora":
        product = W - truncate(W, N - R)
    elif init == "olora":
        q, r = np.linalg.qr(W.mT)
        product = float(found.scale) * (q[..., :R] @ r[..., :R, :]).mT
    elif init == "corda":
        z = np.linalg.svd(INPUTS @ W)[2][..., :R, :].mT
        product = W @ z @ z.mT
    elif init == "lora_ga":
        u, _, vt = np.linalg.svd(GRADIENT)
        u = orient(u[..., :R], found.u)
        v = orient(vt.mT[..., R : 2 * R], found.v.mT)
        product = float(found.scale) * N**0.5 / 16 * u @ v.mT

    return product


# The order of the axes of W in each layout.
LAYOUTS = {"io": (0, 1, 2), "oi": (0, 2, 1), "iob": (1, 2, 0)}


@pytest.mark.parametrize(
    ("init", "layout", "scale"),
    [
        *((init, "io", 0.5) for init in list_names()),
        *((init, "iob", -2.0) for init in list_names()),
        *((init, "oi", 1.0) for init in DATA),
    ],
)
def test_base_and_product_equal_the_formula(init, layout, scale):
    order, data = LAYOUTS[layout], DATA.get(init)
    inverse = np.argsort(order)
    # Data with the shape of the weight are stored in the weight's layout.
    if init in ("lora_ga", "difference"):
        data = data.transpose(order)
    method = jlora.initializers.loftq(num_rounds=2) if init == "loftq" else init

    initialize = functools.partial(adapt, init=method, layout=layout, scale=scale)
    initialize = jax.jit(initialize) if layout == "iob" else initialize
    found = initialize(to_float32(W.transpose(order)), data=to_float32(data))
    base, product = find_formula(init, found)

    # The tolerance is rounding of float32 divided by the gaps of the singular values.
    # No gap is below 0.05.
    np.testing.assert_allclose(find_product(found), product, atol=1e-5)
    np.testing.assert_allclose(found.base.transpose(inverse), base, atol=1e-5)
    merged = jlora.merge({"w": found})["w"].transpose(inverse)
    np.testing.assert_allclose(merged, base + product, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.25, -2.0])
@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__
)
@pytest.mark.parametrize("init", KEEPING)
def test_adapt_keeps_the_weights_and_merge_restores_them(init, dtype, scale):
    w = jnp.asarray(W, dtype)
    params = {
        "layers": [{"q": w[0], "bias": w[0, 0]}, {"q": w[1]}],
        "stack": w,
        "counter": jnp.arange(3, dtype=jnp.int32),
    }
    x = jnp.asarray(DATA.get(init, 0), dtype)
    data = {"layers": [{"q": x[0]}, {"q": x[1]}], "stack": x} if init in DATA else None

    plan = jlora.make_plan(params, jlora.Rule("q|stack", R, init=init, scale=scale))
    adapted = jlora.adapt(params, plan, key=KEY, data=data)
    merged = jlora.merge(adapted)
    assert jax.eval_shape(lambda tree: tree, merged) == jax.eval_shape(
        lambda tree: tree, params
    )
    assert adapted["counter"] is params["counter"]
    assert adapted["layers"][0]["bias"] is params["layers"][0]["bias"]

    for take in (lambda tree: tree["layers"][1]["q"], lambda tree: tree["stack"]):
        old, found, new = take(params), take(adapted), take(merged)
        assert (found.base is not old) == (init not in UNMOVED)
        old, base, new, u, v = to_float64(old, found.base, new, *found.factors)

        # The base and the sum are rounded once, to half an eps. The product has the
        # error of float32.
        rounding = float(jnp.finfo(dtype).eps) / 2 * (abs(base) + abs(new)) * 1.01
        assert np.all(
            abs(new - old) <= rounding + 1e-6 * abs(scale) * (abs(u) @ abs(v))
        )


@pytest.mark.parametrize(("init", "scale"), [("svf", -2.0), ("lora_xs", 0.25)])
def test_singular_values_are_the_core_or_a_part_of_v(init, scale):
    found = adapt(to_float32(W), init, scale=scale)
    u, s, vt = np.linalg.svd(W, full_matrices=False)
    u, s, v = u[..., :R], s[:, :R], vt[:, :R].mT
    np.testing.assert_allclose(found.u, orient(u, found.u), atol=1e-5)
    # Columns of u and v change their signs together.
    v = v * np.sign(np.sum(u * to_float64(found.u), axis=-2))[:, None]
    v = v if init == "svf" else v * s[:, None]
    np.testing.assert_allclose(found.v.mT, v, atol=1e-5)
    core = s / scale if init == "svf" else np.zeros((3, R, R))
    np.testing.assert_allclose(found.core, core, atol=1e-5)


def test_a_core_of_zeros_has_the_gradient_of_its_product():
    w, x = to_float32(W[0]), to_float32(INPUTS[0])
    trainable, frozen = jlora.split_trainable({"w": adapt(w, "lora_xs", scale=0.25)})
    target = to_float32(draw(5, 10, N))

    def loss(trainable):
        return jnp.sum(jlora.linear(x, jlora.join(trainable, frozen)["w"]) * target)

    (found,) = jax.tree.leaves(jax.grad(loss)(trainable))
    u, v, x, target = to_float64(frozen["w"].u, frozen["w"].v, x, target)
    expected = 0.25 * (x @ u).T @ target @ v.T
    assert np.max(abs(expected)) > 0.01
    # Sums of ten float32 values.
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_core_that_the_factors_do_not_need_is_the_identity():
    core = adapt(to_float32(W), "pissa", trainable="core").core
    np.testing.assert_array_equal(core, np.tile(np.eye(R), (3, 1, 1)))
    np.testing.assert_array_equal(
        adapt(to_float32(W), "pissa", trainable="s").core, np.ones((3, R))
    )


# Singular second moments, and regular ones.
@pytest.mark.parametrize("num_inputs", [10, 50])
def test_corda_leaves_the_least_error_of_the_outputs(num_inputs):
    w, x = W[0], draw(6, num_inputs, M)
    product = find_product(adapt(to_float32(w), "corda", to_float32(7 * x.T @ x)))
    best = np.linalg.norm(np.linalg.svd(x @ w)[1][R:])
    found = np.linalg.norm(x @ (w - product))
    # The excess is of second order in float32's rounding.
    np.testing.assert_allclose(found, best, rtol=1e-5)
    assert found < 0.9 * np.linalg.norm(x @ (w - truncate(w, R)))
    unit = find_product(adapt(to_float32(w), "corda", jnp.eye(M, dtype=jnp.float32)))
    np.testing.assert_allclose(unit, truncate(w, R), atol=1e-5)


def test_qera_leaves_the_least_error_of_the_outputs():
    w, x = W[0], draw(6, 50, M)
    moments = to_float32(x.T @ x)
    errors = {}
    for init in ("qera", "loftq"):
        found = adapt(to_float32(w), init, moments if init == "qera" else None)
        merged = jlora.merge({"w": found})["w"]
        errors[init] = np.linalg.norm(x @ (w - to_float64(merged)))
    best = np.linalg.norm(np.linalg.svd(x @ (w - round_nf4(w)))[1][R:])
    np.testing.assert_allclose(errors["qera"], best, rtol=1e-4)
    assert errors["qera"] < errors["loftq"]


def test_more_rounds_of_qera_keep_the_important_part_out_of_the_base():
    """Two rounds: the base is Q(w − u v) for the best factors of w itself."""
    w, x = W[0], draw(6, 50, M)
    moments = to_float32(x.T @ x)
    errors, bases = [], []
    for num_rounds in (1, 2, 8):
        init = jlora.initializers.qera(num_rounds=num_rounds)
        found = adapt(to_float32(w), init, moments)
        bases.append(to_float64(found.base))
        errors.append(
            np.linalg.norm(x @ (w - to_float64(jlora.merge({"w": found})["w"])))
        )
    assert errors[2] < errors[1] < errors[0]

    left, s, right = np.linalg.svd(x @ w, full_matrices=False)
    best = np.linalg.pinv(x) @ (left[:, :R] * s[:R]) @ right[:R]
    expected = round_nf4(w - best)
    # Few codes at a bound differ.
    assert np.mean(abs(bases[1] - expected) > 1e-4 * abs(expected).max()) < 0.02


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_directions_of_data_are_its_singular_vectors_in_order(init):
    found = adapt(to_float32(W), init, to_float32(DATA[init]), scale=-2.0)
    u, _, vt = np.linalg.svd(DATA[init])
    if init == "eva":
        u, v, length = vt.mT[..., :R], np.zeros((3, R, N)), 1
    else:
        length = N**0.25 / 4  # the length of LoRA-GA's columns with γ = 16
        u, v = u[..., :R], length * orient(vt.mT[..., R : 2 * R], found.v.mT).mT
    np.testing.assert_allclose(found.u, length * orient(u, found.u), atol=1e-5)
    np.testing.assert_allclose(found.v, v, atol=1e-5)


def test_lora_is_uniform_and_differs_between_matrices():
    found = adapt(to_float32(W), "lora")
    np.testing.assert_array_equal(found.v, 0)
    sizes = np.sort(abs(to_float64(found.u)).ravel()) * M**0.5
    # The empirical distribution of 240 draws between 0 and 1 is within 0.11 with a
    # probability of 99 %.
    np.testing.assert_allclose(sizes, (np.arange(240) + 0.5) / 240, atol=0.11)
    assert not np.any(found.u[0] == found.u[1])
    jitted = jax.jit(functools.partial(adapt, init="lora"))(to_float32(W))
    np.testing.assert_allclose(jitted.u, found.u, atol=1e-6)


@pytest.mark.parametrize(
    ("init", "quantize"),
    [
        ("loftq", jlora.quantization.quantize_nf4),
        ("qpissa", jlora.quantization.quantize_nf4),
        ("loftq", jlora.quantization.quantize_int8),
    ],
)
def test_rank_and_rounds_reduce_the_error_of_a_quantised_base(init, quantize):
    settings, errors = [(R, 1), (8, 1), (R, 5)], {}

    for rank, num_rounds in settings:
        method = getattr(jlora.initializers, init)(num_rounds=num_rounds)
        found = adapt(to_float32(W), method, rank=rank, quantize=quantize)
        np.testing.assert_allclose(jax.jit(quantize)(found.base), found.base, rtol=1e-6)
        difference = W - to_float64(found.base) - find_product(found)
        errors[rank, num_rounds] = np.linalg.norm(difference, axis=(-2, -1))

    plain = np.linalg.norm(
        W - to_float64(jax.jit(quantize)(to_float32(W))), axis=(-2, -1)
    )
    assert np.all(errors[R, 1] < plain)
    assert np.all(errors[R, 1] > errors[8, 1])
    # More rounds help on average, by a tenth and more. They may not help each matrix,
    # since the levels move with the largest entry of a block.
    assert np.mean(errors[R, 5]) < np.mean(errors[R, 1])


@pytest.mark.parametrize(
    ("init", "where"),
    [*((init, "w") for init in list_names()), *((init, "data") for init in DATA)],
)
def test_nan_is_refused_with_the_path(init, where):
    w, data = W[0].copy(), DATA[init][0].copy() if init in DATA else None
    (w if where == "w" else data)[-1, -2] = np.nan
    named = "w" if where == "w" else r"data\['w'\]"
    with pytest.raises(
        ValueError, match=f"`{named}` must be finite, got 1 NaN or Inf among"
    ):
        adapt(to_float32(w), init, to_float32(data))


@pytest.mark.parametrize(
    ("dtype", "data_dtype"), [(np.float32, WIDE), (WIDE, np.float32)]
)
@pytest.mark.parametrize("init", list(DATA))
def test_data_of_another_dtype_do_not_change_the_dtype_of_the_factors(
    init, dtype, data_dtype
):
    found = adapt(
        jnp.asarray(W[0], dtype), init, jnp.asarray(DATA[init][0], data_dtype)
    )
    assert {part.dtype for part in (found.base, *found.factors, found.scale)} == {
        jnp.dtype(dtype)
    }
    target = W + truncate(FINE_TUNED - W, R) if init == "difference" else W
    if init in QUANTIZED:
        target = sum(find_formula(init, found))
    np.testing.assert_allclose(
        to_float64(found.base) + find_product(found), target[0], atol=1e-5
    )


def find_nf4_levels():
    """Return QLoRA's quantiles of the normal distribution: 8 above zero, 7 below."""
    outermost, invert = 1 - (1 / 30 + 1 / 32) / 2, statistics.NormalDist().inv_cdf
    above = [invert(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    below = [-invert(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    return np.array(sorted([*below, 0.0, *above])) / above[0]


QUANTIZERS = {
    "int8": (jlora.quantization.quantize_int8, np.arange(-127, 128) / 127, 1 / 254),
    "nf4": (jlora.quantization.quantize_nf4, find_nf4_levels(), 0.152),
}


# The axis of length 20 is no multiple of 8.
@pytest.mark.parametrize("settings", [{}, {"block_size": 8}], ids=str)
@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_each_entry_is_rounded_to_the_nearest_level_of_its_block(name, settings):
    quantize, levels, most = QUANTIZERS[name]
    quantize = jax.jit(functools.partial(quantize, **settings))
    found, size = quantize(to_float32(W)), settings.get("block_size", M)

    for first in range(0, M, size):
        block = slice(first, first + size)
        old, new = W[:, block], to_float64(found)[:, block]
        error = abs(new - old)
        largest = np.max(abs(old), axis=1, keepdims=True)
        nearest = np.min(abs(old[..., None] - levels * largest[..., None]), axis=-1)
        np.testing.assert_allclose(error, nearest, atol=1e-6)  # rounding of float32
        # The bound of the quantiser's docstring.
        assert np.all(error <= most * largest * (1 + 1e-4))

    np.testing.assert_allclose(quantize(found), found, rtol=1e-6)
    halved = quantize(jnp.asarray(W, jnp.bfloat16))
    assert halved.dtype == jnp.bfloat16
    # Two roundings to bfloat16.
    np.testing.assert_allclose(*to_float64(quantize(halved), halved), rtol=2**-7)


@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_a_block_that_is_zero_or_not_finite_changes_no_other(name):
    quantize = jax.jit(functools.partial(QUANTIZERS[name][0], block_size=8))
    w, expected = W.copy(), to_float64(quantize(to_float32(W))).copy()
    w[0, 9, 2], w[1, 19, 3], w[2, :8, 4] = np.nan, np.inf, 0
    expected[0, 8:16, 2], expected[1, 16:, 3], expected[2, :8, 4] = np.nan, np.nan, 0
    np.testing.assert_array_equal(quantize(to_float32(w)), expected)


@pytest.mark.parametrize(
    "quantize", [jlora.quantization.quantize_int8, jlora.quantization.quantize_nf4]
)
def test_quantisers_refuse_integers_vectors_and_empty_blocks(quantize):
    with pytest.raises(
        TypeError, match="`w` must have a real floating dtype, got int32"
    ):
        quantize(jnp.ones((3, 2), jnp.int32))
    with pytest.raises(
        ValueError, match=r"`w` must have at least 2 axes, got shape \(3,\)"
    ):
        quantize(jnp.ones(3, jnp.float32))
    with pytest.raises(ValueError, match="`block_size` must be at least 1, got 0"):
        quantize(jnp.ones((3, 2), jnp.float32), 0)
