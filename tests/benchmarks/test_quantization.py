"""The suite of quantised bases: every contender runs, and is as exact as its format."""

import numpy as np
import pytest

from benchmarks.report.targets import quantization as targets
from benchmarks.run.cases import Case
from benchmarks.run.contenders import Level
from benchmarks.run.harness import measure_group
from benchmarks.run.limits import Limits
from benchmarks.run.records import check_record
from benchmarks.suites import quantization
from benchmarks.suites.quantization.formats import BITS, FORMATS
from benchmarks.suites.quantization.pretrained import OUTPUTS, WEIGHTS

# qwix promotes dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")
# One run of each: the tests check that it runs and how exact it is, not how fast.
ONCE = Level("quick", 1, 0.1)
LIMITS = Limits({("float32", "highest"): 1e11, ("float32", "default"): 1e11}, 1e10)
# Relative errors of a Gaussian matrix.
ERRORS = {"nf4": 0.092, "int8": 0.0075, "int4": 0.1, "fp8": 0.0265}


def measure(group):
    """Return {contender: record} of those that were measured."""
    contenders = [each._replace(least_runs=1) for each in group.contenders]
    records = measure_group(group._replace(contenders=tuple(contenders)), ONCE, LIMITS)
    for record in records:
        check_record(record)
        # A peer may be missing here; it may not fail where it is installed.
        missing = record["role"] != "jlora" and "is not installed" in (
            record["reason"] or ""
        )
        assert missing or record["status"] == "measured", record["reason"]
    measured = [each for each in records if each["status"] == "measured"]
    return {record["implementation"]: record for record in measured}


def test_formats_and_layers_have_the_errors_of_their_formats():
    small = Case("minilm-l6", "attention", 4, "normal", tokens=8)
    formats = measure(quantization.make_format_group(small))
    layers = measure(quantization.make_layer_group(small))
    for name in FORMATS:
        error = ERRORS[name.split(",")[0]]
        record = formats[f"jlora {name}"]
        np.testing.assert_allclose(record["errors"]["relative error"], error, rtol=0.1)
        assert record["errors"][BITS] < 8.2
        for kind, found in layers[f"jlora {name} base"]["errors"].items():
            np.testing.assert_allclose(found, error, rtol=0.15, err_msg=kind)
    plain = layers["jlora float32 base"]["errors"]
    assert max(plain.values()) < 1e-5


def test_a_model_is_adapted_with_and_without_a_format():
    found = measure(quantization.make_model_group(hidden=64, layers=1))
    plain, quantized = found["jlora pissa"], found["jlora pissa, nf4 residual"]
    assert plain["errors"]["relative error"] < 1e-6
    assert 0.01 < quantized["errors"]["relative error"] < 0.1


def test_targets_read_the_records_of_the_full_level():
    found = {}
    for group in quantization.list_groups("full", "cpu"):
        for contender in group.contenders:
            key = (group.suite, group.operation, group.case.name, contender.name)
            found[key] = {
                "suite": group.suite,
                "operation": group.operation,
                "case": group.case.describe(),
                "time": "2026-01-02T03:04:05+00:00",
                "times_ms": [3.0 if "nf4" in contender.name else 2.0] * 3,
                "rounds": [0, 1, 2],
                "errors": {BITS: 4.0, WEIGHTS: 0.1, OUTPUTS: 0.1},
                "temporary_bytes": 4096 * 4096,
            }
    values = [target.measure(found) for target in targets.TARGETS]
    assert values == [4.0, 4.0, 4.0, 0.25, 1.5, 1.0, 1.5, 1.0, 1.0, 1.0, 1.0]
    assert all(target.measure({}) is None for target in targets.TARGETS)
