"""Sharded matrices have sharded decompositions, with thin traffic only."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import jlora

m, n, rank, block, passes = 512, 384, 8, 8, 8
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
spec = PartitionSpec("x", None) if sys.argv[1] == "rows" else PartitionSpec(None, "x")
a = jax.random.normal(jax.random.key(0), (m, n), jnp.float32)
a += 40 * jnp.outer(jnp.sin(jnp.arange(m)), jnp.cos(jnp.arange(n))) / (m * n) ** 0.5 * 8
solve = jax.jit(lambda a: jlora.randomized_svd(
    a, rank, key=jax.random.key(1), num_passes=passes, block_size=block))
single = solve(a)
sharded = jax.device_put(a, NamedSharding(mesh, spec))
compiled = solve.lower(sharded).compile()
found = compiled(sharded)
text = compiled.as_text()
sizes = {}
pattern = (r"= \\(?\\w+\\[([\\d,]*)\\][^=]*? (all-gather|all-reduce|all-to-all|"
           r"collective-permute|reduce-scatter)(?:-start)?\\(")
for shape, kind in re.findall(pattern, text):
    size = int(np.prod([int(d) for d in shape.split(",") if d] or [1]))
    sizes[kind] = max(sizes.get(kind, 0), size)
product = lambda svd: (np.asarray(svd.u) * np.asarray(svd.s)) @ np.asarray(svd.vt)
weights = {"w": sharded, "stack": jnp.stack([a, a])}
on_last = NamedSharding(mesh, PartitionSpec(None, *spec))
weights["stack"] = jax.device_put(weights["stack"], on_last)
plan = jlora.make_plan(weights, jlora.Rule(".*", rank))
adapted = jlora.adapt(weights, plan, key=jax.random.key(1))
print(json.dumps({
    "sharded bases": [
        adapted[path].base.sharding == w.sharding for path, w in weights.items()],
    "sizes": sizes,
    "difference": float(np.abs(product(found) - product(single)).max()),
    "u": str(found.u.sharding.spec), "vt": str(found.vt.sharding.spec),
    "orthogonality": float(
        np.abs(np.asarray(found.u.T @ found.u) - np.eye(rank)).max()),
}))
"""


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_sharded_over_eight_devices(axis, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }

    done = subprocess.run(
        [sys.executable, program, axis],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["sharded bases"] == [True, True]
    assert result["difference"] < 1e-3
    assert result["orthogonality"] < 1e-5

    m, n, block, passes = 512, 384, 8, 8
    # A pass reduces one thin panel. The noise that makes exhausted blocks independent
    # is a panel for each side. No collective has the size of the matrix, m n, or of a
    # basis, m or n times block * passes / 2.
    assert result["sizes"].pop("all-reduce") <= max(m, n) * block
    assert max(result["sizes"].values(), default=0) <= (m + n + passes) * block

    sharded = "u" if axis == "rows" else "vt"
    assert "x" in result[sharded]
