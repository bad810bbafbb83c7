"""The Llama-shaped model as modules of Flax nnx, with LoRA by Flax or by qwix."""

from benchmarks.suites.adaptation.llama_network import (
    compare,
    count_layers,
    run_network,
)


def make_flax_loss(network):
    """Return (loss, factors, other state) of the model of nnx.LoRALinear layers."""
    from flax import nnx

    def make_linear(path, rngs):
        m, n = network.weights[path].shape
        layer = nnx.LoRALinear(m, n, lora_rank=network.rank, use_bias=False, rngs=rngs)
        layer.kernel[...] = network.weights[path]
        layer.lora.lora_a[...], layer.lora.lora_b[...] = network.factors[path]
        return layer

    return _split_loss(_make_module(network, make_linear))


def make_qwix_loss(network):
    """Return (loss, factors, other state) of a model that qwix has given LoRA."""
    import qwix
    from flax import nnx

    def make_linear(path, rngs):
        m, n = network.weights[path].shape
        return nnx.Linear(m, n, use_bias=False, rngs=rngs)

    rank, (x, _) = network.rank, network.batch
    provider = qwix.LoraProvider(module_path=".*", rank=rank, alpha=float(rank))
    model = _make_module(network, make_linear)
    model = qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(1))

    for path, layer in model.linears.items():
        layer.kernel[...] = network.weights[path]
        layer.kernel_lora_a[...], layer.kernel_lora_b[...] = network.factors[path]
    return _split_loss(model)


def _make_module(network, make_linear):
    """Return an nnx module of the network, its layers from make_linear(path, rngs)."""
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            linears = {path: make_linear(path, rngs) for path in network.weights}
            self.linears = nnx.data(linears)

        def __call__(self, x):
            linears = self.linears
            layers = count_layers(linears)
            return run_network(x, layers, lambda path, x: linears[path](x))

    return Model(nnx.Rngs(0))


def _split_loss(model):
    """Return (loss, factors, rest); the model's only nnx.LoRAParam are its factors."""
    from flax import nnx

    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)

    def loss(factors, rest, batch):
        x, y = batch
        return compare(nnx.merge(graph, factors, rest)(x), y)

    return loss, factors, rest
