"""Programs compiled for an accelerator that is not here, each in a process of its own.

It needs the plug-in of the accelerator, of the version of JAX: jax-cuda13-plugin and
jax-cuda13-pjrt, with JLORA_CUDA_TARGET the path of a target description such as XLA publishes for
an H200; or libtpu. Run with JAX_PLATFORMS=cpu: a process that looks for a TPU locks libtpu.
"""

import json
import os
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jlora
from benchmarks.environment import ROOT, why_missing

TARGETS = {"H200": "cuda", "TPU v5e": "tpu"}
_PLUGINS = {"cuda": ("jax_plugins", "jax_cuda13_plugin"), "tpu": ("libtpu",)}
_CUDA_TARGET = "JLORA_CUDA_TARGET"


def make_svd_program(dtype, layers=8, size=4096, rank=64):
    """Return (function, shapes of its arguments) of a batch of decompositions."""

    def solve(a):
        return jlora.randomized_svd(a, rank, key=jax.random.key(0))

    return solve, [((layers, size, size), dtype)]


PROGRAMS = {
    "randomized_svd float32": lambda: make_svd_program("float32"),
    "randomized_svd bfloat16": lambda: make_svd_program("bfloat16"),
}


def why_not(target):
    """Return why nothing can be compiled for a target here, or None."""
    platform = TARGETS[target]
    if platform == "cuda" and not os.path.isfile(os.environ.get(_CUDA_TARGET, "")):
        return f"{_CUDA_TARGET} names no target description"
    return why_missing(_PLUGINS[platform])


def compile_elsewhere(target, program, timeout=900):
    """Return what a fresh process found: lower_ms, compile_ms, temporary_bytes, calls.

    `calls` are the library routines that the compiled program calls, in order of the alphabet.
    """
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0", "TPU_SKIP_MDS_QUERY": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ahead_of_time", target, program], cwd=ROOT,
        capture_output=True, text=True, env=environment, timeout=timeout, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def compile_here(target, program):
    """Return the same, compiled in this process."""
    platform = TARGETS[target]
    sharding = SingleDeviceSharding(_describe_topology(platform).devices[0])
    function, shapes = PROGRAMS[program]()
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding) for shape, dtype in shapes
    ]
    start = time.perf_counter()
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    lower_ms = 1e3 * (time.perf_counter() - start)
    start = time.perf_counter()
    compiled = lowered.compile()
    return {
        "lower_ms": lower_ms,
        "compile_ms": 1e3 * (time.perf_counter() - start),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "calls": sorted(set(re.findall('custom_call_target="([^"]+)"', compiled.as_text()))),
    }


def _describe_topology(platform):
    if platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    with open(os.environ[_CUDA_TARGET], encoding="utf-8") as file:
        return topologies.get_topology_desc(
            platform="cuda", target_config=file.read(), topology="1x1x1"
        )


if __name__ == "__main__":
    print(json.dumps(compile_here(*sys.argv[1:])))
