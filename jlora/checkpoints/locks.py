"""Locks between processes, as files: the system frees them when a process ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import time
from collections.abc import Iterator


@contextlib.contextmanager
def hold_lock(
    path: pathlib.Path, *, is_shared: bool = False, num_tries: int = 1
) -> Iterator[bool]:
    """Yield whether a lock could be taken; it is held until the block ends.

    Args:
        path: of the lock.
        is_shared: whether several may hold it.
        num_tries: every tenth of a second, as others hold it for a short look.

    Raises:
        FileNotFoundError: the folder was renamed, because the job is done.
    """
    with open(path, "a+") as lock:
        kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
        if not _try_lock(lock.fileno(), kind, num_tries):
            yield False
            return
        # Another run may have removed the file between the two calls.
        if not os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
            raise FileNotFoundError(path)
        yield True


def _try_lock(descriptor: int, kind: int, num_tries: int) -> bool:
    for i in range(num_tries):
        time.sleep(0.1 if i else 0)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
    return False
