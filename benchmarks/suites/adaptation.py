"""Adapting whole models: their first factors, a step of training, one adapted layer."""

import ctypes
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from benchmarks.cases import Case
from benchmarks.environment import count_threads
from benchmarks.harness import Contender, Group, Prepared, fetch_jax, prepare_jax, to_torch
from benchmarks.matrices import make_matrix
from benchmarks.models import minilm
from benchmarks.svd_errors import compute_singular_values

SUITE = "adaptation"
# A layer of Llama: four square projections, and the three of a gated MLP 2.6875 times as wide.
_SQUARE, _UP, _DOWN = ("q", "k", "v", "o"), ("gate", "up"), ("down",)
_LAYERS_AT_ONCE = 8
# Above this hidden size peft's exact decomposition of a whole model takes minutes.
_LARGEST_EXACT = 1024


class NamedCase(NamedTuple):
    """A problem that is not one matrix of a known model, with the interface of a Case."""

    name: str
    shape: tuple[int, int]  # (m, n), or of the square projections of a whole model
    fields: Case

    @property
    def dtype(self):
        return self.fields.dtype

    def describe(self):
        """Return the fields of a record's case."""
        m, n = self.shape
        return {**self.fields._asdict(), "name": self.name, "m": m, "n": n}


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


# Whole models: all weights → first factors and residuals.


def make_model_group(hidden, layers, rank, dtype, *, is_full):
    """Return the group of the PiSSA initialisation of all weights of a Llama-shaped model."""
    contenders = [
        Contender("jlora adapt", functools.partial(_prepare_adapt, rank), "jlora",
                  _describe_turns("one weight after the other, eagerly; defaults", layers)),
        *(_make_peft(init, rank, layers) for init in ("pissa_niter_4", "pissa_niter_16")),
    ]  # fmt: skip
    if is_full:
        contenders.append(Contender(
            "jlora adapt, stacked", functools.partial(_prepare_stacked, rank), "jlora",
            _describe_turns("the weights of one name as a batch; defaults", layers),
        ))  # fmt: skip
    if is_full and hidden <= _LARGEST_EXACT:
        contenders.append(_make_peft("pissa", rank, layers))
    return _make_model_group(hidden, layers, rank, dtype, contenders)


def make_cold_group(hidden, layers, rank, dtype):
    """Return the group of the first call, compilation included.

    It stands alone: emptying JAX's caches would make everybody beside it compile again.
    """
    contender = Contender(
        "jlora adapt, cold", functools.partial(_prepare_adapt, rank, cold=True), "jlora",
        _describe_turns("as jlora adapt, after jax.clear_caches()", layers), most_runs=3,
    )  # fmt: skip
    return _make_model_group(hidden, layers, rank, dtype, [contender])


class ModelWeights:
    """The weights of `layers` layers, put where each library wants them once for all contenders.

    arrays: {path: NumPy [m, n]}; turns: how often they are adapted, for a model of more layers.
    """

    def __init__(self, arrays, turns):
        self.arrays, self.turns = arrays, turns

    @functools.cached_property
    def in_jax(self):
        return jax.block_until_ready(jax.device_put(self.arrays))

    @functools.cached_property
    def in_torch(self):
        """The weights as torch's layers hold them, contiguous [n, m]."""
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return {
            path: to_torch(np.ascontiguousarray(array.T)).to(device)
            for path, array in self.arrays.items()
        }


