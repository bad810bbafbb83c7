"""Random inputs: scales, shapes, trees and files, the same few in each run.

JLORA_EXAMPLES=3000 draws that many new ones for each test.
"""

import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jlora
from tests.helpers.array_functions import CASES, DTYPE, to_tuple
from tests.helpers.matrices import X64
from tests.helpers.scaling import assert_same, rescale

# The trees and files of one precision are those of the other.
only_once = pytest.mark.skipif(X64, reason="the same in both precisions")
KEY = jax.random.key(0)


def draw_examples(number):
    """Return the settings of a test: `number` fixed examples, or JLORA_EXAMPLES."""
    asked = os.environ.get("JLORA_EXAMPLES")
    return settings(
        max_examples=int(asked or number),
        derandomize=asked is None,
        deadline=None,  # an example may compile
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# Each case computes its result at scale 1 once.
REFERENCES = {}


def find_reference(case):
    if case.name not in REFERENCES:
        REFERENCES[case.name] = to_tuple(case.fn(*map(jnp.asarray, case.arrays)))
    return REFERENCES[case.name]


@draw_examples(30)
@given(
    st.sampled_from([(case, degrees) for case in CASES for degrees in case.degrees]),
    st.integers(-450, 450) if X64 else st.integers(-50, 50),
)
def test_results_scale_with_their_arguments(chosen, half_exponent):
    case, (of_arguments, of_results) = chosen
    exponent = 2 * half_exponent  # some degrees are 1/2
    arrays = rescale(case.arrays, of_arguments, exponent)
    found = to_tuple(case.fn(*map(jnp.asarray, arrays)))
    back = [-degree for degree in of_results]
    assert_same(case, rescale(found, back, exponent), find_reference(case))


@draw_examples(8)
@given(
    st.lists(st.integers(0, 2), max_size=2),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_kernels_take_every_shape(batch, m, n, r, seed):
    rng = np.random.default_rng(seed)
    r = min(r, m, n)
    a = jnp.asarray(rng.standard_normal((*batch, m, n)), DTYPE)
    x = jnp.asarray(rng.standard_normal((*batch, 2, m)), DTYPE)
    # Sums of at most 9 products of numbers of size one, some decompositions deep.
    tolerance = 300 * float(jnp.finfo(DTYPE).eps)

    def check(found, expected):
        found, expected = np.asarray(found), np.asarray(expected)
        assert found.shape == expected.shape
        largest = np.abs(expected).max(initial=1)
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * largest)

    exact = np.linalg.svd(np.asarray(a, np.float64), full_matrices=False)
    check(jlora.truncated_svd(a, r).s, exact[1][..., :r])
    check(jlora.randomized_svd(a, min(m, n), key=KEY).s, exact[1])

    factors = jlora.split_svd(jlora.truncated_svd(a, r))
    u, v = (np.asarray(part, np.float64) for part in factors)
    check(jlora.reconstruct(factors, a, scale=0.5), np.asarray(a) + 0.5 * u @ v)
    check(jlora.apply_factors(x, factors), np.asarray(x) @ u @ v)
    small = jlora.recompress(factors, r)
    check(jlora.reconstruct(jlora.split_svd(small)), u @ v)


ARRAYS = st.builds(
    lambda shape, dtype, fill: jnp.full(shape, fill, dtype),
    st.sampled_from([(), (3,), (4, 3), (2, 4, 3), (0, 3), (5, 5)]),
    st.sampled_from(["float32", "bfloat16", "float16", "int32", "bool"]),
    st.integers(0, 3),
)
LEAVES = st.one_of(ARRAYS, st.none(), st.integers(), st.text(max_size=3))
NAMES = st.text("ab/.0é", min_size=1, max_size=3)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(NAMES, inner, max_size=3),
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
    ),
    max_leaves=8,
)


@only_once
@draw_examples(30)
@given(TREES)
def test_trees_are_planned_adapted_and_merged_or_refused(tree):
    try:
        plan = jlora.make_plan(tree, jlora.Rule(".*", 1, init="lora"))
    except ValueError as error:
        reason = str(error)
    else:
        adapted = jlora.adapt(tree, plan, key=KEY)
        assert_equal(jlora.join(*jlora.split_trainable(adapted)), adapted)
        assert_equal(jlora.merge(adapted), tree)
        return
    assert reason.startswith(("`rules` must", "`params` must"))


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert getattr(a, "dtype", type(a)) == getattr(b, "dtype", type(b))
        assert np.array_equal(a, b)


def make_files():
    """Return {suffix: bytes} of one good file of each format."""
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2)}
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".npy", ".npz", ".safetensors"):
            path = os.path.join(folder, f"w{suffix}")
            jlora.save_arrays(path, {"w": arrays["w"]} if suffix == ".npy" else arrays)
            with open(path, "rb") as file:
                files[suffix] = file.read()
    return files


FILES = make_files()


@only_once
@draw_examples(200)
@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    st.one_of(st.none(), st.integers(0, 10**6)),
    st.binary(max_size=4),
)
def test_damaged_files_are_read_or_refused_by_name(suffix, changes, length, added):
    data = bytearray(FILES[suffix])
    for place, value in changes:
        data[place % len(data)] = value
    if length is not None:
        data = data[: length % len(data)]

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"w{suffix}")
        with open(path, "wb") as file:
            file.write(bytes(data) + added)
        message = path
        try:
            jlora.load_arrays(path)
        except (ValueError, OSError) as error:
            message = str(error)
        assert path in message
