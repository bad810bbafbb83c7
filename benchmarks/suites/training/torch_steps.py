"""One step of Adam on the LoRA factors of a transformer, by peft and torch."""

import numpy as np

from benchmarks.run.contenders import Prepared
from benchmarks.run.preparation import set_up_torch, to_torch, wait_for_torch
from benchmarks.suites.adaptation.llama_network import HEAD_SIZE, count_layers
from benchmarks.suites.adaptation.llama_weights import WEIGHT_NAMES
from benchmarks.suites.adaptation.peft_models import build_modules
from benchmarks.suites.training.step_programs import StepFigures


def prepare_peft_step(rate, model):
    """Return one step of torch's Adam on the model that peft has given LoRA."""
    import torch

    set_up_torch()
    linears = _adapt(model)
    trained = [
        parameter
        for linear in linears.values()
        for parameter in linear.parameters()
        if parameter.requires_grad
    ]
    optimizer = torch.optim.Adam(trained, lr=rate)
    x, y = map(to_torch, model.batches[0])
    num_layers = count_layers(linears)

    def run():
        optimizer.zero_grad()
        found = _run_network(x, num_layers, lambda path, x: linears[path](x))
        loss = torch.mean((found - y) ** 2)
        loss.backward()
        optimizer.step()
        return wait_for_torch(loss)

    def fetch(loss):
        num_trained = sum(parameter.numel() for parameter in trained)
        return StepFigures(loss.item(), num_trained, _count_bytes(optimizer))

    return Prepared(run, fetch, pool="torch")


def _adapt(model):
    """Return {path: peft's layer}; its LoRA starts as zero."""
    import peft

    weights = {
        path: to_torch(np.ascontiguousarray(weight.T))
        for path, weight in model.weights.items()
    }
    rank = model.rank
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(WEIGHT_NAMES))
    adapted = peft.get_peft_model(build_modules(weights), config).base_model.model
    return {path: adapted.get_submodule(path.replace("/", ".")) for path in weights}


def _count_bytes(optimizer):
    """Return the bytes of the arrays of the optimiser's state, without its counters."""
    values = [value for each in optimizer.state.values() for value in each.values()]
    return sum(value.nbytes for value in values if value.dim())


def _run_network(x, layers, multiply):
    """Return what `llama_network.run_network` returns, in torch."""
    import torch

    for layer in range(layers):

        def product(kind, x, prefix=f"layers/{layer}/"):
            return multiply(prefix + kind, x)

        normed = _normalize(x)
        q, k, v = (product(kind, normed) for kind in "qkv")
        x = x + product("o", _attend(q, k, v))

        normed = _normalize(x)
        gate = torch.nn.functional.silu(product("gate", normed))
        x = x + product("down", gate * product("up", normed))
    return x


def _normalize(x):
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def _attend(q, k, v):
    """Return causal self-attention [t, d] of q, k, v [t, d] in heads."""
    import torch

    size = min(HEAD_SIZE, q.shape[-1])
    # To [heads, t, size], as torch wants them.
    q, k, v = (each.reshape(len(each), -1, size).transpose(0, 1) for each in (q, k, v))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed.transpose(0, 1).reshape(mixed.shape[1], -1)
