"""Spectra of the matrices of a file, and their plot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jlora._types import Float
from jlora.checkpoints.files import replace_file

_MAX_NAMES = 12  # in the legend


class MatrixSpectrum(NamedTuple):
    """The leading singular values of one matrix, and its norm."""

    name: str
    shape: tuple[int, int]
    values: Float[np.ndarray, " k"]  # descending
    norm: float  # Frobenius norm of the whole matrix

    @property
    def is_whole(self) -> bool:
        """Whether these are all singular values."""
        return len(self.values) == min(self.shape)

    @property
    def energy(self) -> Float[np.ndarray, " k"]:
        """Fraction of the squared norm in the first 1, ..., k values; 0 for zero."""
        return np.cumsum(self.values**2) / (self.norm**2 or 1)


def plot_spectra(
    path: str | os.PathLike[str], spectra: Sequence[MatrixSpectrum], energy: float
) -> None:
    """Write a PNG file with the singular values and energies of all matrices.

    Args:
        path: of the file.
        spectra: of at least one matrix.
        energy: fraction of the squared norm to mark with a line.
    """
    # Imported in the call: matplotlib is an extra.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)

    # Draw one curve per matrix; the legend names only the first ones.
    for index, spectrum in enumerate(spectra):
        ranks = np.arange(1, len(spectrum.values) + 1)
        relative_values = spectrum.values / (spectrum.values[0] or 1)
        label = spectrum.name if index < _MAX_NAMES else None
        left.loglog(ranks, relative_values, label=label)
        right.semilogx(ranks, spectrum.energy)
    if len(spectra) > _MAX_NAMES:
        left.plot([], [], " ", label=f"and {len(spectra) - _MAX_NAMES} more")

    # Label the axes and mark the energy.
    left.set(xlabel="k", ylabel="singular value over the largest", title="Spectra")
    right.set(
        xlabel="rank",
        ylabel="part of the squared norm",
        title="Cumulative energy",
        ylim=(0, 1.02),
    )
    right.axhline(energy, color="gray", linewidth=0.8, linestyle=":")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")

    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=150)
