"""Groups of the adaptation suite: all weights of a model → first factors and residuals."""

import ctypes
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from benchmarks.run.cases import Case, NamedCase
from benchmarks.run.harness import Contender, Group, Prepared
from benchmarks.run.matrices import make_matrix
from benchmarks.run.preparation import (
    fetch_jax,
    fetch_torch,
    set_up_torch,
    to_torch,
    wait_for_torch,
)
from benchmarks.run.svd_errors import compute_singular_values

SUITE = "adaptation"
# A layer of Llama: four square projections, and the three of a gated MLP 2.6875 times as wide.
_SQUARE, _UP, _DOWN = ("q", "k", "v", "o"), ("gate", "up"), ("down",)
_LAYERS_AT_ONCE = 8
# Above this hidden size peft's exact decomposition of a whole model takes more than minutes.
_LARGEST_EXACT = 2048


def make_model_group(hidden, layers, rank, dtype, *, is_full):
    """Return the group of the PiSSA initialisation of all weights of a Llama-shaped model."""
    contenders = [
        Contender(
            "jlora adapt",
            functools.partial(_prepare_adapt, rank),
            "jlora",
            _describe_turns("all weights of the tree in one call; defaults", layers),
        ),
        *(
            _make_peft(init, rank, layers)
            for init in ("pissa_niter_4", "pissa_niter_16")
        ),
    ]
    if is_full:
        contenders.append(
            Contender(
                "jlora adapt, stacked",
                functools.partial(_prepare_stacked, rank),
                "jlora",
                _describe_turns(
                    "the weights of one name as one stack; defaults", layers
                ),
            )
        )
    if is_full and hidden <= _LARGEST_EXACT:
        contenders.append(_make_peft("pissa", rank, layers))
    return _make_model_group(hidden, layers, rank, dtype, contenders)


def make_cold_group(hidden, layers, rank, dtype):
    """Return the group of the first call, compilation included.

    It stands alone: emptying JAX's caches would make everybody beside it compile again.
    """
    contender = Contender(
        "jlora adapt, cold",
        functools.partial(_prepare_adapt, rank, cold=True),
        "jlora",
        _describe_turns("as jlora adapt, after jax.clear_caches()", layers),
        most_runs=3,
    )
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
        return {
            path: to_torch(np.ascontiguousarray(array.T))
            for path, array in self.arrays.items()
        }


