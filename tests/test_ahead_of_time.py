"""Programs compiled for an accelerator without one: no loop per matrix, no copy of the matrix.

Optional: it needs the CUDA plug-in (pip install jax-cuda13-plugin jax-cuda13-pjrt, of the version
of JAX) and JLORA_CUDA_TARGET, the path of a target description such as XLA publishes for an H200.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

TARGET = os.environ.get("JLORA_CUDA_TARGET")
PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp, jlora
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

layers, m, n, rank = 8, 4096, 4096, 64
topology = topologies.get_topology_desc(
    platform="cuda", target_config=open(sys.argv[1]).read(), topology="1x1x1")
a = jax.ShapeDtypeStruct((layers, m, n), jnp.dtype(sys.argv[2]),
                         sharding=SingleDeviceSharding(topology.devices[0]))
solve = jax.jit(lambda a: jlora.randomized_svd(a, rank, key=jax.random.key(0)))
compiled = solve.trace(a).lower(lowering_platforms=("cuda",)).compile()
print(json.dumps({
    "temporary": compiled.memory_analysis().temp_size_in_bytes,
    "calls": sorted(set(re.findall('custom_call_target="([^"]+)"', compiled.as_text()))),
}))
"""


def has_plugin():
    names = ("jax_plugins", "jax_plugins.xla_cuda13")
    return all(importlib.util.find_spec(name) is not None for name in names)


@pytest.mark.skipif(not TARGET, reason="JLORA_CUDA_TARGET names no target description")
@pytest.mark.skipif(not has_plugin(), reason="the CUDA plug-in of JAX is not installed")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_compiled_for_cuda(dtype):
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, TARGET, dtype], capture_output=True, text=True,
        env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    layers, m, n, width = 8, 4096, 4096, 32 * 14
    assert found["temporary"] <= 3 * layers * (m + n) * width * 4
    assert found["temporary"] < layers * m * n * 2
    # These three are batched; a QR or an SVD of the library would be a loop over the matrices.
    batched = {"cusolver_potrf_ffi", "cusolver_syevd_ffi", "__cublas$triangularSolve"}
    assert set(found["calls"]) - {"__cublas$gemm", "__cublas$lt$matmul"} <= batched
