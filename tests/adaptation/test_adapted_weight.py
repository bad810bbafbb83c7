"""An adapted weight in user code: it prints, multiplies, and refuses the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

X = jnp.ones((2, 4), jnp.float32)


def make_weight(**settings):
    params = {"w": jnp.arange(12, dtype=jnp.float32).reshape(4, 3)}
    plan = jlora.make_plan(params, jlora.Rule("w", 2, **settings))
    return jlora.adapt(params, plan, key=jax.random.key(0))["w"]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, 'float32[4,3] = base + scale · u[4,2] @ v[2,3], trainable="v"'),
        (
            {"init": "svf"},
            'float32[4,3] = base + scale · u[4,2] @ diag(s) @ v[2,3], trainable="s"',
        ),
        (
            {"trainable": "core", "layout": "oi"},
            "float32[4,3] = base + scale · u[3,2] @ core @ v[2,4], "
            'trainable="core", layout="oi"',
        ),
        (
            {"init": jlora.initializers.pissa(residual=False), "num_columns": 1},
            'float32[4,3] = scale · u[4,2] @ v[2,3], trainable="v", num_columns=1',
        ),
    ],
)
def test_it_prints_as_one_line(settings, text):
    assert repr(make_weight(**settings)) == text


def test_a_half_of_a_split_tree_and_abstract_arrays_print_too():
    halves = jlora.split_trainable({"w": make_weight(num_columns=1)})
    assert [repr(half["w"]).split(" = ")[0] for half in halves] == [
        "float32[...]",
        "float32[4,2]",
    ]
    abstract = jax.eval_shape(lambda w: w, make_weight())
    assert repr(abstract) == repr(make_weight())


def test_products_from_the_left_are_linear():
    w = make_weight()
    expected = jlora.linear(X, w)
    np.testing.assert_array_equal(X @ w, expected)
    np.testing.assert_array_equal(np.asarray(X) @ w, expected)
    np.testing.assert_array_equal(np.matmul(np.asarray(X), w), expected)
    # Two programs round sums of four values of up to 11 differently.
    np.testing.assert_allclose(jax.jit(lambda x, w: x @ w)(X, w), expected, rtol=1e-6)
    gradient = jax.grad(lambda w: jnp.sum(X @ w))(w)
    assert gradient.v.shape == w.v.shape


REFUSED = {
    "matmul": lambda w: jnp.matmul(X, w),
    "einsum": lambda w: jnp.einsum("ij,jk->ik", X, w),
    "sum": lambda w: jnp.sum(w),
    "exp": lambda w: jnp.exp(w),
    "concatenate": lambda w: jnp.concatenate([X, w]),
    "asarray": lambda w: jnp.asarray(w),
    "reshape": lambda w: jnp.reshape(w, -1),
    "norm": lambda w: jnp.linalg.norm(w),
    "np sum": lambda w: np.sum(w),
    "np array": lambda w: np.asarray(w),
    "np product from the right": lambda w: np.matmul(w, np.ones(3)),
    "w @ x": lambda w: w @ X.T,
    "w * 2": lambda w: w * 2,
    "2 * w": lambda w: 2 * w,
    "x * w": lambda w: X * w,
    "w + x": lambda w: w + X,
    "x - w": lambda w: X - w,
    "w / 2": lambda w: w / 2,
    "-w": lambda w: -w,
    "w[0]": lambda w: w[0],
    "w.T": lambda w: w.T,
    "w.mT": lambda w: w.mT,
    "astype": lambda w: w.astype(jnp.bfloat16),
    "method reshape": lambda w: w.reshape(-1),
    "method sum": lambda w: w.sum(),
    "iteration": lambda w: list(w),
    "float": lambda w: float(w),
}


@pytest.mark.parametrize("is_jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", REFUSED)
def test_every_other_operation_names_lift(name, is_jitted):
    call = jax.jit(REFUSED[name]) if is_jitted else REFUSED[name]
    text = "^`w` must be used as `x @ w`, got .* on an AdaptedWeight.* jlora.lift"
    with pytest.raises(TypeError, match=text) as found:
        call(make_weight())
    assert "\n" not in str(found.value)


def test_fit_trains_an_ordinary_loss():
    params = {"w": make_weight(trainable="uv"), "b": jnp.zeros(3)}
    target = jax.random.normal(jax.random.key(1), (4, 3))

    def loss(params, x):
        return jnp.mean((x @ params["w"] + params["b"][None] - x @ target) ** 2)

    batches = [jnp.eye(4)] * 200
    with jax.numpy_dtype_promotion("standard"):
        result = jlora.fit(loss, params, optax.adam(0.05), batches, progress=False)
    # Rank 2 of 3: the final loss is due to the third singular value of the difference.
    assert result.losses[-1] < 0.1 * result.losses[0]


def test_read_base_gives_the_stored_layout_and_dtype():
    w = make_weight(layout="oi", init="lora")
    assert jlora.adaptation.read_base(w) is w.base
    assert jlora.adaptation.read_base(w, jnp.bfloat16).dtype == jnp.bfloat16
