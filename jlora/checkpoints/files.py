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
        with _create(temporary, path) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _create(temporary, path):
    try:
        return open(temporary, "xb")
    except OSError as error:
        # Named after the file that was asked for; the temporary one means nothing to a reader.
        raise type(error)(error.errno, error.strerror, str(path)) from None