def make_model(hidden, layers, dtype):
    """Return the `ModelWeights` of a Llama-shaped model.

    One spiked matrix is made for each shape. Every other one has its rows' signs flipped and its
    columns permuted at random: another matrix, of other singular vectors and the same singular
    values, at the cost of a pass.
    """
    shapes = list_layer_shapes(hidden)
    bases = {
        shape: make_matrix("spiked", *shape).astype(jnp.dtype(dtype))
        for shape in dict.fromkeys(shapes.values())
    }
    rng = np.random.default_rng(0)
    arrays = {}
    for layer in range(min(layers, _LAYERS_AT_ONCE)):
        for name, shape in shapes.items():
            arrays[f"layers/{layer}/{name}"] = _vary(rng, bases[shape])
    return ModelWeights(arrays, -(-layers // _LAYERS_AT_ONCE))


def list_layer_shapes(hidden):
    """Return {name: (m, n)} of the weights of one layer."""
    wide = hidden * 43 // 16  # 11008 for 4096
    of_kind = (
        (_SQUARE, (hidden, hidden)),
        (_UP, (hidden, wide)),
        (_DOWN, (wide, hidden)),
    )
    return {name: shape for names, shape in of_kind for name in names}


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
    case = NamedCase(
        name, (hidden, hidden), Case("llama", "all", rank, dtype=dtype, layers=layers)
    )
    return Group(
        SUITE,
        "pissa initialisation",
        case,
        lambda: (make_model(hidden, layers, dtype),),
        tuple(contenders),
        functools.partial(_measure_model, rank),
        # A sketch, a projection and the subtraction; each weight is read and its residual written.
        flops=6.0 * numbers * rank,
        bytes=2.0 * numbers * itemsize,
    )


def _describe_turns(setting, layers):
    if layers <= _LAYERS_AT_ONCE:
        return setting
    turns = -(-layers // _LAYERS_AT_ONCE)
    return f"{setting}; {_LAYERS_AT_ONCE} layers at a time, {turns} times"


def _prepare_adapt(rank, model, *, cold=False):
    params = model.in_jax
    plan = jlora.make_plan(params, jlora.Rule("layers", rank))
    judge = None if cold else _judge_tree
    return _prepare_turns(params, plan, model.turns, _read_factors, judge)


def _prepare_stacked(rank, model):
    names = [*_SQUARE, *_UP, *_DOWN]
    layers = len(model.arrays) // len(names)
    params = {
        name: jnp.stack(
            [model.in_jax[f"layers/{layer}/{name}"] for layer in range(layers)]
        )
        for name in names
    }
    plan = jlora.make_plan(params, jlora.Rule(".*", rank))

    def read(adapted):
        return {
            f"layers/{layer}/{name}": (weight.u[layer], weight.v[layer])
            for name, weight in adapted.items()
            for layer in range(layers)
        }

    return _prepare_turns(params, plan, model.turns, read, _measure_both_memories)


def _prepare_turns(params, plan, turns, read, judge):
    """Prepare `adapt` of a whole tree, the result of each turn dropped before the next.

    judge(params, plan) gives what else is recorded; None: compile anew in each run.
    """
    if judge is not None:
        _compile_shapes(params, plan)

    def run():
        if judge is None:
            jax.clear_caches()
        adapted = None
        for turn in range(turns):
            del adapted
            adapted = jax.block_until_ready(
                jlora.adapt(params, plan, key=jax.random.key(turn))
            )
        return adapted

    def fetch(adapted):
        factors = fetch_jax(read(adapted))
        del adapted
        # Runs of their own: what is measured about memory would cost the timed ones time.
        return factors, {} if judge is None else judge(params, plan)

    return Prepared(run, fetch)


def _compile_shapes(params, plan):
    """Adapt one weight of each shape, so that the first run of all finds everything compiled.

    A run that takes seconds is the only one: the time to compile would be in it.
    """
    of_shape = {entry.shape: entry for entry in plan.entries}
    chosen = {entry.path: params[entry.path] for entry in of_shape.values()}
    entries = tuple(entry for entry in plan.entries if entry.path in chosen)
    jax.block_until_ready(
        jlora.adapt(chosen, jlora.adaptation.Plan(entries), key=jax.random.key(0))
    )


def _read_factors(adapted):
    return {path: (weight.u, weight.v) for path, weight in adapted.items()}


def _judge_tree(params, plan):
    """Return the memory needed, and how many weights depend on more than themselves."""
    one, again = (jlora.adapt(params, plan, key=jax.random.key(0)) for _ in range(2))
    repeated = sum(_differs(one[path], again[path]) for path in one)
    del again
    entries = tuple(
        entry for entry in plan.entries if not entry.path.startswith("layers/0/")
    )
    fewer = {entry.path: params[entry.path] for entry in entries}
    alone = jlora.adapt(fewer, jlora.adaptation.Plan(entries), key=jax.random.key(0))
    influenced = sum(_differs(one[path], alone[path]) for path in alone)
    del one, alone
    return {
        **_measure_both_memories(params, plan),
        "weights changed by repeating": repeated,
        "weights changed by another layer": influenced,
    }


def _differs(one, other):
    """Say whether two adapted weights differ in a bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return not all(bool(jnp.array_equal(a, b)) for a, b in pairs)


def _measure_both_memories(params, plan):
    """Return the memory above the weights that they need: giving way, as peft's do, and kept."""
    key = jax.random.key(0)

    def give_way(copies):
        return jlora.adapt(copies, plan, key=key, donate=True)

    def copy_weights():
        return jax.block_until_ready(jax.tree.map(jnp.copy, params))

    give_way(copy_weights())  # compiled before it is measured
    given = _measure_memory(functools.partial(give_way, copy_weights()))
    kept = _measure_memory(lambda: jlora.adapt(params, plan, key=key))
    return (
        {"extra GiB": given, "extra GiB, weights kept": kept}
        if kept is not None
        else {}
    )


def _measure_memory(run):
    """Return the most resident memory that a run needs above what there was, its result included.

    None off Linux, and on a device, whose memory is not the process's.
    """
    if jax.default_backend() != "cpu":
        return None
    try:
        # What others freed goes back to the system first, or it would hide as much of ours.
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text(
            "5"
        )  # the peak is set to the present
        before = _read_memory("VmRSS")
    except (OSError, AttributeError):
        return None
    result = jax.block_until_ready(run())
    peak = _read_memory("VmHWM")
    del result
    return (peak - before) / 2**30


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
        f"peft {init}",
        functools.partial(_prepare_peft, init, rank),
        setting=_describe_turns(setting, layers),
        requires=("peft", "torch"),
        most_runs=1 if init == "pissa" else None,
    )


def _prepare_peft(init, rank, model):
    import peft

    set_up_torch()
    weights = model.in_torch
    targets = [*_SQUARE, *_UP, *_DOWN]
    configure = functools.partial(
        peft.LoraConfig, r=rank, lora_alpha=rank, target_modules=targets
    )
    # What peft and torch import and set up at first use is not charged to the runs.
    peft.get_peft_model(
        _build_modules(dict([*weights.items()][:1])),
        configure(init_lora_weights="pissa_niter_1"),
    )
    config = configure(init_lora_weights=init)

    def run():
        adapted = None
        for _ in range(model.turns):
            del adapted
            # Fresh modules each time: peft changes the layer, and never the weight's own memory.
            adapted = peft.get_peft_model(_build_modules(weights), config)
        return wait_for_torch(adapted)

    def fetch(adapted):
        layers = adapted.base_model.model
        return {
            path: _read_peft(layers.get_submodule(path.replace("/", ".")))
            for path in weights
        }

    return Prepared(run, lambda adapted: (fetch(adapted), {}), pool="torch")


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
    a, b = (
        fetch_torch(part["default"].weight) for part in (layer.lora_A, layer.lora_B)
    )
    return a.T, b.T


def _measure_model(rank, inputs, result):
    """Return the excess over the optimum of the worst matrix of the first and the last layer."""
    (model,) = inputs
    factors, others = result
    last = f"layers/{len(model.arrays) // 7 - 1}/"
    worst, optima = -np.inf, {}
    for path, a in model.arrays.items():
        if path.startswith(("layers/0/", last)):
            if (
                a.shape not in optima
            ):  # one set of singular values a shape, see make_model
                optima[a.shape] = np.linalg.norm(compute_singular_values(a)[rank:])
            worst = max(
                worst, _measure_residual(a, *factors[path]) / optima[a.shape] - 1
            )
    return {"excess error": worst, **others}


def _measure_residual(a, u, v):
    return np.linalg.norm(
        a.astype(np.float64) - u.astype(np.float64) @ v.astype(np.float64)
    )
