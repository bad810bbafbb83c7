"""One file a suite; each has `list_groups(level_name, platform)`."""

import importlib

SUITES = ("factorization", "updates", "reconstruction", "adaptation", "package")


def list_suite(name, level_name, platform):
    """Return the groups of one suite for a level ("quick", "full") on a platform."""
    module = importlib.import_module(f"benchmarks.suites.{name}")
    return module.list_groups(level_name, platform)
