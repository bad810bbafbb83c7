"""Small model folders and adapters of PEFT on disk."""

import json

import numpy as np

import jlora

MODULES = ("layers.0.q_proj", "layers.0.up_proj")


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