def make_model(hidden, layers, dtype):
    """Return the `ModelWeights` of a Llama-shaped model.

    One spiked matrix is made for each shape. Every other one has its rows' signs flipped and its
    columns permuted at random: another matrix, of other singular vectors and the same singular
    values, at the cost of a pass.
    """
    wide = hidden * 43 // 16  # 11008 for 4096
    shapes = {"q": (hidden, hidden), "gate": (hidden, wide), "down": (wide, hidden)}
    bases = {
        name: make_matrix("spiked", *shape).astype(jnp.dtype(dtype))
        for name, shape in shapes.items()
    }
    rng = np.random.default_rng(0)
    arrays = {}
    for layer in range(min(layers, _LAYERS_AT_ONCE)):
        for first, names in (("q", _SQUARE), ("gate", _UP), ("down", _DOWN)):
            for name in names:
                arrays[f"layers/{layer}/{name}"] = _vary(rng, bases[first])
    return ModelWeights(arrays, -(-layers // _LAYERS_AT_ONCE))


def _vary(rng, a):
    signs = rng.choice(np.array([-1, 1], a.dtype), (len(a), 1))
    return np.take(a, rng.permutation(a.shape[1]), axis=1) * signs


def _make_model_group(hidden, layers, rank, dtype, contenders):
    numbers = layers * (len(_SQUARE) + (len(_UP) + len(_DOWN)) * 43 / 16) * hidden**2
    itemsize = jnp.dtype(dtype).itemsize
    name = (
        f"Llama-shaped, hidden {hidden}, {layers} layers, {7 * layers} matrices, "
        f"rank {rank}, {dtype}"
    )
    case = NamedCase(name, (hidden, hidden), Case("llama", "all", rank, dtype=dtype, layers=layers))
    return Group(
        SUITE, "pissa initialisation", case, lambda: (make_model(hidden, layers, dtype),),
        tuple(contenders), functools.partial(_measure_model, rank),
        # A sketch, a projection and the subtraction; each weight is read and its residual written.
        flops=6.0 * numbers * rank,
        bytes=2.0 * numbers * itemsize,
    )  # fmt: skip


def _describe_turns(setting, layers):
    if layers <= _LAYERS_AT_ONCE:
        return setting
    turns = -(-layers // _LAYERS_AT_ONCE)
    return f"{setting}; {_LAYERS_AT_ONCE} layers at a time, {turns} times"


def _prepare_adapt(rank, model, *, cold=False):
    params = model.in_jax
    plan = jlora.make_plan(params, jlora.Rule("layers", rank))
    return _prepare_turns(params, plan, model.turns, _read_factors, cold)


def _prepare_stacked(rank, model):
    names = [*_SQUARE, *_UP, *_DOWN]
    layers = len(model.arrays) // len(names)
    params = {
        name: jnp.stack([model.in_jax[f"layers/{layer}/{name}"] for layer in range(layers)])
        for name in names
    }
    plan = jlora.make_plan(params, jlora.Rule(".*", rank))

    def read(adapted):
        return {
            f"layers/{layer}/{name}": (weight.u[layer], weight.v[layer])
            for name, weight in adapted.items()
            for layer in range(layers)
        }

    return _prepare_turns(params, plan, model.turns, read, False)


def _prepare_turns(params, plan, turns, read, cold):
    """Prepare `adapt` of a whole tree, the result of each turn dropped before the next."""
    if not cold:
        _compile_shapes(params, plan)

    def run():
        if cold:
            jax.clear_caches()
        adapted = None
        for turn in range(turns):
            del adapted
            adapted = jax.block_until_ready(jlora.adapt(params, plan, key=jax.random.key(turn)))
        return adapted

    def fetch(adapted):
        # A run of its own: what is measured about memory would cost the timed ones time.
        return fetch_jax(read(adapted)), {} if cold else _measure_memory(run)

    return Prepared(run, fetch)


def _compile_shapes(params, plan):
    """Adapt one weight of each shape, so that the first run of all finds everything compiled.

    A run that takes seconds is the only one: the time to compile would be in it.
    """
    of_shape = {entry.shape: entry for entry in plan.entries}
    chosen = {entry.path: params[entry.path] for entry in of_shape.values()}
    entries = tuple(entry for entry in plan.entries if entry.path in chosen)
    jax.block_until_ready(jlora.adapt(chosen, jlora.Plan(entries), key=jax.random.key(0)))


def _read_factors(adapted):
    return {path: (weight.u, weight.v) for path, weight in adapted.items()}


def _measure_memory(run):
    """Return the most resident memory that a run needs above what there was, its result included.

    Nothing is returned off Linux, and on a device, whose memory is not the process's.
    """
    if jax.default_backend() != "cpu":
        return {}
    try:
        # What others freed goes back to the system first, or it would hide as much of ours.
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is set to the present
        before = _read_memory("VmRSS")
    except (OSError, AttributeError):
        return {}
    run()
    return {"extra GiB": (_read_memory("VmHWM") - before) / 2**30}


def _read_memory(field):
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def _make_peft(init, rank, layers):
    setting = (
        f"init_lora_weights={init!r}, lora_alpha = r; the modules around the weights are built "
        "and get_peft_model is run in each run"
    )
    return Contender(
        f"peft {init}", functools.partial(_prepare_peft, init, rank),
        setting=_describe_turns(setting, layers), requires=("peft", "torch"),
        most_runs=1 if init == "pissa" else None,
    )  # fmt: skip


def _prepare_peft(init, rank, model):
    import peft
    import torch

    torch.set_num_threads(count_threads())
    torch.manual_seed(0)
    weights = model.in_torch
    targets = [*_SQUARE, *_UP, *_DOWN]
    configure = functools.partial(peft.LoraConfig, r=rank, lora_alpha=rank, target_modules=targets)
    # What peft and torch import and set up at first use is not charged to the runs.
    peft.get_peft_model(
        _build_modules(dict([*weights.items()][:1])), configure(init_lora_weights="pissa_niter_1")
    )
    config = configure(init_lora_weights=init)

    def run():
        adapted = None
        for _ in range(model.turns):
            del adapted
            # Fresh modules each time: peft changes the layer, and never the weight's own memory.
            adapted = peft.get_peft_model(_build_modules(weights), config)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return adapted

    def fetch(adapted):
        layers = adapted.base_model.model
        return {path: _read_peft(layers.get_submodule(path.replace("/", "."))) for path in weights}

    return Prepared(run, lambda adapted: (fetch(adapted), {}))


def _build_modules(weights):
    """Return nested modules of one Linear a weight, which share the weights' memory."""
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


def _read_peft(layer):
    """Return (u, v) of a peft layer: the transposes of its A and B."""
    a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
    return a.T.float().cpu().numpy(), b.T.float().cpu().numpy()


def _measure_model(rank, inputs, result):
    """Return the excess over the optimum of the worst matrix of the first and the last layer."""
    (model,) = inputs
    factors, others = result
    last = f"layers/{len(model.arrays) // 7 - 1}/"
    worst, optima = -np.inf, {}
    for path, a in model.arrays.items():
        if path.startswith(("layers/0/", last)):
            if a.shape not in optima:  # one set of singular values a shape, see make_model
                optima[a.shape] = np.linalg.norm(compute_singular_values(a)[rank:])
            worst = max(worst, _measure_residual(a, *factors[path]) / optima[a.shape] - 1)
    return {"excess error": worst, **others}


def _measure_residual(a, u, v):
    return np.linalg.norm(a.astype(np.float64) - u.astype(np.float64) @ v.astype(np.float64))


# MiniLM: its embeddings, and a step of training it.


def make_embedding_group():
    """Return the group of the embeddings of a batch, against those of transformers."""
    needed = (minilm.PACKAGE, "torch", "transformers")  # the last for what ours is held against
    contenders = (
        Contender("jlora, plain weights", _prepare_embeddings, "jlora",
                  "jitted, matmul precision highest", needed),
        Contender("jlora, adapted weights", functools.partial(_prepare_embeddings, rank=16),
                  "jlora", "the same; pissa of rank 16 on all matrices of the layers", needed),
        Contender("transformers", _prepare_transformers, setting="AutoModel, eval, inference_mode",
                  requires=needed),
    )  # fmt: skip
    fields = Case("minilm-l6", "all", 0, "pretrained", layers=minilm.NUM_LAYERS, tokens=8 * 32)
    case = NamedCase("MiniLM-L6", (384, 384), fields)
    return Group(
        SUITE, "embed sentences", case, lambda: (minilm.load_minilm(), make_tokens(8, 32)),
        contenders, _measure_embeddings,
    )  # fmt: skip


def make_tokens(batch, time):
    """Return (ids, mask), int32 [batch, time]: random words, in sentences from half that length."""
    rng = np.random.default_rng(0)
    ids = rng.integers(999, 30522, (batch, time), dtype=np.int32)  # before 999: no words
    mask = (np.arange(time)[None] < np.linspace(time / 2, time, batch)[:, None]).astype(np.int32)
    return ids * mask, mask


def _prepare_embeddings(params, tokens, rank=None):
    params = params if rank is None else _adapt_layers(params, rank)
    # Full float32 is torch's default on every device, and not JAX's.
    with jax.default_matmul_precision("highest"):
        return prepare_jax(minilm.embed_sentences, params, *tokens)


def _adapt_layers(params, rank, **settings):
    plan = jlora.make_plan(params, jlora.Rule("layers/.*/w$", rank, **settings))
    return jlora.adapt(params, plan, key=jax.random.key(0))


def _prepare_transformers(params, tokens):
    import torch

    torch.set_num_threads(count_threads())
    embed = _load_transformers("cuda" if torch.cuda.is_available() else "cpu")

    def run():
        found = embed(tokens)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return found

    return Prepared(run, lambda found: found.cpu().numpy())


@functools.cache
def _load_transformers(device):
    """Return a function of (ids, mask), the embeddings by the transformers library."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = str(minilm.find_minilm())
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    model = model.eval().to(device)

    @torch.inference_mode()
    def embed(tokens):
        ids, mask = (torch.from_numpy(part).long().to(device) for part in tokens)
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].float()
        return torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=-1)

    return embed


def _measure_embeddings(inputs, found):
    expected = _load_transformers("cpu")(inputs[1]).numpy()
    return {"difference": np.abs(found - expected).max()}


def make_step_group(rank, pairs, time):
    """Return the group of one step of Adam on MiniLM, with a contrastive loss over pairs."""
    contenders = (
        _make_step("jlora V only", rank, init="pissa", part="v"),
        _make_step("jlora LoRA", rank, init="lora", part="uv"),
        Contender("jax full fine-tuning", _prepare_full_step, requires=(minilm.PACKAGE,),
                  setting="optax.adam on every weight, jlora.linear alone; the state is donated"),
    )  # fmt: skip
    name = f"MiniLM-L6, {pairs} pairs of {time} tokens, rank {rank}, float32"
    fields = Case("minilm-l6", "all", rank, "pretrained", layers=minilm.NUM_LAYERS,
                  tokens=2 * pairs * time)  # fmt: skip

    def make_inputs():
        params, tokens = minilm.load_minilm(), make_tokens(2 * pairs, time)
        return params, tokens, _compute_exact_loss(params, tokens)

    return Group(
        SUITE, "training step", NamedCase(name, (384, 384), fields), make_inputs, contenders,
        _measure_step, precision="default",
    )  # fmt: skip


def contrastive_loss(params, tokens):
    """Return the cross-entropy of finding each sentence's partner; pairs are i and i + half."""
    embeddings = minilm.embed_sentences(params, *tokens)
    first, second = jnp.split(embeddings, 2)
    logits = 20.0 * (first @ second.T)
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits)))


