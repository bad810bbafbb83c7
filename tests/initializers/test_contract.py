"""The contract that every initializer keeps, including a user's own.

A new initializer of jlora gets one line in `DATA` if it needs data, and one in `MOVING`
if it changes the weight. The list of names is read from the package.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.initializers import InitialFactors, Initializer
from jlora.initializers.lookup import as_initializer, list_names

M, N, RANK = 12, 10, 4
KEY = jax.random.key(0)

# The data of one matrix, for each initializer that needs data.
DATA = {
    "corda": lambda rng: np.cov(rng.standard_normal((M, 40))),
    "qera": lambda rng: np.cov(rng.standard_normal((M, 40))),
    "eva": lambda rng: rng.standard_normal((20, M)),
    "lora_ga": lambda rng: rng.standard_normal((M, N)),
    "difference": lambda rng: rng.standard_normal((M, N)),
}
# The bound on |base + scale * u @ v - w|, relative to w: the error of NF4, or the
# fine-tuned weight of `difference`. The other initializers keep w unchanged.
MOVING = {"loftq": 0.15, "qpissa": 0.15, "qera": 0.15, "difference": 2.0}


def keep_rows(w, rank, *, scale, key, data=None):
    """A user's own initializer: u selects the first rows, v holds them."""
    del key, data
    v = w[..., :rank, :].astype(scale.dtype) / scale
    u = jnp.broadcast_to(
        jnp.eye(w.shape[-2], rank, dtype=scale.dtype), (*w.shape[:-1], rank)
    )
    return InitialFactors.from_residual(w, jlora.Factors(u, v), scale)


@dataclasses.dataclass(frozen=True)
class ScaledRows(Initializer):
    """A user's own initializer with a setting, data of one axis, and a limit."""

    power: float = 1.0

    data_meaning = "a weight for each input, [..., m]"
    trainable = ("uv", "v")

    def data_shape(self, m, n):
        return (m,)

    def max_rank(self, m, n, data=None):
        return min(m, n) // 2

    def __call__(self, w, rank, *, scale, key, data=None):
        rows = keep_rows(w, rank, scale=scale, key=key).factors
        weights = (data[..., :rank] ** self.power).astype(scale.dtype)
        u = rows.u / weights[..., None, :]
        factors = jlora.Factors(u, rows.v * weights[..., None])
        return InitialFactors.from_residual(w, factors, scale)


CASES = {name: as_initializer(name) for name in list_names()}
CASES |= {"keep_rows": keep_rows, "ScaledRows": ScaledRows(0.5)}
DATA["ScaledRows"] = lambda rng: rng.uniform(1, 2, M)

DTYPES = [jnp.float32, jnp.bfloat16]
if jax.config.jax_enable_x64:
    DTYPES.append(jnp.float64)

COMPUTE = {
    dtype: jnp.float64 if dtype == jnp.float64 else jnp.float32 for dtype in DTYPES
}


def make_problem(name, batch, dtype):
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.standard_normal((*batch, M, N)), dtype)
    if name not in DATA:
        return w, None

    own = np.stack([DATA[name](rng) for _ in range(int(np.prod(batch)))])
    data = own.reshape(*batch, *own.shape[1:])
    return w, {"w": jnp.asarray(data, COMPUTE[dtype])}


def adapt(w, init, data, scale=1.0, rank=RANK):
    plan = jlora.make_plan({"w": w}, jlora.Rule("w", rank, init=init, scale=scale))
    return jlora.adapt({"w": w}, plan, key=KEY, data=data)["w"]


@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", CASES)
def test_initial_factors_leave_the_output_unchanged(name, dtype, batch, scale):
    w, data = make_problem(name, batch, dtype)
    adapted = adapt(w, CASES[name], data, scale)

    # Shapes and dtypes: factors in the compute dtype, the base in the weight's.
    assert adapted.u.shape == (*batch, M, RANK)
    assert adapted.v.shape == (*batch, RANK, N)
    assert {adapted.u.dtype, adapted.v.dtype} == {jnp.dtype(COMPUTE[dtype])}
    assert adapted.base.dtype == w.dtype
    assert adapted.base.shape == w.shape

    # The base is rounded once, to half an eps of entries of up to about 4. The product
    # is summed in float32 at least.
    merged = np.asarray(jlora.merge({"w": adapted})["w"], np.float64)
    change = np.linalg.norm(merged - np.asarray(w, np.float64)) / np.linalg.norm(merged)
    eps = float(jnp.finfo(dtype).eps)
    assert change < MOVING.get(name, 4 * eps)


