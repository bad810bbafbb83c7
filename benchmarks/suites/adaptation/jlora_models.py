"""jlora.adapt on all weights of a model: its time, its memory, its independence."""

import functools

import jax
import jax.numpy as jnp

import jlora
from benchmarks.run.contenders import Prepared
from benchmarks.run.preparation import fetch_jax
from benchmarks.suites.adaptation.llama_weights import WEIGHT_NAMES
from benchmarks.suites.adaptation.memory import measure_memory


def prepare_adapt(rank, model):
    """Return the adaptation of a model as one tree, compiled."""
    params = model.in_jax
    plan = jlora.make_plan(params, jlora.Rule("layers", rank))
    _compile_shapes(params, plan)
    return _prepare(params, plan, model.num_repeats, _read_factors, _judge_tree)


def prepare_cold(rank, model):
    """Return the adaptation of a model, compiled anew in each run."""
    params = model.in_jax
    plan = jlora.make_plan(params, jlora.Rule("layers", rank))

    def judge_nothing(params, plan):
        return {}

    return _prepare(
        params, plan, model.num_repeats, _read_factors, judge_nothing, is_cold=True
    )


def prepare_stacked(rank, model):
    """Return the adaptation of a model whose weights of one name are stacked."""
    layers = range(model.num_layers)
    params = {}
    for name in WEIGHT_NAMES:
        weights = [model.in_jax[f"layers/{layer}/{name}"] for layer in layers]
        params[name] = jnp.stack(weights)
    plan = jlora.make_plan(params, jlora.Rule(".*", rank))

    def read(adapted):
        return {
            f"layers/{layer}/{name}": (weight.u[layer], weight.v[layer])
            for name, weight in adapted.items()
            for layer in layers
        }

    _compile_shapes(params, plan)
    return _prepare(params, plan, model.num_repeats, read, _measure_both_memories)


def _prepare(params, plan, num_repeats, read, judge, *, is_cold=False):
    """Prepare the adaptation of a whole tree, repeated.

    Args:
        read: adapted tree → {path: (u, v)}.
        judge: (params, plan) → other values to record beside the error.
        is_cold: Empty JAX's caches before each run.
    """

    def run():
        if is_cold:
            jax.clear_caches()
        adapted = None
        for repeat in range(num_repeats):
            del adapted  # before the next one needs memory
            key = jax.random.key(repeat)
            adapted = jax.block_until_ready(jlora.adapt(params, plan, key=key))
        return adapted

    def fetch(adapted):
        factors = fetch_jax(read(adapted))
        del adapted
        # These runs are not timed: to measure memory takes time.
        return factors, judge(params, plan)

    return Prepared(run, fetch)


def _compile_shapes(params, plan):
    """Adapt one weight of each shape, so that the first timed run compiles nothing.

    A run that takes seconds is not repeated, and would include the time to compile.
    """
    of_shape = {entry.shape: entry for entry in plan.entries}
    chosen = {entry.path: params[entry.path] for entry in of_shape.values()}
    _adapt_some(chosen, [entry for entry in plan.entries if entry.path in chosen])


def _adapt_some(params, entries):
    plan = jlora.adaptation.Plan(tuple(entries))
    return jax.block_until_ready(jlora.adapt(params, plan, key=jax.random.key(0)))


def _read_factors(adapted):
    return {path: (weight.u, weight.v) for path, weight in adapted.items()}


def _judge_tree(params, plan):
    """Return the memory needed, and the numbers of weights that are not reproduced."""
    one, again = (jlora.adapt(params, plan, key=jax.random.key(0)) for _ in range(2))
    repeated = sum(_differ(one[path], again[path]) for path in one)
    del again

    # Without the first layer, the other weights must be the same to the bit.
    entries = [each for each in plan.entries if not each.path.startswith("layers/0/")]
    fewer = _adapt_some({entry.path: params[entry.path] for entry in entries}, entries)
    influenced = sum(_differ(one[path], fewer[path]) for path in fewer)
    del one, fewer

    return {
        **_measure_both_memories(params, plan),
        "weights changed by repeating": repeated,
        "weights changed by another layer": influenced,
    }


def _differ(one, other):
    """Say whether two adapted weights differ in a bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return not all(bool(jnp.array_equal(a, b)) for a, b in pairs)


def _measure_both_memories(params, plan):
    """Return the memory needed above the weights, with the weights donated and kept.

    PEFT replaces the weights too: compare it with the donated ones.
    """
    key = jax.random.key(0)

    def adapt_donated(copies):
        return jlora.adapt(copies, plan, key=key, donate=True)

    def copy_weights():
        return jax.block_until_ready(jax.tree.map(jnp.copy, params))

    adapt_donated(copy_weights())  # compile it before it is measured
    donated = measure_memory(functools.partial(adapt_donated, copy_weights()))
    kept = measure_memory(lambda: jlora.adapt(params, plan, key=key))
    if kept is None:
        return {}
    return {"extra GiB": donated, "extra GiB, weights kept": kept}