class _Step(NamedTuple):
    """What is judged of the first step."""

    loss: float
    num_trained: int
    optimizer_bytes: int


def _make_step(name, rank, **settings):
    setting = f"init {settings['init']!r}, part {settings['part']!r}, all matrices of the layers; "
    return Contender(
        name, functools.partial(_prepare_step, rank, settings), "jlora",
        setting + "jlora.train_step with optax.adam, the state is donated",
        requires=(minilm.PACKAGE,),
    )  # fmt: skip


def _prepare_step(rank, settings, params, tokens, exact_loss):
    optimizer = optax.adam(1e-4)
    state, frozen = jlora.init_train(_adapt_layers(params, rank, **settings), optimizer)

    def step(carried, frozen, tokens):
        return jlora.train_step(contrastive_loss, optimizer, carried[0], frozen, tokens)

    def fetch(result):
        state, loss = result
        return _Step(float(loss), *jlora.measure_cost(state))

    start = state, jnp.zeros((), jnp.float32)  # the place of the loss, which comes out beside it
    return prepare_jax(step, start, frozen, tokens, donate=(0,))._replace(fetch=fetch)


def _prepare_full_step(params, tokens, exact_loss):
    optimizer = optax.adam(1e-4)
    params = jax.tree.map(jnp.array, params)  # a copy: it is donated

    def step(carried, tokens):
        params, state, _ = carried
        loss, gradient = jax.value_and_grad(contrastive_loss)(params, tokens)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    def fetch(result):
        params, state, loss = result
        num_trained = sum(leaf.size for leaf in jax.tree.leaves(params))
        return _Step(float(loss), num_trained, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))

    start = params, optimizer.init(params), jnp.zeros((), jnp.float32)
    return prepare_jax(step, start, tokens, donate=(0,))._replace(fetch=fetch)


