"""`adapt` on meshes: the bits of one device, the weights' own sharding, its cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding

import jlora
from jlora.adaptation import dealing, mesh_groups
from jlora.adaptation.placements import Placement
from jlora.adaptation.programs import InitSpec
from jlora.initializers import InitialFactors
from tests.helpers.collectives import check_none, list_collectives
from tests.helpers.meshes import assert_close, enter, list_entries, make_mesh, put

KEY = jax.random.key(3)
RANK = 4


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {
    "stack": draw(0, 8, 96, 64),
    "odd": draw(1, 5, 96, 64),
    "a": draw(2, 96, 64),
    "b": draw(3, 96, 64),
    "c": draw(4, 96, 64),
    "oi": draw(5, 8, 64, 96),
}
EVERYWHERE = ("data", "model")
PLACES = {
    "over layers": {"stack": (EVERYWHERE,), "oi": (EVERYWHERE,)},
    "inside": {
        "stack": (None, "model", "data"),
        "odd": (None, None, "model"),
        "a": ("model",),
        "b": (None, "model"),
        "c": ("data", "model"),
        "oi": (None, "model"),
    },
    "both": {
        "stack": ("data", "model"),
        "odd": (None, "model"),
        "a": ("model",),
        "b": ("model",),
        "c": ("model",),
        "oi": ("model", None, "data"),
    },
}


def place(mesh, places):
    return {path: put(w, mesh, *places.get(path, ())) for path, w in PARAMS.items()}


def make_rules(**settings):
    return [
        jlora.Rule("oi", RANK, layout="oi", **settings),
        jlora.Rule(".", RANK, **settings),
    ]


def adapt(params, mesh=None, **settings):
    rules = make_rules(**settings)
    plan = jlora.make_plan(params, rules if "oi" in params else rules[1:])
    return jlora.adapt(params, plan, key=KEY, mesh=mesh)


def assert_same_bits(found, expected):
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def assert_factors_follow(w, plain, layout):
    """Check that u is sharded as the inputs, v as the outputs, and base as before."""
    *batch, first, second = list_entries(plain)
    m, n = (second, first) if layout == "oi" else (first, second)
    assert list_entries(w.u) == (*batch, m, None)
    assert list_entries(w.v) == (*batch, None, n)
    assert w.base.sharding.is_equivalent_to(plain.sharding, plain.ndim)
    assert w.scale.sharding.is_fully_replicated


@pytest.mark.parametrize("kind", ["automatic", "explicit"])
@pytest.mark.parametrize("where", PLACES)
def test_whole_matrices_of_a_device_have_the_bits_of_one_device(where, kind):
    params = place(make_mesh(kind), PLACES[where])
    expected = adapt(PARAMS)
    found = adapt(params)
    assert_same_bits(found, expected)
    for path, w in found.items():
        assert_factors_follow(w, params[path], w.layout)


@pytest.mark.parametrize("init", ["lora", "milora", "olora", "loftq"])
def test_other_initializers_do_so_too(init):
    params = place(make_mesh(), PLACES["inside"])
    found = adapt(params, init=init, parallel="exchange")
    assert_same_bits(found, adapt(PARAMS, init=init))
    if init == "lora":
        assert all(found[path].base is w for path, w in params.items())


@pytest.mark.parametrize("kind", ["automatic", "explicit"])
@pytest.mark.parametrize("init", ["pissa", "lora_xs"])
def test_matrices_that_stay_sharded_are_equal_to_rounding(init, kind):
    params = place(make_mesh(kind), PLACES["inside"])
    found = adapt(params, init=init, parallel="matrix")
    expected = adapt(PARAMS, init=init)
    # The singular vectors of a Gaussian matrix are close to multiple ones, so products
    # are compared. Sums of 96 numbers in another order.
    for path, w in found.items():
        assert_close(w.u @ w.v, expected[path].u @ expected[path].v, 1e-4)
        assert_close(w.base, expected[path].base, 1e-4)
        assert_factors_follow(w, params[path], w.layout)


def test_an_initializer_of_a_user_gets_whole_matrices():
    def first_rows(w, rank, *, scale, key, data=None):
        u = jnp.eye(w.shape[-2], rank)
        factors = jlora.Factors(u, w[..., :rank, :] / scale)
        return InitialFactors.from_residual(w, factors, scale)

    params = place(make_mesh(), PLACES["inside"])
    assert_same_bits(adapt(params, init=first_rows), adapt(PARAMS, init=first_rows))


@pytest.mark.parametrize("parallel", ["exchange", "matrix"])
def test_a_quantised_base_is_sharded_as_its_weight(parallel):
    params = place(make_mesh(), PLACES["inside"])
    found = adapt(params, init="lora", quantize="int8", parallel=parallel)
    expected = adapt(PARAMS, init="lora", quantize="int8")
    assert_same_bits(found, expected)
    # Codes are stored as [outputs, inputs].
    *batch, m, n = list_entries(params["stack"])
    assert list_entries(found["stack"].base.codes) == (*batch, n, m)


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray], ids=["device", "host"])
def test_weights_of_one_device_are_dealt_out_and_return(kind):
    params = {path: kind(w) for path, w in PARAMS.items()}
    expected = adapt(params)
    found = adapt(params, mesh=make_mesh())
    assert_same_bits(found, expected)
    for path, w in found.items():
        assert type(w.base) is type(expected[path].base)
        assert w.u.sharding == expected[path].u.sharding


@pytest.mark.parametrize("kind", ["automatic", "explicit"])
@pytest.mark.parametrize(("path", "where"), [("stack", "over layers"), ("c", "inside")])
def test_a_traced_adapt_gives_the_same(path, where, kind):
    # One weight for each program, and no stack of matrices that are sharded themselves:
    # the collectives of independent matrices may wait for each other for ever on eight
    # virtual devices with few cores.
    params = {path: place(make_mesh(kind), PLACES[where])[path]}
    plan = jlora.make_plan(params, jlora.Rule(".", RANK))
    with enter(params[path].sharding.mesh):
        found = jax.jit(lambda p, key: jlora.adapt(p, plan, key=key))(params, KEY)
    w = jax.block_until_ready(found[path])
    expected = jlora.adapt({path: PARAMS[path]}, plan, key=KEY)[path]
    assert_close(w.u @ w.v, expected.u @ expected.v, 1e-4)
    if kind == "explicit":
        assert_factors_follow(w, params[path], w.layout)


def test_donated_weights_give_their_buffers():
    params = place(make_mesh(), PLACES["both"])
    pointers = {
        path: {s.data.unsafe_buffer_pointer() for s in w.addressable_shards}
        for path, w in params.items()
    }
    plan = jlora.make_plan(params, make_rules())
    found = jlora.adapt(params, plan, key=KEY, donate=True)
    assert_same_bits(found, adapt(PARAMS))
    assert all(w.is_deleted() for w in params.values())
    reused = {
        s.data.unsafe_buffer_pointer() for s in found["stack"].base.addressable_shards
    }
    assert reused == pointers["stack"]


# Compiled programs.


def compile_stack(num, mesh, *entries):
    placement = Placement(mesh, (*entries, *(None,) * (3 - len(entries))), "layers")
    rule = jlora.Rule(".", RANK)
    spec = InitSpec(rule.initializer, RANK, "io")
    run = dealing.compile_dealt_stack(spec, placement, "io", donate=False)
    sharding = NamedSharding(mesh, jax.P(*entries))
    stack = jax.ShapeDtypeStruct((num, 96, 64), jnp.float32, sharding=sharding)
    keys = jax.random.split(KEY, num)
    return run.lower(stack, jnp.ones(()), keys, None).compile()


def test_layers_have_no_collective_and_an_eighth_of_the_work():
    mesh = make_mesh()
    program = compile_stack(8, mesh, EVERYWHERE)
    check_none(program)
    one = jax.make_mesh((1, 1), ("data", "model"), axis_types=mesh.axis_types)
    whole = compile_stack(8, one, EVERYWHERE)
    # On one device the eight matrices are a loop, whose body is counted once.
    flops = program.cost_analysis()["flops"]
    assert flops == pytest.approx(whole.cost_analysis()["flops"], rel=0.02)


def test_an_exchange_moves_a_weight_by_all_to_all_only():
    program = compile_stack(8, make_mesh(sizes=(1, 8)), None, "model")
    collectives = list_collectives(program)
    # One there, and one back for the residual; u returns by rows, v is gathered whole.
    wide = [one for one in collectives if one.num_elements >= 96 * 64]
    assert [one.kind for one in wide] == ["all-to-all"] * 2


def test_stacks_of_one_shape_share_a_program():
    mesh = make_mesh()
    params = {name: put(PARAMS["stack"], mesh, EVERYWHERE) for name in "abcd"}
    run = dealing.compile_dealt_stack
    run.cache_clear()
    adapt(params)
    assert run.cache_info().misses == 1
    assert run.cache_info().hits == 3


# The plan, and refusals.


def make_abstract(spec, *shape):
    mesh = AbstractMesh((8, 8), ("data", "model"))
    sharding = NamedSharding(mesh, jax.P(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)


def test_a_plan_says_which_way_and_its_cost():
    params = {
        "layers": make_abstract((("data", "model"),), 64, 8192, 8192),
        "sharded": make_abstract((None, "data", "model"), 64, 8192, 8192),
        "huge": make_abstract(("data", "model"), 131072, 65536),
    }
    mesh = params["huge"].sharding.mesh
    rates = "v5e"
    plan = jlora.make_plan(params, jlora.Rule(".", 64), mesh=mesh, rates=rates)
    ways = {way.weights[0].path: way.cost for way in plan.list_ways()}
    assert {path: cost.parallel for path, cost in ways.items()} == {
        "layers": "layers",
        "sharded": "exchange",
        "huge": "matrix",
    }
    assert ways["layers"].num_bytes == 0 < ways["sharded"].num_bytes
    assert ways["layers"].flops == ways["sharded"].flops
    # There and back: all of a matrix but the eighth of an eighth that is there already.
    assert ways["sharded"].num_bytes == 2 * 2 * 8192**2 * 63 / 64

    text = str(plan).splitlines()
    assert "on a mesh of 64 devices (data 8 × model 8), for each device:" in text
    assert any("131072×65536" in line and "matrix" in line for line in text)
    assert hash(plan) == hash(
        jlora.make_plan(params, jlora.Rule(".", 64), mesh=mesh, rates=rates)
    )


def test_a_way_can_be_forced():
    params = {"w": put(PARAMS["stack"], make_mesh(), None, "model")}
    for parallel in ("exchange", "matrix"):
        plan = jlora.make_plan(
            params, jlora.Rule("w", RANK, parallel=parallel), mesh=make_mesh()
        )
        assert [way.cost.parallel for way in plan.list_ways()] == [parallel]


def test_ways_that_a_sharding_does_not_allow_are_refused():
    inside = {"w": put(PARAMS["stack"], make_mesh(), None, "model")}
    with pytest.raises(
        ValueError,
        match=r"^w: `parallel` must be 'exchange' or 'matrix' for matrices that are "
        r"sharded themselves \(4 shards\), got 'layers'\.",
    ):
        adapt(inside, parallel="layers")
    over = {"w": put(PARAMS["stack"], make_mesh(), "model")}
    with pytest.raises(
        ValueError,
        match=r"^w: `parallel` must be 'layers' or 'exchange' for a stack that is "
        r"sharded along its batch axes, got 'matrix'\.",
    ):
        adapt(over, parallel="matrix")
    with pytest.raises(
        ValueError, match=r"^`parallel` must be one of .*, got 'rows'\."
    ):
        jlora.Rule("w", RANK, parallel="rows")


def test_meshes_of_other_devices_are_refused():
    few = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ("x",))
    params = {"a": put(PARAMS["a"], make_mesh()), "b": put(PARAMS["b"], few)}
    with pytest.raises(
        ValueError,
        match=r"^b: `params` must lie on meshes of the same devices, got another set "
        r"than at a\. Move one with jax\.device_put\.",
    ):
        adapt(params)
    with pytest.raises(TypeError, match=r"^`mesh` must be a mesh of JAX, got int\."):
        adapt(PARAMS, mesh=3)
    with pytest.raises(ValueError, match=r"^`rates` must be one of .*, got 'a100'\."):
        jlora.make_plan(PARAMS, make_rules(), mesh=make_mesh(), rates="a100")


def test_nan_in_one_layer_is_named():
    for places in PLACES.values():
        stack = PARAMS["stack"].at[5, 3, 2].set(jnp.nan)
        params = {"w": put(stack, make_mesh(), *places["stack"])}
        with pytest.raises(ValueError, match=r"^`w` must be finite, got 1 NaN or Inf"):
            adapt(params)


def test_a_tied_array_is_not_donated():
    w = PARAMS["a"] + 0
    params = {"embedding": w, "head": w}
    plan = jlora.make_plan(params, jlora.Rule("head", RANK))
    with pytest.raises(
        ValueError,
        match=r"^head: `params` must hold an array of its own here to donate, got the "
        r"same array at embedding\.",
    ):
        jlora.adapt(params, plan, key=KEY, donate=True)
    assert not w.is_deleted()


# The rest of the road.


@pytest.mark.parametrize("kind", ["automatic", "explicit"])
def test_merge_diagnose_and_ranks_of_sharded_weights(kind):
    # As above: no stack of matrices that are sharded themselves.
    params = place(make_mesh(kind), PLACES["both"] | PLACES["over layers"])
    found, expected = adapt(params), adapt(PARAMS)
    merged = jlora.merge(found)
    assert_close(merged, jlora.merge(expected), 1e-6)
    for path, w in merged.items():
        assert list_entries(w) == list_entries(params[path])

    one = jlora.diagnose(PARAMS, expected, key=KEY)
    other = jlora.diagnose(params, found, key=KEY)
    assert one.paths == other.paths
    np.testing.assert_allclose(other.residual, one.residual, rtol=1e-4)
    np.testing.assert_allclose(other.change, one.change, atol=1e-5)

    rule = jlora.Rule("stack|a", jlora.RankBudget(4000, maximum=16))
    plans = [jlora.make_plan(tree, rule, key=KEY) for tree in (PARAMS, params)]
    ranks = [[entry.rank for entry in plan.entries] for plan in plans]
    assert ranks[0] == ranks[1]


def test_no_program_holds_the_sharding_of_another():
    # Two leaves of one shape with different shardings once shared a chunk, and waited
    # for each other for ever.
    mesh = make_mesh()
    params = {"a": put(PARAMS["a"], mesh, "model"), "b": put(PARAMS["b"], mesh, None)}
    plan = jlora.make_plan(params, jlora.Rule(".", RANK))
    tasks = jlora.adaptation.tasks.list_tasks(params, plan, {}, KEY, donate=False)
    _, groups = mesh_groups.group_tasks(tasks, None)
    assert [len(group.tasks) for group in groups] == [1, 1]
