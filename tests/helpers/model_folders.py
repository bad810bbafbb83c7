"""Small model folders and adapters of PEFT on disk."""

import json

import ml_dtypes
import numpy as np

import jlora

MODULES = ("layers.0.q_proj", "layers.0.up_proj")
NUM_LAYERS = 6


def write_model(folder, seed=0):
    """Write a model in two shards with an index."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    places = {}
    for index, module in enumerate(MODULES):
        name, file = f"{module}.weight", f"model-{index}.safetensors"
        jlora.save_arrays(folder / file, {name: rng.standard_normal((6, 5))})
        places[name] = file
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {"total_size": 480}, "weight_map": places})
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def write_adapter(folder, seed=0):
    rng = np.random.default_rng(seed)
    factors = {
        module: jlora.Factors(
            rng.standard_normal((5, 2 + i)), rng.standard_normal((2 + i, 6))
        )
        for i, module in enumerate(MODULES)
    }
    jlora.save_peft(folder, factors, portable=False)
    return folder


def write_job_inputs(folder, dtype=ml_dtypes.bfloat16):
    """Write a base of several files, a tuned model, and an adapter."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    names = [
        f"model.layers.{i}.{name}_proj"
        for i in range(NUM_LAYERS)
        for name in ("q", "up")
    ]
    for kind in ("base", "tuned"):
        (folder / kind).mkdir(parents=True)
        places = {}
        for i in range(NUM_LAYERS):
            file = f"model-{i}.safetensors"
            arrays = {
                f"{name}.weight": draw(48, 32) for name in names[2 * i : 2 * i + 2]
            }
            jlora.save_arrays(folder / kind / file, arrays)
            places |= dict.fromkeys(arrays, file)
        index = folder / kind / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": places}))
    factors = {name: jlora.Factors(draw(32, 4), draw(4, 48)) for name in names}
    jlora.save_peft(folder / "adapter", factors)
    return folder