def _compute_exact_loss(params, tokens):
    """Return the loss of the plain weights in float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        return float(jax.jit(contrastive_loss)(params, tokens))


def _measure_step(inputs, step):
    exact = inputs[-1]
    return {
        "loss difference": abs(step.loss - exact) / abs(exact),
        "trained numbers": step.num_trained,
        "optimizer bytes": step.optimizer_bytes,
    }


# One linear layer: x w + (x u) v, and its gradients.


def make_layer_group(size, tokens, rank):
    """Return the group of one adapted square layer, forward and backward."""
    name = f"{size}×{size}, {tokens} tokens, rank {rank}, float32"
    fields = Case("none", "linear", rank, "normal", tokens=tokens)
    contenders = (
        Contender("jlora apply_factors", _prepare_factors, "jlora", "gradients of x, u and v"),
        Contender("qwix", _prepare_qwix, setting="LoraProvider on nnx.Linear, alpha = rank",
                  requires=("qwix", "flax")),
        Contender("flax nnx LoRALinear", functools.partial(_prepare_flax, wrapped=False),
                  setting="without bias", requires=("flax",)),
        Contender("flax nnx LoRA", functools.partial(_prepare_flax, wrapped=True),
                  setting="around nnx.Linear without bias", requires=("flax",)),
        Contender("jax plain", _prepare_plain,
                  setting="x @ w and the gradient of x alone: no adapter"),
    )  # fmt: skip
    return Group(
        SUITE, "lora layer forward+backward", NamedCase(name, (size, size), fields),
        lambda: make_layer(size, tokens, rank), contenders, _measure_layer,
        # What the plain layer needs, adapter aside: two products; each array moved once.
        flops=4.0 * tokens * size**2,
        bytes=4.0 * (size**2 + 4 * tokens * size),
        precision="default",
    )  # fmt: skip


def make_layer(size, tokens, rank):
    """Return float32 x [t, m], w [m, n], u [m, r], v [r, n] and the cotangent of y [t, n]."""
    rng = np.random.default_rng(0)
    shapes = (tokens, size), (size, size), (size, rank), (rank, size), (tokens, size)
    scales = 1, size**-0.5, size**-0.5, rank**-0.5, 1
    return tuple(
        np.float32(scale) * rng.standard_normal(shape, np.float32)
        for shape, scale in zip(shapes, scales, strict=True)
    )


def _prepare_factors(x, w, u, v, g):
    def run(x, w, u, v, g):
        y, pull = jax.vjp(lambda x, u, v: jlora.apply_factors(x, jlora.Factors(u, v), w), x, u, v)
        dx, du, dv = pull(g)
        return {"y": y, "dx": dx, "du": du, "dv": dv}

    return prepare_jax(run, x, w, u, v, g)


def _prepare_plain(x, w, u, v, g):
    def run(x, w, g):
        y, pull = jax.vjp(lambda x: x @ w, x)
        return {"plain y": y, "plain dx": pull(g)[0]}

    return prepare_jax(run, x, w, g)


def _prepare_flax(x, w, u, v, g, *, wrapped):
    from flax import nnx

    rngs, (m, n), rank = nnx.Rngs(0), w.shape, u.shape[-1]
    if wrapped:
        inner = nnx.Linear(m, n, use_bias=False, rngs=rngs)
        layer = lora = nnx.LoRA(m, rank, n, base_module=inner, rngs=rngs)
    else:
        inner = layer = nnx.LoRALinear(m, n, lora_rank=rank, use_bias=False, rngs=rngs)
        lora = layer.lora
    inner.kernel[...] = w
    lora.lora_a[...], lora.lora_b[...] = u, v
    return _prepare_nnx(layer, x, g)


def _prepare_qwix(x, w, u, v, g):
    import qwix
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(*w.shape, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    rank = u.shape[-1]
    provider = qwix.LoraProvider(module_path=".*linear", rank=rank, alpha=float(rank))
    layer = qwix.apply_lora_to_model(Model(nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1))
    layer.linear.kernel[...] = w
    layer.linear.kernel_lora_a[...], layer.linear.kernel_lora_b[...] = u, v
    return _prepare_nnx(layer, x, g)


def _prepare_nnx(layer, x, g):
    """Prepare an nnx layer whose adapters are the only nnx.LoRAParam in it."""
    from flax import nnx

    graph, factors, rest = nnx.split(layer, nnx.LoRAParam, ...)

    def run(factors, rest, x, g):
        y, pull = jax.vjp(lambda x, factors: nnx.merge(graph, factors, rest)(x), x, factors)
        dx, gradients = pull(g)
        du, dv = jax.tree.leaves(gradients)  # in the order of their names: ..._a, ..._b
        return {"y": y, "dx": dx, "du": du, "dv": dv}

    return prepare_jax(run, factors, rest, x, g)


def _measure_layer(inputs, found):
    x, w, u, v, g = (part.astype(np.float64) for part in inputs)
    expected = {
        "plain y": x @ w, "plain dx": g @ w.T,
        "y": x @ w + (x @ u) @ v, "dx": g @ w.T + (g @ v.T) @ u.T,
        "du": x.T @ (g @ v.T), "dv": (x @ u).T @ g,
    }  # fmt: skip
    differences = {
        name: np.linalg.norm(value - expected[name]) / np.linalg.norm(expected[name])
        for name, value in found.items()
    }
    return {"relative error": max(differences.values()), **differences}
