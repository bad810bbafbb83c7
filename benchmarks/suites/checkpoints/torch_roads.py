"""Jobs on checkpoints as scripts with torch do them, from files to an adapter."""

import json

from benchmarks.run.preparation import name_torch_device, set_up_torch

_PREFIX = "base_model.model."


def warm_up_torch(decompose):
    """Set torch up, and let it load all that a decomposition needs."""
    import safetensors.torch  # noqa: F401, imported for the runs
    import torch

    set_up_torch()
    decompose(1, torch.ones(64, 64, device=name_torch_device()))


def decompose_fully(rank, matrix):
    """Return the leading triplets (u, s, vt) of torch's full SVD."""
    import torch

    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def decompose_randomly(rank, matrix):
    """Return the leading triplets (u, s, vt) of `torch.svd_lowrank`."""
    import torch

    u, s, v = torch.svd_lowrank(matrix, q=rank, niter=4)
    return u, s, v.mT


def extract_by_torch(decompose, rank, base, tuned, output):
    """Write the difference of two sharded checkpoints as an adapter."""
    old, new = _open_shards(base), _open_shards(tuned)
    parts = {}
    for name in new:
        # torch decomposes no bfloat16.
        wide = [each[name].get_tensor(name).float() for each in (new, old)]
        difference = (wide[0] - wide[1]).to(name_torch_device())
        parts[name.removesuffix(".weight")] = decompose(rank, difference)
    _write_adapter(output, rank, parts)
    return output


def resize_by_torch(rank, adapter, output):
    """Write an adapter of a smaller rank, by an SVD of each product of factors."""
    import safetensors.torch

    factors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    parts = {}
    for name, a in factors.items():
        if name.endswith(".lora_A.weight"):
            b = factors[name.replace(".lora_A.", ".lora_B.")]
            product = b.to(name_torch_device()) @ a.to(name_torch_device())
            path = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            parts[path] = decompose_fully(rank, product)
    _write_adapter(output, rank, parts)
    return output


def _open_shards(folder):
    """Return {name of a tensor: its open shard}."""
    import safetensors

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    places = index["weight_map"]
    files = {
        file: safetensors.safe_open(folder / file, "pt")
        for file in sorted(set(places.values()))
    }
    return {name: files[file] for name, file in places.items()}


def _write_adapter(folder, rank, parts):
    """Write {module: (u, s, vt)} as an adapter of PEFT, its scale 1."""
    import safetensors.torch

    tensors = {}
    for path, (u, s, vt) in parts.items():
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = (u * s).cpu().contiguous()
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = vt.cpu().contiguous()

    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(parts),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
