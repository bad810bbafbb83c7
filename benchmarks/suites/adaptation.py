"""Adapting whole models: their first factors, a step of training, one adapted layer."""

from benchmarks.suites.adapted_layers import make_layer_group
from benchmarks.suites.encoder_steps import make_embedding_group, make_step_group
from benchmarks.suites.whole_models import make_cold_group, make_model_group


def list_groups(level_name, platform):
    """Return the groups of this suite."""
    full = level_name == "full"
    groups = []
    for sizes in _list_model_sizes(full, platform):
        groups += [make_model_group(*sizes, is_full=full), make_cold_group(*sizes)]
    groups.append(make_embedding_group())
    groups.append(make_step_group(16, 32, 128) if full else make_step_group(16, 8, 32))
    groups.append(make_layer_group(2048, 512, 16) if full else make_layer_group(512, 128, 16))
    return groups


def _list_model_sizes(full, platform):
    """Return [(hidden, layers, rank, dtype)] of the whole models."""
    if not full:
        return [(1024, 2, 16, "float32")]
    if platform == "gpu":
        return [(4096, 32, rank, "bfloat16") for rank in (16, 128)]
    return [(1024, 8, 16, "float32"), *((2048, 8, rank, "float32") for rank in (16, 64))]
