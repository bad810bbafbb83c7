"""The package as a whole: the cost of its import, and its demonstration.

fresh_processes   both are measured in processes of their own
whole_run         the record of a run of all suites
"""

from benchmarks.suites.package.fresh_processes import make_demo_group, make_import_group
from benchmarks.suites.package.whole_run import make_whole_run

__all__ = ["list_groups", "make_whole_run"]


def list_groups(level_name, platform):
    """Return the groups of this suite."""
    groups = [make_import_group()]
    if level_name == "full" and platform == "cpu":
        groups.append(make_demo_group())
    return groups
