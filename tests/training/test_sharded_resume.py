"""A sharded model, in one process and several: load, adapt, fit, resume, save."""

import numpy as np
import pytest

import jlora
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

folder = sys.argv[4]
params = {"w": draw(16, 8)}
jlora.save_arrays(f"{folder}/model.safetensors", params)
checkpoint = jlora.checkpoints.open_checkpoint(f"{folder}/model.safetensors")
params = jlora.checkpoints.load_sharded(checkpoint, rows)
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
run(4, f"{folder}/run")
resumed = run(8, f"{folder}/run")
results["resumed"] = describe(resumed)
jlora.save_arrays(f"{folder}/merged.safetensors", jlora.merge(resumed.adapted))
factors = jlora.adaptation.get_factors(resumed.adapted)
jlora.save_peft(f"{folder}/adapter", factors)
"""


@pytest.fixture(scope="module", params=[(1, 4), (2, 2), (4, 1)], ids=["1", "2", "4"])
def finished(request, tmp_path_factory):
    """Return (folder, results of the processes)."""
    num_processes, num_devices = request.param
    folder = tmp_path_factory.mktemp("road")
    return folder, run_well(
        PROGRAM, num_processes, num_devices=num_devices, arguments=[folder]
    )


def test_a_resumed_run_has_the_numbers_of_a_whole_one(finished):
    _, found = finished
    losses, v = found[0]["whole"]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    for each in found:  # every process ends with the same bits
        assert each["whole"] == [losses, v]
        assert each["resumed"] == [losses, v]


def test_the_files_are_those_of_the_trained_model(finished):
    folder, found = finished
    names = ["adapter", "merged.safetensors", "model.safetensors", "run"]
    assert sorted(path.name for path in folder.iterdir()) == names

    factors, _ = jlora.load_peft(folder / "adapter")
    u, v = factors["w"]
    np.testing.assert_array_equal(v, np.asarray(found[0]["resumed"][1], np.float32))
    merged = jlora.load_arrays(folder / "merged.safetensors")["w"]
    base = jlora.load_arrays(folder / "model.safetensors")["w"]
    # PiSSA: the delta of the first factors is no part of the base.
    u0, s0, vt0 = np.linalg.svd(base)
    rest = base - (u0[:, :2] * s0[:2]) @ vt0[:2]
    np.testing.assert_allclose(merged, rest + u @ v, atol=1e-5)
