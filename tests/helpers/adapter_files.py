"""Small adapters of several formats, written by hand, and their exact deltas."""

import json

import numpy as np
import safetensors.numpy

from jlora import Factors

DOWN, UP = "lora_down.weight", "lora_up.weight"
A, B = "lora_A.weight", "lora_B.weight"


def draw(*shape):
    """Small whole numbers: every product and sum of a few is exact."""
    rng = np.random.default_rng(shape)
    return rng.integers(-4, 5, shape).astype(np.float32)


def make_tensors(module, ends=(DOWN, UP), rank=2, m=6, n=4, alpha=None):
    arrays = (draw(rank, m), draw(n, rank))
    tensors = {f"{module}.{e}": a for e, a in zip(ends, arrays, strict=True)}
    if alpha is not None:
        tensors[f"{module}.alpha"] = np.asarray(alpha, np.float32)
    return tensors


def find_delta(rank=2, m=6, n=4):
    return (draw(n, rank) @ draw(rank, m)).T


def save(path, tensors, settings=None):
    metadata = {"format": "pt"}
    if settings is not None:
        metadata["lora_adapter_metadata"] = json.dumps(settings, indent=2)
    safetensors.numpy.save_file(tensors, path, metadata)
    return path


def check(found, expected):
    assert set(found) == set(expected)
    for path, delta in expected.items():
        assert isinstance(found[path], Factors)
        np.testing.assert_array_equal(found[path].u @ found[path].v, delta)
