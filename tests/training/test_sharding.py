"""Training on meshes: the numbers of one device, sharded state, thin traffic."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jlora
from tests.helpers.collectives import list_collectives
from tests.helpers.meshes import assert_close, enter, list_entries, make_mesh, put

pytestmark = pytest.mark.usefixtures("standard_promotion")

KEY = jax.random.key(0)
HIDDEN, INNER, ROWS, RANK = 64, 96, 16, 4


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / shape[0] ** 0.5


PARAMS = {"up": draw(0, HIDDEN, INNER), "down": draw(1, INNER, HIDDEN)}
BATCH = draw(2, ROWS, HIDDEN), draw(3, ROWS, HIDDEN)
# Tensor parallel: the inner axis is sharded. FSDP: the first axis, over all devices.
PLACES = {
    "tensor parallel": {"up": (None, "model"), "down": ("model",)},
    "fsdp": {"up": (("data", "model"),), "down": (("data", "model"),)},
}


def run_block(params, x):
    hidden = jax.nn.gelu(jlora.linear(x, params["up"]))
    return jlora.linear(hidden, params["down"])


def make_loss(apply):
    def loss(params, batch):
        x, y = batch
        return jnp.mean((apply(params, x) - y) ** 2)

    return loss


def run_plain(params, x):
    return jax.nn.gelu(x @ params["up"]) @ params["down"]


def place(mesh, where):
    places = PLACES[where]
    params = {path: put(w, mesh, *places[path]) for path, w in PARAMS.items()}
    return params, tuple(put(part, mesh, "data") for part in BATCH)


def adapt(params, **settings):
    plan = jlora.make_plan(params, jlora.Rule(".", RANK, trainable="uv", **settings))
    return jlora.adapt(params, plan, key=KEY)


def fit(loss, adapted, batch):
    optimizer = optax.adam(1e-2)
    return jlora.fit(loss, adapted, optimizer, [batch] * 4, progress=False)


@pytest.mark.parametrize("kind", ["automatic", "explicit"])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("settings", [{}, {"init": "lora", "quantize": "int8"}])
def test_training_gives_the_numbers_of_one_device(where, kind, settings):
    mesh = make_mesh(kind)
    params, batch = place(mesh, where)
    loss = make_loss(run_block)
    expected = fit(loss, adapt(PARAMS, **settings), BATCH)
    adapted = adapt(params, **settings)
    with enter(mesh):
        found = fit(loss, adapted, batch)
    # Sums over 64 and 96 numbers in another order, four steps of Adam.
    assert_close(found.losses, expected.losses, 1e-4)
    if kind == "automatic":
        return  # the partitioner chooses the sharding of the trained factors
    for path, w in found.adapted.items():
        assert list_entries(w.u) == list_entries(adapted[path].u)
        assert list_entries(w.v) == list_entries(adapted[path].v)


def test_a_lifted_model_trains_as_on_one_device():
    params, batch = place(make_mesh(), "tensor parallel")
    loss = make_loss(jlora.lift(run_plain))
    expected = fit(loss, adapt(PARAMS), BATCH)
    assert_close(fit(loss, adapt(params), batch).losses, expected.losses, 1e-4)


def test_weights_are_adapted_under_a_mesh_too():
    mesh = make_mesh("explicit")
    params, _ = place(mesh, "tensor parallel")
    with enter(mesh):
        found = adapt(params)
    expected = adapt(params)
    assert_close(
        (found["up"].u, found["up"].v), (expected["up"].u, expected["up"].v), 0
    )


def test_the_state_of_an_optimizer_is_sharded_as_its_factors():
    params, _ = place(make_mesh(), "tensor parallel")
    adapted = adapt(params)
    state = jlora.init_train(adapted, optax.adam(1e-2))
    factors = jax.tree.leaves(jlora.split_trainable(adapted)[0])
    entries = {list_entries(factor) for factor in factors}
    assert (None, "model") in entries
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 2]
    # The factors themselves, and two moments of each.
    counts = {entry: 0 for entry in entries}
    for leaf in moments:
        counts[list_entries(leaf)] += 1
    per_factor = {entry: 0 for entry in entries}
    for factor in factors:
        per_factor[list_entries(factor)] += 1
    for entry, num in per_factor.items():
        assert counts[entry] >= 2 * num


def test_a_step_moves_factors_and_activations_but_no_weight():
    params, batch = place(make_mesh(), "tensor parallel")
    adapted = adapt(params)
    loss = make_loss(run_block)
    trained, frozen = jlora.split_trainable(adapted)

    def measure(trained, batch):
        return loss(jlora.join(trained, frozen), batch)

    program = jax.jit(jax.value_and_grad(measure)).lower(trained, batch).compile()
    collectives = list_collectives(program)
    assert collectives
    # The largest array that crosses devices: activations, or the gradient of a factor.
    limit = max(ROWS * INNER, RANK * INNER)
    assert all(one.num_elements <= 2 * limit for one in collectives), collectives
    assert all(one.num_elements < HIDDEN * INNER for one in collectives)
