"""`adapt` over many weights: programs, chunks, bits, and donated buffers."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.adaptation import chunks
from jlora.adaptation.chunks import choose_chunk_size
from jlora.adaptation.programs import compile_chunk, compile_donated_chunk
from jlora.adaptation.tasks import list_tasks
from tests.helpers.factors import DTYPES

KEY = jax.random.key(0)
SHAPE = (12, 8)
EPS = float(jnp.finfo(jnp.float32).eps)
# Two programs round differently: they sum tens of values, and the gaps between
# singular values are about a tenth.
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=200 * EPS)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def make_params():
    """Return a bias and seven matrices of SHAPE; seven is no multiple of a chunk."""
    return {
        "a": draw(1, *SHAPE),
        "b": np.array(draw(2, *SHAPE)),
        "c": draw(3, 3, *SHAPE),
        "d": np.array(draw(4, *SHAPE)),
        "e": draw(5, *SHAPE),
        "f": draw(6, 8),
    }


def adapt(params, *, rank=3, init="pissa", layout="io", **settings):
    plan = jlora.make_plan(
        params, jlora.Rule(".", rank, init=init, layout=layout, scale=-2.0)
    )
    return jlora.adapt(params, plan, key=KEY, **settings)


def force_chunks(monkeypatch, size, shape=SHAPE):
    monkeypatch.setitem(
        chunks._CHUNK_ELEMENTS, jax.default_backend(), size * math.prod(shape)
    )


# A CPU has chunks of one matrix, accelerators have larger ones.
@pytest.fixture(params=[1, 4], ids="chunks of {}".format)
def chunk_size(request, monkeypatch):
    force_chunks(monkeypatch, request.param)
    return request.param


def assert_same_bits(found, expected):
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def multiply(w):
    return np.asarray(w.u, np.float64) @ np.asarray(w.v, np.float64)


def assert_unchanged(w, plain):
    total = np.asarray(w.base, np.float64) + float(w.scale) * multiply(w)
    plain = np.asarray(plain, np.float64)
    # The base is rounded once. The product is summed over the rank in float32 at
    # least.
    tolerance = (float(jnp.finfo(w.base.dtype).eps) + 8 * EPS) * np.abs(plain).max()
    np.testing.assert_allclose(total, plain, rtol=0, atol=tolerance)


def count_programs():
    return compile_chunk._cache_size() + compile_donated_chunk._cache_size()


def test_one_program_for_each_shape_dtype_and_rank(chunk_size):
    layer = make_params() | {
        "half": draw(7, *SHAPE).astype(jnp.bfloat16),
        "wide": draw(8, 8, 12),
        "other": draw(9, *SHAPE),
    }
    rules = [jlora.Rule("other", 4, init="olora"), jlora.Rule(".", 5, init="olora")]
    before = count_programs()
    for params in ([layer], [layer] * 3):
        jlora.adapt(params, jlora.make_plan(params, rules), key=KEY)
        assert count_programs() == before + 4


def test_a_last_chunk_of_committed_arrays_runs_the_same_program(monkeypatch):
    force_chunks(monkeypatch, 4)
    params = [jax.device_put(draw(i, *SHAPE), jax.devices()[0]) for i in range(5)]
    before = count_programs()
    for num_layers in (4, 5):
        adapt(params[:num_layers], rank=6, init="olora")
        assert count_programs() == before + 1


@pytest.mark.parametrize("init", ["pissa", "lora"])
def test_other_layers_change_no_bit(chunk_size, init):
    params = make_params()
    expected = adapt(params, init=init)
    assert not np.any(expected["a"].u == expected["e"].u)  # a key for each path

    same, stack, other = draw(0, *SHAPE), draw(0, 3, *SHAPE), draw(0, 10, 6)
    for more in (
        {},
        {"0": same},
        {"aa": stack},
        {"aa": np.array(same)},
        {"0": other, "g": other},
    ):
        found = adapt(params | more, init=init)
        assert_same_bits({path: found[path] for path in params}, expected)

    for paths in ("dcba", "ec", "b", "c", "e"):
        found = adapt(
            collections.OrderedDict((path, params[path]) for path in paths), init=init
        )
        assert_same_bits(
            [found[path] for path in paths], [expected[path] for path in paths]
        )


@pytest.mark.parametrize("init", ["pissa", "lora"])
def test_factors_of_a_matrix_do_not_depend_on_the_size_of_its_stack(chunk_size, init):
    for kind in (jnp.asarray, np.asarray):
        stack = kind(make_params()["c"])
        w = adapt({"w": stack}, init=init)["w"]
        assert not np.array_equal(w.u[0], w.u[1])
        few = adapt({"w": stack[:2]}, init=init)["w"]
        assert_same_bits((few.u, few.v, few.base), (w.u[:2], w.v[:2], w.base[:2]))


def test_chunks_of_block_krylov_keep_their_bits_and_are_right(monkeypatch):
    shape = (72, 64)  # the smallest matrix that is wider than the basis
    force_chunks(monkeypatch, 3, shape)
    params = {path: np.array(draw(i, *shape)) for i, path in enumerate("bcde")}
    first = adapt(params, rank=2)
    assert_same_bits(adapt(params, rank=2), first)
    more = adapt(params | {"a": np.eye(*shape, dtype=np.float32)}, rank=2)
    assert_same_bits({path: more[path] for path in params}, first)

    for path, plain in params.items():
        assert_unchanged(first[path], plain)
        s = np.linalg.svd(plain.astype(np.float64), compute_uv=False)
        # `randomized_svd` promises an excess of at most 1e-4 over the optimal error.
        residual = plain - float(first[path].scale) * multiply(first[path])
        assert np.linalg.norm(residual) <= (1 + 1e-4) * np.linalg.norm(s[2:])


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__
)
def test_chunk_size_follows_from_shape_dtype_bytes_and_platform(dtype):
    def choose(max_bytes, platform, *batch):
        leaf = jnp.zeros((*batch, *SHAPE), dtype)
        plan = jlora.make_plan({"w": leaf}, jlora.Rule("w", 1))
        (task,) = list_tasks({"w": leaf}, plan, {}, KEY, donate=False)
        return choose_chunk_size(task, max_bytes, platform)

    # Beside each matrix stand two of its size in float32.
    needed = 12 * 8 * (jnp.dtype(dtype).itemsize + 2 * 4)
    for platform in ("cpu", "gpu", "tpu"):
        for room in (1, 2, 7):
            sizes = {
                choose(room * needed + 5, platform, *batch)
                for batch in ((), (1,), (2, 3))
            }
            assert sizes == {1 if platform == "cpu" else room}
        most = max(1, chunks._CHUNK_ELEMENTS[platform] // 96)
        assert choose(2**40, platform) == choose(2**40, platform, 2, 3) == most

    params = {"a": draw(0, 4, 2), "b": draw(1, *SHAPE).astype(dtype)}
    with pytest.raises(
        ValueError, match=rf"^b: `max_bytes` .* {needed} bytes, got {needed - 1}\."
    ):
        adapt(params, rank=2, max_bytes=needed - 1, donate=True)
    assert_unchanged(adapt(params, rank=2, max_bytes=needed)["b"], params["b"])


@pytest.mark.parametrize("kind", [jnp.array, np.array], ids=["jax", "numpy"])
def test_another_layout_holds_the_same_matrices(chunk_size, kind):
    stack = kind(make_params()["c"])
    expected = adapt({"w": stack})["w"]
    for layout, order in (("ibo", (1, 0, 2)), ("oi", (0, 2, 1))):
        stored = kind(stack.transpose(order))
        w = adapt({"w": stored}, layout=layout, donate=True)["w"]
        assert w.shape == w.base.shape == stored.shape
        close(multiply(w), multiply(expected))
        close(w.base.transpose(order), expected.base)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("init", ["pissa", "lora", "lora_xs"])
def test_only_donated_arrays_that_move_are_used_up(chunk_size, init, donate):
    params = make_params()
    before = jax.tree.map(np.array, params)
    adapted = adapt(params, init=init, donate=donate)
    assert adapted["f"] is params["f"]

    for path in "abcde":
        plain, base = params[path], adapted[path].base
        moves = init == "pissa"
        assert type(base) is type(plain)
        assert moves or base is plain

        if moves and donate and path not in "bd":
            assert plain.is_deleted()
        else:
            np.testing.assert_array_equal(plain, before[path])
            assert not (moves and np.shares_memory(plain, base))
        if init != "lora_xs":  # its core is zero, but u @ v is not
            assert_unchanged(adapted[path], before[path])


def test_abstract_and_deleted_arrays_are_refused_with_their_path():
    params = {"a": draw(0, *SHAPE), "b": {"c": draw(1, *SHAPE)}}
    params["b"]["c"].delete()
    with pytest.raises(
        ValueError, match=r"^b/c: `params` must hold arrays that are still there"
    ):
        adapt(params, donate=True)

    params["b"]["c"] = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    with pytest.raises(
        TypeError, match=r"^b/c: `params` must hold arrays, got an abstract one"
    ):
        adapt(params, donate=True)
    assert not params["a"].is_deleted()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("init", ["pissa", "lora", "olora"])
def test_nan_and_inf_are_refused_with_path_and_number(chunk_size, init, value):
    for path in "abc":
        plain = np.array(make_params()[path])
        plain[..., 1, 2] = plain[..., 4, 0] = value
        params = make_params() | {path: plain if path == "b" else jnp.asarray(plain)}
        count = plain.size // 48
        text = f"^`{path}` must be finite, got {count} NaN or Inf among {plain.size} v"
        with pytest.raises(ValueError, match=text):
            adapt(params, init=init)


def test_chunks_agree_with_one_call_under_jit(chunk_size):
    params = make_params()
    for some, layout in (
        (params, "io"),
        ({"c": params["c"].transpose(1, 0, 2)}, "ibo"),
    ):
        eager = adapt(some, layout=layout)
        traced = jax.jit(functools.partial(adapt, layout=layout))(some)

        assert jax.tree.structure(traced) == jax.tree.structure(eager)
        # Signs of factors may differ between programs, products do not.
        for path in set("abcde") & set(some):
            close(multiply(traced[path]), multiply(eager[path]))
            close(traced[path].base, eager[path].base)


@pytest.mark.parametrize(
    "dtype", [*DTYPES, jnp.float16], ids=lambda dtype: dtype.__name__
)
def test_every_dtype_is_kept_with_its_accuracy(dtype):
    params = {path: make_params()[path].astype(dtype) for path in "abcde"}
    compute = jnp.float64 if dtype == jnp.float64 else jnp.float32
    for path, w in adapt(params).items():
        assert (w.base.dtype, w.dtype, w.u.dtype, w.v.dtype) == (
            dtype,
            dtype,
            compute,
            compute,
        )
        assert_unchanged(w, params[path])


@pytest.mark.parametrize("init", ["pissa", "lora"])
def test_float64_arrays_of_the_host_stay_float64(init):
    params = {path: np.array(make_params()[path], np.float64) for path in "ac"}
    for path, merged in jlora.merge(adapt(params, init=init)).items():
        assert merged.dtype == np.float64
        close(merged, params[path])  # without x64 the computation is in float32


def test_progress_is_shown_where_it_is_wanted(chunk_size, capsys):
    adapt(make_params(), progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == math.ceil(7 / chunk_size)
    assert lines[-1].startswith("adapt: 7/7 matrices, ")
    assert all(" MB/s, " in line for line in lines)
    adapt(make_params())  # stderr is not a terminal here
    adapt(make_params(), progress=False)
    assert capsys.readouterr().err == ""


def test_an_interrupt_leaves_the_weights_unchanged(chunk_size, monkeypatch):
    params = make_params() | {"c": np.array(draw(3, 3, *SHAPE))}
    before, expected, collect = (
        jax.tree.map(np.array, params),
        adapt(params),
        chunks._collect,
    )

    def interrupt(chunk, *arguments):
        collect(chunk, *arguments)
        if chunk[-1].task.entry.path == "c":  # not the last of the stack
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(chunks, "_collect", interrupt)
        with pytest.raises(KeyboardInterrupt):
            adapt(params)
    assert_same_bits(params, before)
    assert_same_bits(adapt(params), expected)


@pytest.mark.parametrize("batch", [(), (10,)], ids=["matrices", "stacks"])
def test_weights_of_the_host_are_on_the_device_a_chunk_at_a_time(
    chunk_size, batch, monkeypatch
):
    def measure():
        return sum(array.nbytes for array in jax.live_arrays())

    params = [np.array(draw(i, *batch, *SHAPE)) for i in range(20 // math.prod(batch))]
    peaks, collect = [], chunks._collect
    monkeypatch.setattr(
        chunks, "_collect", lambda *a: (peaks.append(measure()), collect(*a))
    )
    before = measure()
    adapt(params, rank=1)
    is_cpu, num_bytes = jax.default_backend() == "cpu", 4 * math.prod(SHAPE)

    # Counted are the weights and bases of a chunk (on accelerators also of the next),
    # all factors, scales and keys. On a CPU host and device share one memory, so whole
    # bases count too.
    bound = (1 if is_cpu else 2) * chunk_size * 2 * num_bytes + 20 * (
        4 * sum(SHAPE) + 32
    )
    bound += 20 * num_bytes if is_cpu and not batch else 0
    assert len(peaks) == 20 // chunk_size
    assert max(peaks) - before <= bound < 2 * 20 * num_bytes


def test_one_array_at_two_paths_cannot_be_donated():
    w = jnp.ones((12, 8), jnp.float32)
    params = {"one": w, "other": w}
    plan = jlora.make_plan(params, jlora.Rule(".*", 2))
    with pytest.raises(
        ValueError, match=r"^other: `params` must hold an array of its own .* one"
    ):
        jlora.adapt(params, plan, key=jax.random.key(0), donate=True)
    assert not w.is_deleted()
