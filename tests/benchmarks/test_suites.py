import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.run.cases import Case
from benchmarks.run.contenders import Level
from benchmarks.run.environment import ROOT
from benchmarks.run.harness import measure_group
from benchmarks.run.limits import Limits
from benchmarks.run.records import check_record
from benchmarks.suites import reconstruction, updates
from benchmarks.suites.reconstruction import apply_factors, merges
from benchmarks.suites.updates import balance, extraction, factors, recompression

# One run of each: the tests check that it runs and how exact it is, not how fast.
ONCE = Level("quick", 1, 0.1)
LIMITS = Limits(
    {
        (dtype, precision): 1e11
        for dtype, precision in (
            ("float32", "highest"),
            ("float32", "default"),
            ("bfloat16", "default"),
        )
    },
    1e10,
)
SMALL = ("minilm-l6", "attention")  # 384×384


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("level", ["quick", "full"])
@pytest.mark.parametrize(
    "suite", [updates, reconstruction], ids=["updates", "reconstruction"]
)
def test_groups_are_listed_once_each_with_one_of_ours(suite, level, platform):
    groups = suite.list_groups(level, platform)
    keys = [(group.suite, group.operation, group.case.name) for group in groups]
    assert len(set(keys)) == len(keys)
    for group in groups:
        names = [contender.name for contender in group.contenders]
        assert len(set(names)) == len(names)
        assert group.contenders[0].role == "jlora"
        assert all(contender.setting for contender in group.contenders)


def test_lists_import_no_peer():
    code = (
        "import sys; from benchmarks.suites import list_suite\n"
        "for suite in ('updates', 'reconstruction'):\n"
        "    for level in ('quick', 'full'):\n"
        "        for platform in ('cpu', 'gpu'): list_suite(suite, level, platform)\n"
        "print({'torch', 'sklearn', 'matfree', 'threadpoolctl', 'cupy'} & "
        "set(sys.modules))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.strip() == "set()"


def measure(group):
    """Return {contender: errors} of jlora and of peers, with checked records."""
    records = measure_group(group, ONCE, LIMITS)
    for record in records:
        check_record(record)
        assert record["floor_ms"] > 0
        # A peer may be missing here; it may not fail where it is installed.
        missing = record["role"] != "jlora" and "is not installed" in (
            record["reason"] or ""
        )
        assert missing or record["status"] == "measured"

    return tuple(
        {
            record["implementation"]: record["errors"]
            for record in records
            if record["status"] == "measured" and (record["role"] == "jlora") == is_ours
        }
        for is_ours in (True, False)
    )


def measure_ours(group):
    return measure(group)[0]


def measure_all(group):
    ours, peers = measure(group)
    return (ours | peers).values()


@pytest.mark.parametrize(
    "group",
    [
        recompression.make_recompress_group(Case(*SMALL, 8, "factors"), 32),
        recompression.make_combine_group(Case(*SMALL, 8, "factors")),
    ],
    ids=lambda group: group.operation,
)
def test_truncated_products_are_optimal(group):
    (errors,) = measure_ours(group).values()
    assert next(iter(errors)) == "excess error"
    # Rounding moves the result by 1e-6 of its norm, but hardly along the residual: it
    # counts squared. 1e-8 is far above that and far below any randomized method.
    assert abs(errors["excess error"]) < 1e-8
    assert errors["orthogonality"] < 1e-5


def test_extraction_is_optimal():
    group = extraction.make_extract_group(
        Case(*SMALL, 32, "low rank plus noise"), "cpu"
    )
    (errors,) = measure_ours(group).values()
    # The gap of ten behind rank 32 leaves only rounding, as above.
    assert abs(errors["excess error"]) < 1e-8
    assert errors["orthogonality"] < 1e-5


def test_balanced_factors_keep_the_product():
    (errors,) = measure_ours(
        balance.make_balance_group(Case(*SMALL, 16, "factors"))
    ).values()
    # Some float32 roundings, 6e-8 each.
    assert errors["relative error"] < 3e-6
    assert errors["imbalance"] < 3e-6


def test_excess_sees_a_worse_svd():
    u, v = factors.make_factors(Case(*SMALL, 8, "factors"), 32)
    left, s, right = np.linalg.svd(np.asarray(u, np.float64) @ v)
    chosen = [0, 1, 2, 3, 4, 5, 6, 8]  # the ninth in place of the eighth
    errors = recompression.measure_excess(
        u, v, (left[:, chosen], s[chosen], right[chosen])
    )
    best, worse = np.sum(s[8:] ** 2), np.sum(s[9:] ** 2) + s[7] ** 2
    np.testing.assert_allclose(
        errors["excess error"], np.sqrt(worse / best) - 1, rtol=1e-9
    )


@pytest.mark.parametrize("donated", [True, False], ids=["donated", "fresh"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reconstruct_rounds_once(dtype, donated):
    case = Case(*SMALL, 8, "factors", dtype)
    for errors in measure_all(merges.make_reconstruct_group(case, donated=donated)):
        # One rounding errs by half an eps of each entry at most. The delta, a twentieth
        # of it, may be rounded before.
        assert errors["relative error"] < 0.55 * float(jnp.finfo(dtype).eps)


def test_reconstructed_columns_equal_the_whole_merge():
    group = merges.make_columns_group(Case(*SMALL, 8, "factors"))
    for errors in measure_all(group):
        assert errors["relative error"] < 0.5 * float(jnp.finfo("float32").eps)
        # Relative to the delta: a missing column would be an error of an eighth.
        assert errors["error of the delta"] < 1e-5


@pytest.mark.parametrize(
    "make_group", [apply_factors.make_apply_group, apply_factors.make_backward_group]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_err_like_one_product(dtype, make_group):
    case = Case(*SMALL, 8, "factors", dtype, tokens=24)
    with jax.default_matmul_precision("highest"):
        each = measure_all(make_group(case))
    # Sums of 384 terms in float32 err by about √384 / 2 = 10 eps. In bfloat16 the sums
    # are kept in float32, and the error is two roundings of at most half an eps.
    eps = float(jnp.finfo(dtype).eps)
    for errors in each:
        assert errors["relative error"] < (20 * eps if dtype == "float32" else eps)
        assert errors["relative error"] == max(errors.values())
