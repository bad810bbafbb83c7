"""Programs compiled ahead of time: no loop per matrix, no copy of the matrix.

Optional: benchmarks/ahead_of_time.py lists the packages that it needs.
"""

import pytest

from benchmarks.run.ahead_of_time import compile_elsewhere, why_not

# These are batched; a QR or an SVD of the library would be a loop over the matrices.
# (The blocks of a QR on a TPU are inside its eigh.)
BATCHED = {
    "H200": {
        "cusolver_potrf_ffi",
        "cusolver_syevd_ffi",
        "__cublas$triangularSolve",
        "__cublas$gemm",
        "__cublas$lt$matmul",
    },
    "TPU v5e": {
        "AllocateBuffer",
        "AssumeGatherIndicesInBound",
        "Cholesky",
        "CompactWyHelper",
        "ConcatBitcast",
        "EighTpu",
        "GatherScatterIndicesBitpacked",
        "InvertDiagBlocksLowerTriangular",
        "QrDecompositionBlock",
    },
}


def compile_or_skip(target, program):
    if reason := why_not(target):
        pytest.skip(reason)
    return compile_elsewhere(target, program)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", [*BATCHED])
def test_a_batch_compiled_for_an_accelerator(target, dtype):
    found = compile_or_skip(target, f"randomized_svd {dtype}")
    layers, m, n, width = 8, 4096, 4096, 64 * 9
    assert found["temporary_bytes"] <= 3 * layers * (m + n) * width * 4
    # Less than a copy of the matrix. On a TPU, eigh needs more than a copy in 16 bits,
    # so the limit there is a copy in float32.
    assert found["temporary_bytes"] < layers * m * n * (2 if target == "H200" else 4)
    assert set(found["calls"]) <= BATCHED[target]


@pytest.mark.parametrize("target", [*BATCHED])
def test_weights_give_their_memory_to_their_bases(target):
    found = compile_or_skip(target, "adapt bfloat16, two weights")
    chunk = 2 * 4096 * 4096 * 2
    assert found["alias_bytes"] == chunk
    # The stack, and at most as much again for temporary arrays.
    assert found["temporary_bytes"] < 2.1 * chunk
    assert set(found["calls"]) <= BATCHED[target]


@pytest.mark.parametrize("target", [*BATCHED])
def test_a_lifted_scan_makes_no_delta(target):
    found = compile_or_skip(target, "lift bfloat16, scan over four layers")
    # The four deltas in float32 would be 256 MiB, and one of them 64.
    assert found["temporary_bytes"] < 64 * 2**20


@pytest.mark.parametrize("format", ["nf4", "int8", "int4", "fp8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("target", [*BATCHED])
def test_a_quantised_layer_makes_no_float_copy_of_its_base(target, dtype, format):
    found = compile_or_skip(target, f"quantised layer {dtype}, {format}")
    size, rows = 4096, 512
    # x, dy, y and dx are the largest arrays; a copy of the base would be eight times.
    assert found["largest_float"] <= size * rows
    assert found["temporary_bytes"] <= 0.25 * 4 * size**2
