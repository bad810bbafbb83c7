"""Sharded merges and products over eight devices."""

import subprocess
import sys

SHARDED = """
import os
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8")
import jax, jax.numpy as jnp, numpy as np, jlora
from jax.sharding import PartitionSpec as P
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
keys = jax.random.split(jax.random.key(0), 4)
w, x = jax.random.normal(keys[0], (64, 40)), jax.random.normal(keys[3], (16, 64))
u, v = jax.random.normal(keys[1], (64, 20)), jax.random.normal(keys[2], (20, 40))
rows = jax.sharding.NamedSharding(mesh, P("x"))
merge = jax.jit(lambda w, u, v: jlora.reconstruct(jlora.Factors(u, v), w))
placed = [jax.device_put(w, rows), jax.device_put(u, rows), v]
assert "all-gather" not in merge.lower(*placed).compile().as_text()
merged = merge(*placed)
assert merged.sharding.is_equivalent_to(rows, 2)
np.testing.assert_allclose(merged, w + u @ v, rtol=1e-5, atol=1e-4)
local = jax.shard_map(
    lambda w, u, v: jlora.reconstruct(jlora.Factors(u, v), w), mesh=mesh,
                      in_specs=(P("x"), P("x"), P()), out_specs=P("x"))
np.testing.assert_allclose(local(w, u, v), w + u @ v, rtol=1e-5, atol=1e-4)
gradient = jax.grad(lambda u: jnp.sum(local(w, u, v) ** 2))(u)
np.testing.assert_allclose(gradient, 2 * (w + u @ v) @ v.T, rtol=1e-4, atol=1e-2)
apply = jax.shard_map(
    lambda x, w, u, v: jlora.apply_factors(x, jlora.Factors(u, v), w), mesh=mesh,
                      in_specs=(P("x"), P(), P(), P()), out_specs=P("x"))
np.testing.assert_allclose(apply(x, w, u, v), x @ (w + u @ v), rtol=1e-4, atol=1e-2)
gradient = jax.grad(lambda v: jnp.sum(apply(x, w, u, v)))(v)
expected = (x @ u).T @ jnp.ones((16, 40))
np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-2)
print("done")
"""


def test_over_eight_devices():
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "done", done.stderr[-2000:]
