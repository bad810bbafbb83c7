"""Two domains of real text that every machine with Python has: its own library's sources."""

import pathlib
import sysconfig
from typing import NamedTuple

import numpy as np

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


class Corpus(NamedTuple):
    train: np.ndarray  # [N] uint8
    held_out: np.ndarray  # [M] uint8, other files than those of train


def read_corpus(packages):
    """Return the Corpus of some packages of the standard library; every fifth file is held out."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        file for package in packages for file in (folder / package).rglob("*.py")
    )
    texts = [file.read_bytes() for file in files]
    texts = [text for text in texts if len(text) > 1000]
    if len(texts) < 8:
        raise ValueError(
            f"{folder}: must hold the sources of {', '.join(packages)}, got {len(texts)} files of "
            "use. Install Python with its standard library as files."
        )
    held_out = b"".join(texts[::5])
    train = b"".join(text for index, text in enumerate(texts) if index % 5)
    return Corpus(np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8))


def sample_batches(text, num_batches, batch_size, length, seed):
    """Yield int32 [batch_size, length + 1] windows at random places of a text."""
    rng = np.random.default_rng(seed)
    for _ in range(num_batches):
        starts = rng.integers(0, len(text) - length - 1, batch_size)
        yield text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def cut_batches(text, num_batches, batch_size, length):
    """Return a list of int32 [batch_size, length + 1] windows at even distances of a text."""
    starts = np.linspace(0, len(text) - length - 1, num_batches * batch_size).astype(
        int
    )
    windows = text[starts[:, None] + np.arange(length + 1)].astype(np.int32)
    return list(windows.reshape(num_batches, batch_size, length + 1))
