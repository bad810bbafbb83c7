"""A sharded run that is resumed, in one process and in several: the same numbers."""

import pytest

from tests.helpers.processes import run_well

# A run of eight steps, and one of four that is resumed.
PROGRAM = """
import optax, jax.numpy as jnp

jax.config.update("jax_numpy_dtype_promotion", "standard")
auto = (jax.sharding.AxisType.Auto,)
mesh = jax.make_mesh((4,), ("data",), axis_types=auto)
rows = jax.NamedSharding(mesh, jax.P("data"))
rng = np.random.default_rng(0)

def draw(*shape):
    array = rng.standard_normal(shape).astype(np.float32)
    return jax.make_array_from_callback(shape, rows, lambda index: array[index])

params = {"w": draw(16, 8)}
plan = jlora.make_plan(params, jlora.Rule("w", 2))
adapted = jlora.adapt(params, plan, key=jax.random.key(0))
batch = draw(32, 16), draw(32, 8)

def loss(params, batch):
    x, y = batch
    return jnp.mean((jlora.linear(x, params["w"]) - y) ** 2)

def run(num_steps, checkpoint=None):
    return jlora.fit(
        loss, adapted, optax.adam(1e-2), [batch] * num_steps, checkpoint=checkpoint,
        checkpoint_every=2, progress=False,
    )

def describe(result):
    v = result.adapted["w"].factors.v
    return [np.asarray(result.losses).tolist(), np.asarray(v).tolist()]

results["whole"] = describe(run(8))
run(4, sys.argv[4] + "/run")
results["resumed"] = describe(run(8, sys.argv[4] + "/run"))
"""


@pytest.mark.parametrize(("num_processes", "num_devices"), [(1, 4), (2, 2)])
def test_a_resumed_run_has_the_numbers_of_a_whole_one(
    tmp_path, num_processes, num_devices
):
    found = run_well(
        PROGRAM, num_processes, num_devices=num_devices, arguments=[tmp_path]
    )
    losses, v = found[0]["whole"]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    for each in found:
        assert each["whole"] == [losses, v]
        assert each["resumed"] == [losses, v]
