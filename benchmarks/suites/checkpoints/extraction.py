"""The difference of two checkpoints written as an adapter, from files to files."""

import functools

import jax

from benchmarks.run.contenders import Contender, Group, Prepared
from benchmarks.suites.checkpoints.checkpoint_pairs import (
    make_pair,
    measure_shortfall,
)
from benchmarks.suites.checkpoints.synthetic import (
    SUITE,
    count_bytes,
    list_tensors,
    make_case,
)
from benchmarks.suites.checkpoints.torch_roads import (
    decompose_fully,
    decompose_randomly,
    extract_by_torch,
    warm_up_torch,
)
from jlora.checkpoints import extract_checkpoint

_LEAST_RUNS = 3  # the ratio of two times needs common rounds


def make_extract_group(hidden, layers, rank, *, with_full_svd):
    """Return the group of the extraction of an adapter from two checkpoints."""
    ours = Contender(
        "jlora extract_checkpoint",
        functools.partial(_prepare_warm, rank),
        "jlora",
        "defaults; programs compiled before",
        least_runs=_LEAST_RUNS,
    )
    lowrank = _make_torch(
        "torch.svd_lowrank", decompose_randomly, rank, least_runs=_LEAST_RUNS
    )
    contenders = [ours, lowrank]
    if with_full_svd:
        full = _make_torch("torch.linalg.svd", decompose_fully, rank, most_runs=1)
        contenders.append(full)
    return _make_group(hidden, layers, rank, contenders)


def make_cold_extract_group(hidden, layers, rank):
    """Return the group of the first extraction, compilation included.

    Its contender has no peers in the group: to empty JAX's caches would make others
    compile again.
    """
    contender = Contender(
        "jlora extract_checkpoint, cold",
        functools.partial(_prepare_cold, rank),
        "jlora",
        "as jlora extract_checkpoint, after jax.clear_caches()",
        most_runs=3,
    )
    return _make_group(hidden, layers, rank, [contender])


def _make_torch(name, decompose, rank, **runs):
    niter = ", q = rank, niter = 4" if decompose is decompose_randomly else ""
    setting = f"safe_open, a float32 difference, {name}{niter}, save_file"
    return Contender(
        name,
        functools.partial(_prepare_torch, name, decompose, rank),
        setting=setting,
        requires=("torch", "safetensors"),
        **runs,
    )


def _make_group(hidden, layers, rank, contenders):
    case = make_case(hidden, layers, rank, "bfloat16")
    return Group(
        SUITE,
        "extract adapter",
        case,
        lambda: (make_pair(hidden, layers),),
        tuple(contenders),
        functools.partial(measure_shortfall, rank),
        **_count_least_work(hidden, layers, rank),
    )


def _count_least_work(hidden, layers, rank):
    """Return the flops and bytes of one sketch, one projection and one read of both."""
    read = layers * count_bytes(list_tensors(hidden, 1))
    return {"flops": 2.0 * read * rank, "bytes": 2.0 * read}


def _prepare_warm(rank, pair):
    # Matrices of one shape share a program, so one layer compiles all of them.
    _extract(rank, pair, targets=r"layers\.0\.")
    return Prepared(lambda: _extract(rank, pair), lambda output: output)


def _prepare_cold(rank, pair):
    def run():
        jax.clear_caches()
        return _extract(rank, pair)

    return Prepared(run, lambda output: output)


def _extract(rank, pair, **options):
    output = pair.workspace.clear("jlora")
    key = jax.random.key(0)
    extract_checkpoint(
        pair.base, pair.tuned, output, rank=rank, key=key, progress=False, **options
    )
    return output


def _prepare_torch(name, decompose, rank, pair):
    warm_up_torch(decompose)

    def run():
        output = pair.workspace.clear(name)
        return extract_by_torch(decompose, rank, pair.base, pair.tuned, output)

    return Prepared(run, lambda output: output, pool="torch")