@pytest.mark.parametrize("name", CASES)
def test_jit_gives_the_same_factors(name):
    w, data = make_problem(name, (2,), jnp.float32)
    eager = adapt(w, CASES[name], data)
    traced = jax.jit(lambda w, data: adapt(w, CASES[name], data))(w, data)
    # Two programs round differently. Gaps between singular values are about 0.3 here,
    # so vectors agree to about ten times the rounding.
    for one, other in zip(jax.tree.leaves(eager), jax.tree.leaves(traced), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_same_key_gives_same_bits(name):
    w, data = make_problem(name, (), jnp.float32)
    twice = [adapt(w, CASES[name], data) for _ in range(2)]
    for one, other in zip(*map(jax.tree.leaves, twice), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", CASES)
def test_trainable_arrays_have_a_gradient(name):
    w, data = make_problem(name, (), jnp.float32)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((30, M)), jnp.float32)
    for trainable in as_initializer(CASES[name]).trainable:
        rule = jlora.Rule("w", RANK, init=CASES[name], trainable=trainable)
        plan = jlora.make_plan({"w": w}, rule)
        adapted = jlora.adapt({"w": w}, plan, key=KEY, data=data)
        moved, frozen = jlora.split_trainable(adapted)

        def loss(moved, frozen=frozen):
            return jnp.sum(jnp.sin(x @ jlora.join(moved, frozen)["w"]))

        largest = [jnp.max(abs(g)) for g in jax.tree.leaves(jax.grad(loss)(moved))]
        assert max(largest) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_label_and_hash_tell_settings_apart(name):
    init = as_initializer(CASES[name])
    assert hash(init) == hash(as_initializer(CASES[name]))
    assert "0x" not in init.label
    rule = jlora.Rule("w", RANK, init=CASES[name])
    assert init.label in str(jlora.make_plan({"w": jnp.ones((M, N))}, rule))


def test_a_name_is_short_for_the_call():
    for name in list_names():
        call = getattr(jlora.initializers, name)()
        assert jlora.Rule("w", 2, init=name) == jlora.Rule("w", 2, init=call)
    other = jlora.initializers.loftq(num_rounds=5)
    assert jlora.Rule("w", 2, init="loftq") != jlora.Rule("w", 2, init=other)


def test_a_foreign_initializer_declares_data_rank_and_trainable():
    w, data = make_problem("ScaledRows", (2,), jnp.float32)
    rule = jlora.Rule("w", 2, init=ScaledRows())
    assert rule.trainable == "uv"

    plan = jlora.make_plan({"w": w}, rule)
    with pytest.raises(ValueError, match=r"^w: `data` must hold an array at this path"):
        jlora.adapt({"w": w}, plan, key=KEY)
    with pytest.raises(ValueError, match=r"`data\['w'\]` must have shape \(2, 12\)"):
        jlora.adapt({"w": w}, plan, key=KEY, data={"w": data["w"][:, :3]})

    with pytest.raises(ValueError, match=r"^w: `rank` must be at most 5 for init='Sca"):
        jlora.make_plan({"w": w}, jlora.Rule("w", 6, init=ScaledRows()))
    with pytest.raises(ValueError, match=r"`trainable \(with init='ScaledRows'\)`"):
        jlora.Rule("w", 2, init=ScaledRows(), trainable="u")


def return_nothing(w, rank, *, scale, key, data=None):
    return None


def return_transposed(w, rank, *, scale, key, data=None):
    u, v = keep_rows(w, rank, scale=scale, key=key).factors
    return InitialFactors(None, jlora.Factors(v.mT, u.mT))


class Unhashable:
    __hash__ = None

    def __call__(self, w, rank, *, scale, key, data=None):
        return keep_rows(w, rank, scale=scale, key=key)


@pytest.mark.parametrize(
    ("init", "error", "text"),
    [
        (return_nothing, TypeError, "`init` must return InitialFactors.*got NoneType"),
        (return_transposed, ValueError, r"`factors.u` must have shape \(12, 4\)"),
        (Unhashable(), TypeError, "`init` must be hashable, got a Unhashable"),
        (3, TypeError, "`init` must be a name, an initializer or a function, got 3"),
        (ScaledRows, TypeError, "`init` must be a name, an initializer or a function"),
        ("pisa", ValueError, "`init` must be one of .*'pissa'.* got 'pisa'"),
    ],
)
def test_refusals(init, error, text):
    w = jnp.ones((M, N), jnp.float32)
    with pytest.raises(error, match=text):
        adapt(w, init, None)


def test_nan_is_found_in_rows_that_the_initializer_ignores():
    w = jnp.ones((M, N), jnp.float32).at[M - 1, 0].set(jnp.nan)  # not among the rows
    with pytest.raises(ValueError, match="`w` must be finite, got 1 NaN or Inf among"):
        adapt(w, keep_rows, None)
