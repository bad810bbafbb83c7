"""A sharded checkpoint of many tensors, opened to list names and shapes."""

import functools
import json

from benchmarks.run.cases import WholeCase
from benchmarks.run.contenders import Contender, Group, Prepared
from benchmarks.suites.checkpoints.synthetic import (
    SUITE,
    RandomBlock,
    Workspace,
)
from benchmarks.suites.checkpoints.written_files import write_checkpoint
from jlora.checkpoints import open_checkpoint

_NUM_EXPERTS = 100
_SHAPE = (8, 8)


def make_open_group(num_tensors, num_shards=4):
    """Return the group that lists the names and shapes of a checkpoint."""
    contenders = (
        Contender(
            "jlora open_checkpoint",
            functools.partial(_prepare, _list_by_jlora),
            "jlora",
            "open_checkpoint of the folder, info of each name",
        ),
        Contender(
            "safetensors safe_open",
            functools.partial(_prepare, _list_by_safetensors),
            setting="safe_open of each shard, get_slice and get_shape of each name",
            requires=("safetensors",),
        ),
    )

    return Group(
        SUITE,
        "open checkpoint",
        WholeCase(f"{num_tensors} tensors in {num_shards} shards", "bfloat16"),
        functools.partial(_make_inputs, num_tensors, num_shards),
        contenders,
        _measure_errors,
    )


def _make_inputs(num_tensors, num_shards):
    """Return the workspace and the {name: shape} of its checkpoint."""
    workspace, shapes = Workspace(), {}
    for number in range(num_tensors):
        layer, expert = divmod(number, _NUM_EXPERTS)
        shapes[f"model.layers.{layer}.mlp.experts.{expert}.weight"] = _SHAPE
    make_tensor = RandomBlock().make_weight
    write_checkpoint(workspace.path / "base", shapes, make_tensor, num_shards)
    return workspace, shapes


def _prepare(list_shapes, workspace, shapes):
    folder = workspace.path / "base"
    return Prepared(lambda: list_shapes(folder), lambda found: found)


def _list_by_jlora(folder):
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.info(name).shape for name in checkpoint}


def _list_by_safetensors(folder):
    import safetensors

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        with safetensors.safe_open(folder / file, "numpy") as shard:
            for name in shard.keys():  # noqa: SIM118, a shard is no mapping
                found[name] = tuple(shard.get_slice(name).get_shape())
    return found


def _measure_errors(inputs, found):
    _, shapes = inputs
    wrong = sum(found.get(name) != shape for name, shape in shapes.items())
    return {"wrong or missing names": wrong, "names found": len(found)}
