"""Every public kernel on meshes: the result of one device, sharded as documented."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import Factors, factorization, quantization, reconstruction, updates
from tests.helpers.collectives import check_none, check_thin, list_collectives
from tests.helpers.meshes import (
    assert_close,
    enter,
    list_entries,
    make_mesh,
    put,
)

KEY = jax.random.key(0)
M, N, R, T = 64, 48, 8, 16
INDEX = np.arange(T) % 4 - 1


def make_arrays():
    keys = jax.random.split(KEY, 4)
    return {
        "a": jax.random.normal(keys[0], (M, N)),
        "u": jax.random.normal(keys[1], (M, R)),
        "v": jax.random.normal(keys[2], (R, N)),
        "x": jax.random.normal(keys[3], (T, M)),
    }


# The entries of a, u, v and x.
PLACES = {
    "rows": [("model",), ("model",), (), ("data", "model")],
    "columns": [(None, "model"), (), (None, "model"), ("data",)],
    "both": [("data", "model"), ("data",), (None, "model"), (None, "data")],
}


def place(arrays, mesh, where):
    pairs = zip(arrays.items(), PLACES[where], strict=True)
    return {name: put(array, mesh, *entries) for (name, array), entries in pairs}


def multiply(svd):
    return (svd.u * svd.s[..., None, :]) @ svd.vt


def make_svd(a):
    return jlora.truncated_svd(a, 4)


def make_bank(u, v):
    return jlora.stack_factors([Factors(u, v), Factors(u[:, :4], v[:4])])


# Each gives arrays of which the last axes are named: "m", "n", "t" or "." for a whole
# one. `call` takes a, u, v, x.
SVD_AXES = ["m.", ".", ".n"]
KERNELS = {
    "randomized_svd": (
        lambda a, u, v, x: jlora.randomized_svd(a, 4, key=KEY, num_passes=6),
        SVD_AXES,
    ),
    "randomized_svd by subspaces": (
        lambda a, u, v, x: jlora.randomized_svd(a, 4, key=KEY, method="subspace"),
        SVD_AXES,
    ),
    "randomized_svd from a warm start": (
        lambda a, u, v, x: jlora.randomized_svd(a, 4, key=KEY, warm_start=make_svd(a)),
        SVD_AXES,
    ),
    "truncated_svd": (lambda a, u, v, x: make_svd(a), SVD_AXES),
    "adaptive_svd": (
        lambda a, u, v, x: jlora.adaptive_svd(a, tolerance=0.9, max_rank=4, key=KEY),
        [*SVD_AXES, "", "", ""],
    ),
    "low_rank_approximation": (
        lambda a, u, v, x: jlora.low_rank_approximation(a, 4, key=KEY),
        ["mn"],
    ),
    "estimate_error": (
        lambda a, u, v, x: jlora.estimate_error(a, make_svd(a), key=KEY),
        [""],
    ),
    "estimate_sketch_error": (
        lambda a, u, v, x: factorization.estimate_sketch_error(u, key=KEY),
        [""],
    ),
    "split_svd": (lambda a, u, v, x: jlora.split_svd(make_svd(a)), ["m.", ".n"]),
    "recompress": (
        lambda a, u, v, x: jlora.recompress(Factors(u, v), 3),
        SVD_AXES,
    ),
    "recompress with a key": (
        lambda a, u, v, x: jlora.recompress(Factors(u, v), 1, key=KEY),
        SVD_AXES,
    ),
    "concatenate_factors": (
        lambda a, u, v, x: jlora.concatenate_factors([Factors(u, v)] * 2, [1.0, 2.0]),
        ["m.", ".n"],
    ),
    "stack_factors": (lambda a, u, v, x: make_bank(u, v), [".m.", "..n"]),
    "set_columns": (
        lambda a, u, v, x: jlora.set_columns(Factors(u, v), [3, 7], jnp.ones((R, 2))),
        ["m.", ".n"],
    ),
    "set_columns of an SVD": (
        lambda a, u, v, x: jlora.set_columns(make_svd(a), [3, 7], jnp.ones((4, 2))),
        SVD_AXES,
    ),
    "balance": (
        lambda a, u, v, x: updates.balance(Factors(u, v)),
        ["m.", ".n"],
    ),
    "orthogonalize_product": (
        lambda a, u, v, x: updates.orthogonalize_product(Factors(u, v)),
        ["m.", ".n"],
    ),
    "add_low_rank": (
        lambda a, u, v, x: updates.add_low_rank(make_svd(a), u, v),
        SVD_AXES,
    ),
    "append_columns": (
        lambda a, u, v, x: updates.append_columns(make_svd(a), u),
        SVD_AXES,
    ),
    "append_rows": (
        lambda a, u, v, x: updates.append_rows(make_svd(a), v),
        SVD_AXES,
    ),
    "replace_columns": (
        lambda a, u, v, x: updates.replace_columns(make_svd(a), [1, 2], u[:, :2]),
        SVD_AXES,
    ),
    "remove_columns": (
        lambda a, u, v, x: updates.remove_columns(make_svd(a), [1, 2, 3, 4]),
        SVD_AXES,
    ),
    "reconstruct": (
        lambda a, u, v, x: jlora.reconstruct(Factors(u, v), a),
        ["mn"],
    ),
    "reconstruct without a base": (
        lambda a, u, v, x: jlora.reconstruct(Factors(u, v)),
        ["mn"],
    ),
    "reconstruct of the last columns": (
        lambda a, u, v, x: jlora.reconstruct(Factors(u, v), a, columns=8),
        ["mn"],
    ),
    "reconstruct of some columns": (
        lambda a, u, v, x: jlora.reconstruct(
            Factors(u, v), a, columns=jnp.array([1, 5])
        ),
        ["mn"],
    ),
    "reconstruct, compensated": (
        lambda a, u, v, x: jlora.reconstruct(
            Factors(u, v), a.astype(jnp.bfloat16), rounding="compensated"
        ),
        ["mn", "mn"],
    ),
    "unmerge": (
        lambda a, u, v, x: reconstruction.unmerge(Factors(u, v), a),
        ["mn"],
    ),
    "apply_factors": (
        lambda a, u, v, x: jlora.apply_factors(x, Factors(u, v), a),
        ["tn"],
    ),
    "apply_factors of the last columns": (
        lambda a, u, v, x: jlora.apply_factors(x, Factors(u, v), a, num_columns=4),
        ["tn"],
    ),
    "apply_many": (
        lambda a, u, v, x: jlora.apply_many(x, make_bank(u, v), INDEX % 2, a),
        ["tn"],
    ),
    "apply_many, sorted": (
        lambda a, u, v, x: jlora.apply_many(
            x, make_bank(u, v), INDEX % 2, a, implementation="sort"
        ),
        ["tn"],
    ),
    "quantize": (
        lambda a, u, v, x: quantization.quantize(a, "int8").dequantize(),
        ["mn"],
    ),
    "apply_factors to NF4": (
        lambda a, u, v, x: jlora.apply_factors(
            x, Factors(u, v), quantization.quantize(a, quantization.nf4(block_size=4))
        ),
        ["tn"],
    ),
}


def invariant(found):
    """Return what does not depend on the signs of singular vectors."""
    if isinstance(found, jlora.SVD):
        return multiply(found), found.s
    if isinstance(found, factorization.AdaptiveSVD):
        return multiply(found.svd), found.rank
    if isinstance(found, Factors) and found.u.ndim == 2:
        return found.u @ found.v
    return found


# The array and the axis that say how an axis of a result is sharded.
SOURCES = {"m": ("a", 0), "n": ("a", 1), "t": ("x", 0)}

# All kernels on both axes of the mesh, and two of them on one axis.
CASES = [(name, "both") for name in KERNELS]
CASES += [
    (name, where)
    for where in ("rows", "columns")
    for name in ("randomized_svd", "apply_factors")
]


def list_expected(names, placed):
    """Return the entries of a result whose axes have these names."""
    wanted = []
    for name in names:
        array, axis = SOURCES.get(name, ("a", None))
        entry = None if axis is None else list_entries(placed[array])[axis]
        wanted.append(None if entry in wanted else entry)
    return tuple(wanted)


@pytest.mark.parametrize(("name", "where"), CASES)
def test_kernels_on_explicit_axes(name, where):
    call, axes = KERNELS[name]
    arrays = make_arrays()
    placed = place(arrays, make_mesh("explicit"), where)
    expected = call(**arrays)
    with enter(placed["a"].sharding.mesh):
        found = jax.jit(call)(**placed)

    # Sums of 64 products in another order.
    host = jax.device_get((found, expected))
    with jax.numpy_dtype_promotion("standard"):
        assert_close(invariant(host[0]), invariant(host[1]), 2e-4)
    leaves = jax.tree.leaves(found)
    assert [list_entries(jax.typeof(leaf)) for leaf in leaves] == [
        list_expected(names, placed) for names in axes
    ]


@pytest.mark.parametrize(
    "kinds", [("explicit", "automatic"), ("automatic", "explicit")]
)
def test_kernels_on_mixed_axes(kinds):
    arrays = make_arrays()
    placed = place(arrays, make_mesh(kinds), "both")
    names = ["randomized_svd", "recompress", "reconstruct", "apply_factors"]
    for name in names:
        call, _ = KERNELS[name]
        with enter(placed["a"].sharding.mesh):
            found = jax.jit(call)(**placed)
        host = jax.device_get((found, call(**arrays)))
        assert_close(invariant(host[0]), invariant(host[1]), 2e-4)


def test_gradients_on_explicit_axes_are_sharded_as_their_arguments():
    arrays = make_arrays()
    placed = place(arrays, make_mesh("explicit"), "both")

    def loss(u, v, a, x):
        return jnp.mean(jlora.apply_factors(x, Factors(u, v), a) ** 2)

    expected = jax.grad(loss, (0, 1, 2))(*(arrays[name] for name in "uvax"))
    with enter(placed["a"].sharding.mesh):
        found = jax.grad(loss, (0, 1, 2))(*(placed[name] for name in "uvax"))
    assert_close(found, expected, 1e-5)
    for name, gradient in zip("uva", found, strict=True):
        assert list_entries(gradient) == list_entries(placed[name])


# Collectives, read from programs on automatic axes.

BLOCK, PASSES = 8, 8


def compile_on_mesh(call, placed):
    return jax.jit(call).lower(**placed).compile()


@pytest.mark.parametrize(
    ("sizes", "where"), [((1, 8), "rows"), ((1, 8), "columns"), ((2, 4), "both")]
)
def test_a_decomposition_reduces_thin_panels_only(sizes, where):
    def decompose(a, u, v, x):
        return jlora.randomized_svd(a, 4, key=KEY, num_passes=PASSES, block_size=BLOCK)

    arrays = make_arrays() | {"a": jax.random.normal(KEY, (512, 384))}
    placed = place(arrays, make_mesh(sizes=sizes), where)
    program = compile_on_mesh(decompose, placed)
    found = jax.device_get(program(**placed))
    assert_close(multiply(found), multiply(decompose(**arrays)), 2e-4)
    assert list_entries(program(**placed).u)[0] == list_entries(placed["a"])[0]

    check_thin(program, 512 * 2 * BLOCK)
    reductions = list_collectives(program)
    assert {one.kind for one in reductions} == {"all-reduce"}

    # The text holds two loops, each with a body of two passes and one loop of
    # projections: four passes, with five reductions for two. If both axes are
    # sharded, both sides are orthonormalised. The first block adds one reduction, and
    # several of a few numbers.
    num_sides = 2 if where == "both" else 1
    wide = [one for one in reductions if one.num_elements > BLOCK]
    assert len(wide) <= 2 * 5 * num_sides + 1


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", ["reconstruct", "reconstruct of the last columns"])
def test_a_merge_has_no_collective(name, where):
    placed = place(make_arrays(), make_mesh(), where)
    # Which columns to select is decided by the sharding of concrete arrays.
    from jlora.reconstruction.arguments import prepare_arguments
    from jlora.reconstruction.dense import _reconstruct

    columns = 8 if "last" in name else None
    factors = Factors(placed["u"], placed["v"])
    given = prepare_arguments(
        factors, placed["a"], 1.0, columns, "nearest", None, None, False, None
    )
    check_none(_reconstruct.lower(*given).compile())


def test_an_applied_factor_has_only_the_collective_of_its_product():
    call, _ = KERNELS["apply_factors"]
    placed = place(make_arrays(), make_mesh(), "columns")
    check_none(compile_on_mesh(call, placed))

    # Contracted over the sharded rows: the sum of the products, for x @ base too.
    placed = place(make_arrays(), make_mesh(sizes=(1, 8)), "rows")
    kinds = [one.kind for one in list_collectives(compile_on_mesh(call, placed))]
    plain = jax.jit(lambda a, u, v, x: x @ a).lower(**placed).compile()
    assert set(kinds) <= {one.kind for one in list_collectives(plain)} | {"all-reduce"}
    assert len(kinds) <= 2


def test_decompositions_inside_shard_map_have_no_collective():
    stack = jax.random.normal(KEY, (8, M, N))
    mesh = make_mesh(sizes=(8,), names=("layers",))
    calls = [
        lambda a: jlora.randomized_svd(a, 4, key=KEY, num_passes=6),
        lambda a: jlora.randomized_svd(a, 4, key=KEY, method="subspace"),
        lambda a: jlora.adaptive_svd(a, tolerance=0.9, max_rank=4, key=KEY).svd,
        lambda a: jlora.recompress(jlora.split_svd(jlora.truncated_svd(a, 4)), 2),
    ]
    specs = jax.P("layers")
    for call in calls:
        run = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=specs))
        placed = put(stack, mesh, "layers")
        check_none(run.lower(placed).compile())
        assert_close(run(placed).s, jax.vmap(call)(stack).s, 1e-5)


def test_the_counter_of_collectives_sees_a_gathered_weight():
    placed = place(make_arrays(), make_mesh(), "rows")
    gather = jax.jit(
        lambda a: a + 1, out_shardings=jax.NamedSharding(make_mesh(), jax.P())
    )
    program = gather.lower(placed["a"]).compile()
    assert [one.kind for one in list_collectives(program)] == ["all-gather"]
    with pytest.raises(AssertionError, match="collectives of more than"):
        check_thin(program, M * N - 1)
