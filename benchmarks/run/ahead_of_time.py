"""Programs compiled for an accelerator that this machine may lack.

Each one is compiled in a fresh process. Each accelerator needs its plug-in, of the same
version as JAX:

- an NVIDIA GPU needs jax-cuda13-plugin and jax-cuda13-pjrt. The environment variable
  JLORA_CUDA_TARGET names the file of a target description, such as XLA publishes for
  an H200;
- a TPU needs libtpu.

Run with JAX_PLATFORMS=cpu: a process that looks for a TPU locks libtpu.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jlora
from benchmarks.run.environment import ROOT, why_missing
from jlora.adaptation.programs import InitSpec, initialize_chunk
from jlora.initializers import pissa

TARGETS = {"H200": "cuda", "TPU v5e": "tpu"}
_PLUGINS = {"cuda": ("jax_plugins", "jax_cuda13_plugin"), "tpu": ("libtpu",)}
_CUDA_TARGET = "JLORA_CUDA_TARGET"
# Instructions that only name a value, and a TPU's prefetch of an operand, which belongs
# to the kernel that reads the operand.
_NO_KERNELS = {
    "parameter",
    "constant",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "copy-start",
    "copy-done",
}


class Program(NamedTuple):
    """A function to compile, with the shapes of its arguments."""

    function: Callable
    shapes: tuple  # (shape, dtype) of each argument
    donate: tuple[int, ...] = ()  # indices of donated arguments


def make_svd_program(
    dtype: str, layers: int = 8, size: int = 4096, rank: int = 64
) -> Program:
    """Return the program that decomposes a batch of matrices."""

    def solve(a):
        return jlora.randomized_svd(a, rank, key=jax.random.key(0))

    return Program(solve, (((layers, size, size), dtype),))


def make_merge_program(
    dtype: str,
    rank: int,
    size: int = 4096,
    rounding: Literal["nearest", "stochastic"] = "nearest",
) -> Program:
    """Return the program that merges factors into a donated weight."""

    def merge(w, u, v):
        factors = jlora.Factors(u, v)
        key = jax.random.key(0) if rounding == "stochastic" else None
        return jlora.reconstruct(
            factors, w, scale=0.5, rounding=rounding, key=key, donate=True
        )

    shapes = ((size, size), dtype), ((size, rank), dtype), ((rank, size), dtype)
    return Program(merge, shapes, (0,))


def make_many_program(
    dtype: str, tokens: int, adapters: int = 64, size: int = 4096, rank: int = 16
) -> Program:
    """Return the program that applies an adapter of its own to each row."""

    def apply(x, w, u, v, index):
        return jlora.apply_many(x, jlora.Factors(u, v), index, w)

    shapes = (
        ((tokens, size), dtype),
        ((size, size), dtype),
        ((adapters, size, rank), dtype),
        ((adapters, rank, size), dtype),
        ((tokens,), "int32"),
    )
    return Program(apply, shapes)


def make_adapt_program(dtype, matrices=2, size=4096, rank=16):
    """Return the program that splits a chunk of donated weights into base, u and v."""
    spec = InitSpec(pissa(), rank, "io")

    def start(*weights):
        keys = tuple(jax.random.split(jax.random.key(0), matrices))
        scales = (jnp.ones((), jnp.float32),) * matrices
        return initialize_chunk(weights, scales, keys, (None,) * matrices, spec=spec)

    return Program(start, (((size, size), dtype),) * matrices, tuple(range(matrices)))


def make_lifted_program(
    dtype: str, tokens: int = 256, layers: int = 4, size: int = 4096, rank: int = 16
) -> Program:
    """Return the program of a gradient through a scan over stacked, lifted layers."""

    def run_layers(weights, x):
        def run_layer(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(run_layer, x, weights)[0].sum()

    def differentiate(x, w, u, v):
        def compute_loss(u, v):
            scale = jnp.ones((), u.dtype)
            weight = jlora.AdaptedWeight(w, u, v, scale, "uv", None, w.dtype)
            return jlora.lift(run_layers)(weight, x)

        return jax.grad(compute_loss, (0, 1))(u, v)

    shapes = (
        ((tokens, size), dtype),
        ((layers, size, size), dtype),
        ((layers, size, rank), "float32"),
        ((layers, rank, size), "float32"),
    )
    return Program(differentiate, shapes)


def make_quantized_program(
    dtype: str, format: str, rows: int = 512, size: int = 4096, rank: int = 16
) -> Program:
    """Return the program of a layer with a quantised base, forward and backward."""
    base = jax.eval_shape(
        lambda w: jlora.quantization.quantize(w, format),
        jax.ShapeDtypeStruct((size, size), jnp.dtype(dtype)),
    )
    leaves, structure = jax.tree.flatten(base)

    def run(x, dy, u, v, *leaves):
        base = jax.tree.unflatten(structure, leaves)

        def layer(x, u, v):
            return jlora.apply_factors(x, jlora.Factors(u, v), base, scale=0.5)

        y, pull = jax.vjp(layer, x, u, v)
        return y, pull(dy)

    shapes = (
        ((rows, size), dtype),
        ((rows, size), dtype),
        ((size, rank), "float32"),
        ((rank, size), "float32"),
        *((leaf.shape, leaf.dtype.name) for leaf in leaves),
    )
    return Program(run, shapes)


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
    **{
        f"quantised layer {dtype}, {format}": functools.partial(
            make_quantized_program, dtype, format
        )
        for dtype in ("bfloat16", "float32")
        for format in ("nf4", "int8", "int4", "fp8")
    },
}


def why_not(target: str) -> str | None:
    """Return why this machine cannot compile for a target, or None if it can."""
    platform = TARGETS[target]
    if platform == "cuda" and not os.path.isfile(os.environ.get(_CUDA_TARGET, "")):
        return f"{_CUDA_TARGET} names no target description"
    return why_missing(_PLUGINS[platform])


def compile_elsewhere(target: str, program: str, timeout: float = 900) -> dict:
    """Return the measurements of a program compiled for a target in a fresh process.

    Args:
        target: A name of `TARGETS`.
        program: A name of `PROGRAMS`.
        timeout: Seconds until the process is stopped.

    Returns:
        A dictionary with lower_ms, compile_ms, temporary_bytes and alias_bytes; calls,
        the sorted names of the library routines that the compiled program calls;
        num_kernels, the number of kernels that its outermost level runs; and
        largest_float, the numbers in its largest floating array.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "-1",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",
        "TPU_SKIP_MDS_QUERY": "1",
    }
    command = [sys.executable, "-m", "benchmarks.run.ahead_of_time", target, program]

    done = subprocess.run(
        command,
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


def compile_here(target: str, program: str) -> dict:
    """Return the measurements of `compile_elsewhere`, taken in this process."""
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
        "largest_float": _find_largest_float(text),
    }


def _find_largest_float(text):
    """Return the numbers in the largest floating array of a program's text."""
    shapes = re.findall(r"\b(?:f32|bf16|f16)\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in set(shapes))


def _count_kernels(text):
    """Return the number of kernels in the outermost computation of a program's text."""
    entry = re.search(r"^ENTRY .*?^}", text, re.MULTILINE | re.DOTALL)[0]
    operations = re.findall(
        r"^\s+(?:ROOT )?%?[\w.\-]+ = .*?[\]})] ([a-z][\w\-]*)\(", entry, re.MULTILINE
    )
    return sum(operation not in _NO_KERNELS for operation in operations)


def _describe_topology(platform):
    if platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")

    with open(os.environ[_CUDA_TARGET], encoding="utf-8") as file:
        return topologies.get_topology_desc(
            platform="cuda", target_config=file.read(), topology="1x1x1"
        )


if __name__ == "__main__":
    print(json.dumps(compile_here(*sys.argv[1:])))
