"""Text of two domains that every machine with Python has: sources of its library."""

from __future__ import annotations

import pathlib
import sysconfig
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from jlora._types import Int

GENERAL = (
    "collections",
    "concurrent",
    "ctypes",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
DOMAIN = "email"

Text = UInt8[np.ndarray, " length"]
Batch = Int[np.ndarray, "batch window"]  # int32


class Corpus(NamedTuple):
    """Text to train on, and text of other files to evaluate on."""

    train: Text
    held_out: Text


def read_corpus(packages: Sequence[str]) -> Corpus:
    """Return the `Corpus` of packages of the standard library.

    Every fifth file is held out.
    """
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = []
    for package in packages:
        files.extend((folder / package).rglob("*.py"))

    texts = [file.read_bytes() for file in sorted(files)]
    texts = [text for text in texts if len(text) > 1000]
    if len(texts) < 8:
        raise ValueError(
            f"{folder}: must hold the sources of {', '.join(packages)}, got "
            f"{len(texts)} files above 1000 bytes. Install Python with its standard "
            "library as files."
        )

    held_out = b"".join(texts[::5])
    train = b"".join(text for index, text in enumerate(texts) if index % 5)
    return Corpus(np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8))


def sample_batches(
    text: Text, num_batches: int, batch_size: int, length: int, seed: int
) -> Iterator[Batch]:
    """Yield batches of windows of length + 1 bytes at random positions of a text."""
    rng = np.random.default_rng(seed)
    for _ in range(num_batches):
        positions = rng.integers(0, len(text) - length - 1, batch_size)
        yield _read_windows(text, positions, length)


def list_batches(
    text: Text, num_batches: int, batch_size: int, length: int
) -> list[Batch]:
    """Return batches of windows of length + 1 bytes, evenly spaced over a text."""
    num_windows = num_batches * batch_size
    positions = np.linspace(0, len(text) - length - 1, num_windows).astype(int)
    windows = _read_windows(text, positions, length)
    return list(windows.reshape(num_batches, batch_size, length + 1))


def _read_windows(
    text: Text, positions: Int[np.ndarray, " batch"], length: int
) -> Batch:
    return text[positions[:, None] + np.arange(length + 1)].astype(np.int32)
