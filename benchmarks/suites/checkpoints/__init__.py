"""Jobs on checkpoints, from files to files: their time, their error, their memory.

synthetic          tensors of checkpoints, and temporary folders
written_files      checkpoints and adapters written to files
opening            names and shapes of a checkpoint of many tensors
checkpoint_pairs   two checkpoints that differ by a known kind of change
extraction         their difference as an adapter
merges             an adapter merged into a checkpoint
resizing           an adapter of a smaller rank
memory             the peak memory of each job
torch_roads        the same jobs as scripts with torch do them
"""

from benchmarks.suites.checkpoints.extraction import (
    make_cold_extract_group,
    make_extract_group,
)
from benchmarks.suites.checkpoints.memory import make_memory_group
from benchmarks.suites.checkpoints.merges import make_merge_group
from benchmarks.suites.checkpoints.opening import make_open_group
from benchmarks.suites.checkpoints.resizing import make_resize_group

_VOCABULARY = 32000


def list_groups(level_name, platform):
    """Return the groups of this suite."""
    if level_name == "quick":
        return [
            make_open_group(10_000),
            make_extract_group(512, 1, 32, with_full_svd=True),
            make_cold_extract_group(512, 1, 32),
            make_merge_group(2**28, 512, _VOCABULARY, 16),
            make_resize_group(512, 1, 64, 16, with_dense=True),
        ]

    groups = [
        make_open_group(10_000),
        make_extract_group(2048, 8, 32, with_full_svd=False),
        make_extract_group(2048, 1, 32, with_full_svd=True),
        make_cold_extract_group(2048, 1, 32),
        make_merge_group(2**31, 2048, _VOCABULARY, 16),
        make_resize_group(2048, 32, 64, 16, with_dense=False),
        make_resize_group(2048, 1, 64, 16, with_dense=True),
    ]
    if platform == "cpu":
        groups.append(make_memory_group(2**32, 2048, _VOCABULARY))
    return groups
