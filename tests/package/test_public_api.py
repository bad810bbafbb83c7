"""Public names: where they are, and that each documents itself with an example."""

import doctest
import subprocess
import sys

import jax
import pytest

import jlora
from tests.helpers import source

SUBPACKAGES = [
    "factors",
    "quantization",
    "factorization",
    "rank_selection",
    "updates",
    "reconstruction",
    "initializers",
    "adaptation",
    "lifting",
    "training",
    "optimizers",
    "checkpoints",
]
ROAD = [
    "SVD",
    "Factors",
    "split_svd",
    "randomized_svd",
    "truncated_svd",
    "adaptive_svd",
    "low_rank_approximation",
    "estimate_error",
    "choose_rank",
    "allocate_ranks",
    "recompress",
    "concatenate_factors",
    "set_columns",
    "reconstruct",
    "apply_factors",
    "apply_many",
    "stack_factors",
    "Rule",
    "RankRule",
    "RankBudget",
    "make_plan",
    "adapt",
    "AdaptedWeight",
    "split_trainable",
    "join",
    "merge",
    "linear",
    "lift",
    "on_merged",
    "diagnose",
    "fit",
    "init_train",
    "train_step",
    "load_arrays",
    "load_peft",
    "save_arrays",
    "save_peft",
]


def list_public():
    """Return {name: object} of the top level and of each sub-package."""
    found = {name: getattr(jlora, name) for name in jlora.__all__}
    for name in SUBPACKAGES:
        package = getattr(jlora, name)
        for public in package.__all__:
            found[f"{name}.{public}"] = getattr(package, public)
    return found


PUBLIC = list_public()


def test_the_top_level_has_the_names_of_the_road():
    assert set(jlora.__all__) == set(ROAD)
    for name in ROAD:
        everywhere = [public for public in PUBLIC if public.split(".")[-1] == name]
        assert len(everywhere) == 2, f"{name} is public in {everywhere}"


def test_packages_that_are_imported_on_use_are_listed():
    assert {"checkpoints", "lifting", "training", "optimizers"} <= set(dir(jlora))
    with pytest.raises(AttributeError, match="has no attribute 'lora'"):
        _ = jlora.lora
    code = "import sys, jlora; print('jlora.training' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_public_names_are_in_one_sub_package():
    names = [name.split(".")[-1] for name in PUBLIC if "." in name]
    twice = sorted({name for name in names if names.count(name) > 1})
    assert twice == []


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring_whose_example_runs(name):
    finder = doctest.DocTestFinder(recurse=False)
    tests = finder.find(PUBLIC[name], name, globs={})
    assert tests, f"{name} has no docstring"
    assert "Example:" in tests[0].docstring
    with jax.numpy_dtype_promotion("standard"):
        result = doctest.DocTestRunner().run(tests[0])
    assert result.attempted > 0
    assert result.failed == 0


def test_no_public_function_has_the_name_of_a_module():
    # cli/ has one file a command, named after it, and nothing in it is imported by
    # users.
    files = [path for path in source.list_files("jlora") if path.parent.name != "cli"]
    modules = {path.stem for path in files}
    functions = {
        name.split(".")[-1] for name in PUBLIC if name.split(".")[-1].islower()
    }
    assert modules & functions == set()


def test_no_public_function_is_a_jit_object():
    for name, public in PUBLIC.items():
        assert not hasattr(public, "lower"), f"{name} hides its result from editors"
