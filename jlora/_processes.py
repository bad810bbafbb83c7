"""Several processes of `jax.distributed`: the first one, and agreement of all.

Every function but `is_first_process` and `count_processes` communicates: all processes
must call it, in the same order. With one process they return at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MIN_BYTES = 256  # of an exchanged text: few sizes, so few compiled programs
_MAX_MESSAGE = 2000  # characters of the message of an error
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")

# Kinds of errors that other processes raise too; they raise RuntimeError for others.
_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, KeyError, NotImplementedError, MemoryError)
}


def count_processes() -> int:
    """Return the number of processes; 1 without `jax.distributed`."""
    # Without it, to ask JAX would start the devices.
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first_process() -> bool:
    """Return whether this process writes files, shows progress and warns."""
    return count_processes() == 1 or jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Return when all processes have called this with the same name."""
    check_same(name, "name")


def check_same(
    value: Any, name: str, advice: str = "Pass the same everywhere."
) -> None:
    """Refuse a value that differs between processes, on all of them.

    The values are compared by a hash. Arrays count with their dtype, shape and bits,
    keys of JAX with their data, functions with their qualified names, global arrays
    that no process holds whole with dtype and shape only.

    Args:
        value: a number, string, key, array, plan, or containers of such values.
        name: of the argument, for the message.
        advice: the last sentence of the message.

    Raises:
        ValueError: some process has another value.
    """
    if count_processes() == 1:
        return
    text = _identify((name, value))
    found = gather_texts(hashlib.sha256(text.encode()).hexdigest())
    other = next((i for i, each in enumerate(found) if each != found[0]), None)
    if other is not None:
        raise ValueError(
            f"`{name}` must be the same on all processes, got another one on process "
            f"{other} than on process 0. {advice}"
        )


@contextlib.contextmanager
def raising_on_all() -> Iterator[None]:
    """Wait for all processes at the end of a block; an error of one is raised on all.

    The block must not communicate after a point where one process may fail, because
    the failed one waits at the end already.
    """
    try:
        yield
    except Exception as error:
        share_error(error)
        raise
    share_error(None)


def share_error(error: Exception | None) -> None:
    """Raise on every process if one of them has an error, else return.

    Args:
        error: of this process, which raises this object. None: there is none.

    Raises:
        Exception: the error of this process, or of the first one that has one.
    """
    if count_processes() > 1:
        found = gather_texts("" if error is None else _encode_error(error))
        first = next((text for text in found if text), None)
        if error is None and first is not None:
            raise _decode_error(first)
    if error is not None:
        raise error


def share_json(value: Any) -> Any:
    """Return the value of the first process, made of JSON's types, on all."""
    if count_processes() == 1:
        return value
    text = json.dumps(value) if is_first_process() else ""
    return json.loads(gather_texts(text)[0])


def gather_texts(text: str) -> list[str]:
    """Return the texts of all processes, by the index of the process."""
    if count_processes() == 1:
        return [text]
    # Imported on use: it is no part of importing JAX.
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    try:
        lengths = multihost_utils.process_allgather(np.asarray(len(data), np.int32))
        most = int(lengths.max())
        if most == 0:
            return [""] * len(lengths)
        padded = np.zeros(max(_MIN_BYTES, 2 ** (most - 1).bit_length()), np.uint8)
        padded[: len(data)] = data
        rows = multihost_utils.process_allgather(padded)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(
            "all processes must reach this place, but one ended before or cannot be "
            f"reached ({reason}). Read the messages of the others, and start all again."
        ) from error

    pairs = zip(rows, lengths, strict=True)
    return [row[:length].tobytes().decode() for row, length in pairs]


def _encode_error(error: Exception) -> str:
    fields: dict[str, Any] = {"kind": type(error).__name__}
    if isinstance(error, OSError) and error.errno is not None:
        arguments = (error.errno, error.strerror, error.filename)
        fields["os"] = [each if each is None else _plain(each) for each in arguments]
    elif isinstance(error, OSError):
        fields["kind"] = "OSError"
    is_quoted = isinstance(error, KeyError) and error.args  # str() quotes its text
    text = str(error.args[0] if is_quoted else error) or type(error).__name__
    return json.dumps(fields | {"text": text[:_MAX_MESSAGE]})


def _plain(value: Any) -> int | str:
    return value if isinstance(value, int) else str(value)


def _decode_error(text: str) -> Exception:
    fields = json.loads(text)
    if "os" in fields:
        return OSError(*fields["os"])
    if fields["kind"] == "OSError":
        return OSError(fields["text"])
    kind = _ERRORS.get(fields["kind"])
    if kind is None:
        return RuntimeError(f"{fields['kind']} on another process: {fields['text']}")
    return kind(fields["text"])


def _identify(value: Any) -> str:
    """Return a text that is the same for equal values, in every process."""
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return _identify_array(value)
    if isinstance(value, functools.partial):
        value = (value.func, value.args, value.keywords)
    elif isinstance(value, Mapping):
        value = tuple(value.items())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        value = (type(value), *(getattr(value, field.name) for field in fields))

    if isinstance(value, (tuple, list)):
        return f"({','.join(map(_identify, value))})"
    if isinstance(value, (set, frozenset)):
        return f"{{{','.join(sorted(map(_identify, value)))}}}"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return _ADDRESS.sub("", repr(value))


def _identify_array(array: Any) -> str:
    head = f"{array.dtype}{array.shape}"
    if isinstance(array, jax.Array):
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        if not (array.is_fully_addressable or array.is_fully_replicated):
            return head
    data = np.ascontiguousarray(np.asarray(array)).tobytes()
    return f"{head}{hashlib.sha256(data).hexdigest()}"
