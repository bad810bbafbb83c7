"""Files written whole or not at all."""

import contextlib
import os
import pathlib


@contextlib.contextmanager
def replace_file(path):
    """Give a binary file in the folder of `path`; on success flush it and rename it to `path`.

    On any failure the temporary file goes away and what stood at `path` stays.
    """
    path = pathlib.Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
