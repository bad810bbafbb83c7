"""`adapt` of one model in several processes."""

import jax
import numpy as np
import pytest

import jlora
from tests.helpers.processes import run_processes, run_well

START = """
auto = (jax.sharding.AxisType.Auto,)
mesh = jax.make_mesh((4,), ("x",), axis_types=auto)

def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

def place(array, *entries):
    sharding = jax.NamedSharding(mesh, jax.P(*entries))
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

params = {
    "layers": place(draw(0, 4, 24, 16), "x"),
    "sharded": place(draw(1, 24, 16), "x"),
}
plan = jlora.make_plan(params, jlora.Rule(".", 2))
"""
FINISH = """
adapted = jlora.adapt(params, plan, key=jax.random.key(0))
whole = jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(mesh, jax.P()))
for path, w in adapted.items():
    u, v = whole((w.u, w.v))
    results[path] = np.asarray(u @ v).tolist()
"""


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_every_process_ends_with_the_result_of_one_device():
    params = {"layers": draw(0, 4, 24, 16), "sharded": draw(1, 24, 16)}
    plan = jlora.make_plan(params, jlora.Rule(".", 2))
    expected = jlora.adapt(params, plan, key=jax.random.key(0))
    found = run_well(START + FINISH, 2)
    assert found[0] == found[1]
    for path, w in expected.items():
        # Products of two numbers, and the same factors.
        np.testing.assert_allclose(found[0][path], w.u @ w.v, atol=1e-5)


@pytest.mark.parametrize(
    ("difference", "name"),
    [
        ("plan = jlora.make_plan(params, jlora.Rule('.', 2 + index))", "plan"),
        ("key = jax.random.key(index)", "key"),
    ],
)
def test_a_plan_or_a_key_that_differs_is_refused_everywhere(difference, name):
    program = (
        "key = jax.random.key(0)\n"
        + difference
        + """
try:
    jlora.adapt(params, plan, key=key)
except ValueError as error:
    results["message"] = str(error)
"""
    )
    for ended in run_processes(START + program, 2):
        assert ended.code == 0, ended.stderr
        assert ended.results["message"].startswith(
            f"`{name}` must be the same on all processes, got another one on process 1"
        )
