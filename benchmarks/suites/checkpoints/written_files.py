"""Writes synthetic checkpoints and adapters."""

import json
import os

import numpy as np

import jlora
from benchmarks.suites.checkpoints.synthetic import count_bytes
from jlora.checkpoints.safetensors import format_header


def write_checkpoint(folder, shapes, make_tensor, num_shards=4):
    """Write bfloat16 tensors as a sharded checkpoint, one tensor in memory at a time.

    Args:
        shapes: {name: shape}.
        make_tensor: (name, shape) → bfloat16 array.
    """
    folder.mkdir()
    limit = count_bytes(shapes) / num_shards
    shards, num_bytes = [{} for _ in range(num_shards)], 0
    for name, shape in shapes.items():
        shards[min(int(num_bytes / limit), num_shards - 1)][name] = shape
        num_bytes += count_bytes({name: shape})

    places = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{num_shards:05}.safetensors"
        _write_shard(folder / file, shard, make_tensor)
        places |= dict.fromkeys(shard, file)

    index = {"metadata": {"total_size": num_bytes}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder, shapes, rank, make_numbers):
    """Write a PEFT adapter of one rank for modules {path: (outputs, inputs)}."""
    factors = {}
    for path, (outputs, inputs) in shapes.items():
        u = make_numbers(f"{path} u", (inputs, rank))
        v = make_numbers(f"{path} v", (rank, outputs))
        factors[path] = jlora.Factors(u, v)
    jlora.save_peft(folder, factors)
    return folder


def _write_shard(path, shapes, make_tensor):
    entries = [
        (name, "BF16", shape, count_bytes({name: shape}))
        for name, shape in shapes.items()
    ]
    with open(path, "wb") as file:
        file.write(format_header(entries))
        for name, shape in shapes.items():
            tensor = np.ascontiguousarray(make_tensor(name, shape))
            file.write(tensor.view(np.uint8).data)
        # Otherwise the system would write it to the disk during the timed runs.
        file.flush()
        os.fsync(file.fileno())
