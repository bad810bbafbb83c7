"""Reading ahead and writing behind while the device computes."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Pipeline:
    """A thread that reads the next block, and one that writes the last ones in order.

    One block is read, one is computed and one is written at a time, so the memory is
    bounded. An error of either thread is raised by the next call, or at the end.
    """

    def __init__(self) -> None:
        self._reader = ThreadPoolExecutor(1)
        self._writer = ThreadPoolExecutor(1)
        self._writing: collections.deque[Future] = collections.deque()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if error is None:
                self._wait(0)
        finally:
            # After an error nothing more is written.
            for pool in (self._reader, self._writer):
                pool.shutdown(wait=True, cancel_futures=True)

    def read(self, calls: Iterable[tuple]) -> Iterator[Any]:
        """Yield the results of calls (function, *arguments), each begun ahead."""
        waiting: Future | None = None
        for function, *arguments in calls:
            following = self._reader.submit(function, *arguments)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()

    def write(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function after all those before it, without waiting for it."""
        self._wait(1)
        self._writing.append(self._writer.submit(function, *arguments))

    def _wait(self, most: int) -> None:
        """Wait until at most so many calls are not done."""
        while len(self._writing) > most:
            self._writing.popleft().result()
