"""The PiSSA initialisation of all weights of a model by PEFT."""

import functools

from benchmarks.run.contenders import Prepared
from benchmarks.run.preparation import fetch_torch, set_up_torch, wait_for_torch
from benchmarks.suites.adaptation.llama_weights import WEIGHT_NAMES


def prepare_peft(init, rank, model):
    """Return the adaptation of a model by PEFT, at one of its initialisations."""
    import peft

    set_up_torch()
    weights = model.in_torch
    configure = functools.partial(
        peft.LoraConfig, r=rank, lora_alpha=rank, target_modules=list(WEIGHT_NAMES)
    )
    # At first use peft and torch import and set up more: do it before the timed runs.
    one_weight = dict([*weights.items()][:1])
    peft.get_peft_model(
        build_modules(one_weight), configure(init_lora_weights="pissa_niter_1")
    )
    config = configure(init_lora_weights=init)

    def run():
        adapted = None
        for _ in range(model.num_repeats):
            del adapted  # before the next one needs memory
            # New modules each time: peft changes the layer, not the weight's memory.
            adapted = peft.get_peft_model(build_modules(weights), config)
        return wait_for_torch(adapted)

    def fetch(adapted):
        layers = adapted.base_model.model
        factors = {}
        for path in weights:
            layer = layers.get_submodule(path.replace("/", "."))
            factors[path] = _read_factors(layer)
        return factors, {}

    return Prepared(run, fetch, pool="torch")


def build_modules(weights):
    """Return nested modules, one Linear for each weight, in the weights' memory."""
    import torch

    root = torch.nn.Module()
    for path, weight in weights.items():
        *parents, name = path.split("/")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)

        linear = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        module.add_module(name, linear)
    return root


def _read_factors(layer):
    """Return (u, v) of a peft layer: the transposes of its A and B."""
    a = fetch_torch(layer.lora_A["default"].weight)
    b = fetch_torch(layer.lora_B["default"].weight)
    return a.T, b.T
