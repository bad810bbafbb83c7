"""Arrays of a job on disk, a few matrices at a time, until the result is written.

A job works on a few matrices at a time, a window, and keeps what it finds in one file
of the partial folder. An interrupted run goes on with the next window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from jlora._progress import Progress
from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.modules import MatrixRef
from jlora.checkpoints.output_folder import OutputFolder
from jlora.checkpoints.safetensors import write_safetensors

WORK = "work"  # the folder of such files, removed at the end of a job
_WINDOW_BYTES = 64 * 2**20


class WindowStore:
    """The windows of one job, in the order of its matrices.

    Args:
        folder: of the job.
        refs: all matrices.
        rank: about how many columns the factors of each have.
        kind: a word for the names of the files.
    """

    def __init__(
        self, folder: OutputFolder, refs: Iterable[MatrixRef], rank: int, kind: str
    ) -> None:
        self._folder = folder
        self._windows = _split(refs, rank)
        self._names = _name_windows(len(self._windows), kind)
        self._places: dict[str, Checkpoint] = {}

    def list_missing(self, bar: Progress) -> Iterator[tuple[int, list[MatrixRef]]]:
        """Yield (number, matrices) of each window to write: not on disk, and ours.

        The bar counts the matrices of the windows that are on disk.
        """
        for number, window in enumerate(self._windows):
            if self._folder.has(self._names[number]):
                bar.count(len(window))
            elif self._folder.owns(number, len(self._windows)):
                yield number, window

    def wait(self) -> bool:
        """Return whether all windows are on disk, after the processes that write."""
        return self._folder.wait_for(self._names)

    def put(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the arrays of a window."""
        self._folder.write(
            self._names[number], lambda file: write_safetensors(file, arrays)
        )

    def open_window(self, ref: MatrixRef) -> Checkpoint:
        """Return the arrays of the window of a matrix; all windows must be there."""
        if not self._places:
            for number, window in enumerate(self._windows):
                checkpoint = open_checkpoint(self._folder.path / self._names[number])
                self._places |= {each.name: checkpoint for each in window}
        return self._places[ref.name]


def list_window_files(refs: Iterable[MatrixRef], rank: int, kind: str) -> list[str]:
    """Return the files of the windows that a store with these arguments has."""
    return _name_windows(len(_split(refs, rank)), kind)


def _name_windows(count: int, kind: str) -> list[str]:
    return [f"{WORK}/{kind}-{number:05}.safetensors" for number in range(count)]


def _split(refs: Iterable[MatrixRef], rank: int) -> list[list[MatrixRef]]:
    """Return the matrices in windows whose factors take a fixed number of bytes."""
    windows: list[list[MatrixRef]] = []
    room = 0
    for ref in refs:
        m, n = ref.module.shape
        size = 4 * min(rank, m, n) * (m + n)
        if size > room:
            windows.append([])
            room = max(_WINDOW_BYTES, size)
        windows[-1].append(ref)
        room -= size
    return windows
