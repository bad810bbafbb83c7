"""A PEFT adapter written with a smaller rank, from files to files."""

import functools

import numpy as np

import jlora
from benchmarks.run.contenders import Contender, Group, Prepared
from benchmarks.suites.checkpoints.synthetic import (
    SUITE,
    Workspace,
    list_modules,
    make_case,
)
from benchmarks.suites.checkpoints.torch_roads import (
    decompose_fully,
    resize_by_torch,
    warm_up_torch,
)
from benchmarks.suites.updates.factors import (
    compute_core,
    count_least_work,
    make_factors,
    measure_distance,
)
from jlora.checkpoints import resize_adapter


def make_resize_group(hidden, layers, source_rank, rank, *, with_dense):
    """Return the group that resizes an adapter of all layers.

    Args:
        with_dense: Measure the road by the product of the factors too.
    """
    ours = Contender(
        "jlora resize_adapter",
        functools.partial(_prepare_ours, rank),
        "jlora",
        f"from rank {source_rank}, defaults",
        least_runs=3,  # the first run compiles
    )
    dense = Contender(
        "torch dense road",
        functools.partial(_prepare_dense, rank),
        setting="load_file, B @ A formed, torch.linalg.svd, cut, save_file",
        requires=("torch", "safetensors"),
        most_runs=1,
    )

    case = make_case(hidden, layers, rank, "float32")
    modules = list_modules(hidden, layers)
    works = [count_least_work(shape, source_rank, rank) for shape in modules.values()]
    return Group(
        SUITE,
        "resize adapter",
        case,
        functools.partial(_make_inputs, hidden, layers, source_rank),
        (ours, dense) if with_dense else (ours,),
        functools.partial(_measure_errors, rank),
        flops=sum(work["flops"] for work in works),
        bytes=sum(work["bytes"] for work in works),
    )


def _make_inputs(hidden, layers, source_rank):
    """Return (workspace, the modules that are checked): of the first and last layer."""
    workspace, factors = Workspace(), {}
    for number, (path, shape) in enumerate(list_modules(hidden, layers).items()):
        case = make_case(hidden, layers, source_rank, "float32")
        # make_factors takes (inputs, outputs).
        case = case._replace(shape=shape[::-1])
        factors[path] = jlora.Factors(*make_factors(case, source_rank, number))

    jlora.save_peft(workspace.path / "adapter", factors)
    ends = tuple(f"model.layers.{layer}." for layer in (0, layers - 1))
    return workspace, [path for path in factors if path.startswith(ends)]


def _prepare_ours(rank, workspace, checked):
    def run():
        output = workspace.clear("jlora")
        adapter = workspace.path / "adapter"
        resize_adapter(adapter, output, rank=rank, progress=False)
        return output

    return Prepared(run, lambda output: output)


def _prepare_dense(rank, workspace, checked):
    warm_up_torch(decompose_fully)

    def run():
        output = workspace.clear("torch")
        return resize_by_torch(rank, workspace.path / "adapter", output)

    return Prepared(run, lambda output: output, pool="torch")


def _measure_errors(rank, inputs, output):
    """Return ‖uv − found‖_F / ‖uv − best‖_F − 1 of the worst module checked."""
    workspace, checked = inputs
    given, _ = jlora.load_peft(workspace.path / "adapter")
    found, _ = jlora.load_peft(output)

    excesses = []
    for path in checked:
        values = np.linalg.svd(compute_core(*given[path]), compute_uv=False)
        distance = measure_distance(given[path], found[path])
        excesses.append(distance / np.linalg.norm(values[rank:]) - 1)
    return {"excess error": max(excesses), "modules": len(found)}
