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
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jlora
from benchmarks.run.environment import ROOT, why_missing
from jlora.adaptation.programs import How, start_all

TARGETS = {"H200": "cuda", "TPU v5e": "tpu"}
_PLUGINS = {"cuda": ("jax_plugins", "jax_cuda13_plugin"), "tpu": ("libtpu",)}
_CUDA_TARGET = "JLORA_CUDA_TARGET"


class Program(NamedTuple):
    """Something to compile."""

    function: Callable
    shapes: tuple  # (shape, dtype) of each argument
    donate: tuple[int, ...] = ()


def make_svd_program(dtype, layers=8, size=4096, rank=64):
    """Return the `Program` of a batch of decompositions."""

    def solve(a):
        return jlora.randomized_svd(a, rank, key=jax.random.key(0))

    return Program(solve, (((layers, size, size), dtype),))


def make_merge_program(dtype, rank, size=4096, rounding="nearest"):
    """Return the `Program` of a merge into a donated weight."""

    def merge(w, u, v):
        key = jax.random.key(0) if rounding == "stochastic" else None
        return jlora.reconstruct(
            jlora.Factors(u, v), w, scale=0.5, rounding=rounding, key=key, donate=True
        )

    shapes = ((size, size), dtype), ((size, rank), dtype), ((rank, size), dtype)
    return Program(merge, shapes, (0,))


def make_many_program(dtype, tokens, adapters=64, size=4096, rank=16):
    """Return the `Program` of rows that go through adapters of their own."""

    def apply(x, w, u, v, index):
        return jlora.apply_many(x, jlora.Factors(u, v), index, w)

    return Program(
        apply,
        (
            ((tokens, size), dtype),
            ((size, size), dtype),
            ((adapters, size, rank), dtype),
            ((adapters, rank, size), dtype),
            ((tokens,), "int32"),
        ),
    )


def make_adapt_program(dtype, matrices=2, size=4096, rank=16):
    """Return the `Program` of a chunk of weights that become base, u and v."""
    how = How("pissa", rank, None, 1, "io", True)

    def start(*weights):
        keys = tuple(jax.random.split(jax.random.key(0), matrices))
        scales = (jnp.ones((), jnp.float32),) * matrices
        return start_all(weights, scales, keys, (None,) * matrices, how=how)

    return Program(start, (((size, size), dtype),) * matrices, tuple(range(matrices)))


def make_lifted_program(dtype, tokens=256, layers=4, size=4096, rank=16):
    """Return the `Program` of the gradient through a scan over a stack of lifted layers."""

    def run(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    def differentiate(x, w, u, v):
        def lose(u, v):
            weight = jlora.AdaptedWeight(
                w, u, v, jnp.ones((), u.dtype), "uv", None, w.dtype
            )
            return jlora.lift(run)(weight, x)

        return jax.grad(lose, (0, 1))(u, v)

    return Program(
        differentiate,
        (
            ((tokens, size), dtype),
            ((layers, size, size), dtype),
            ((layers, size, rank), "float32"),
            ((layers, rank, size), "float32"),
        ),
    )


PROGRAMS = {
    "randomized_svd float32": lambda: make_svd_program("float32"),
    "randomized_svd bfloat16": lambda: make_svd_program("bfloat16"),
    "reconstruct bfloat16, rank 16": lambda: make_merge_program("bfloat16", 16),
    "reconstruct bfloat16, rank 64": lambda: make_merge_program("bfloat16", 64),
    "reconstruct bfloat16, rank 16, stochastic": lambda: make_merge_program(
        "bfloat16", 16, rounding="stochastic"
    ),
    "apply_many bfloat16, 16 tokens": lambda: make_many_program("bfloat16", 16),
    "adapt bfloat16, two weights": lambda: make_adapt_program("bfloat16"),
    "lift bfloat16, scan over four layers": lambda: make_lifted_program("bfloat16"),
    "apply_many bfloat16, 4096 tokens": lambda: make_many_program("bfloat16", 4096),
}


def why_not(target):
    """Return why nothing can be compiled for a target here, or None."""
    platform = TARGETS[target]
    if platform == "cuda" and not os.path.isfile(os.environ.get(_CUDA_TARGET, "")):
        return f"{_CUDA_TARGET} names no target description"
    return why_missing(_PLUGINS[platform])


def compile_elsewhere(target, program, timeout=900):
    """Return what a fresh process found.

    lower_ms, compile_ms, temporary_bytes, alias_bytes; calls, the library routines that the
    compiled program calls, in order of the alphabet; num_kernels, what its outermost level runs.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "-1",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",
        "TPU_SKIP_MDS_QUERY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run.ahead_of_time", target, program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def compile_here(target, program):
    """Return the same, compiled in this process."""
    platform = TARGETS[target]
    sharding = SingleDeviceSharding(_describe_topology(platform).devices[0])
    function, shapes, donate = PROGRAMS[program]()
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
        for shape, dtype in shapes
    ]
    start = time.perf_counter()
    traced = jax.jit(function, donate_argnums=donate).trace(*arguments)
    lowered = traced.lower(lowering_platforms=(platform,))
    lower_ms = 1e3 * (time.perf_counter() - start)
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_ms = 1e3 * (time.perf_counter() - start)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return {
        "lower_ms": lower_ms,
        "compile_ms": compile_ms,
        "temporary_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "calls": sorted(set(re.findall('custom_call_target="([^"]+)"', text))),
        "num_kernels": _count_kernels(text),
    }


def _count_kernels(text):
    """Return how many instructions of the outermost computation do more than name a value."""
    entry = re.search(r"^ENTRY .*?^}", text, re.MULTILINE | re.DOTALL)[0]
    operations = re.findall(
        r"^\s+(?:ROOT )?%?[\w.\-]+ = .*?[\]})] ([a-z][\w\-]*)\(", entry, re.MULTILINE
    )
    # A TPU also says when it fetches an operand ahead of the kernel that reads it.
    names = {
        "parameter",
        "constant",
        "bitcast",
        "tuple",
        "get-tuple-element",
        "copy-start",
        "copy-done",
    }
    return sum(operation not in names for operation in operations)


def _describe_topology(platform):
    if platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    with open(os.environ[_CUDA_TARGET], encoding="utf-8") as file:
        return topologies.get_topology_desc(
            platform="cuda", target_config=file.read(), topology="1x1x1"
        )


if __name__ == "__main__":
    print(json.dumps(compile_here(*sys.argv[1:])))
