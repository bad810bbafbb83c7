"""`jlora ranks`: print the rank that each rule chooses for each matrix of a file."""

from __future__ import annotations

import argparse
import importlib.util
import math
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._numerics import frobenius_norm, to_compute
from jlora._types import AnyArray, Float
from jlora.adaptation.paths import fold_path
from jlora.adaptation.plan import PlanEntry
from jlora.adaptation.rule import Rule
from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.differences import count_work_bytes, read_wide
from jlora.checkpoints.memory import check_fits, check_max_memory
from jlora.cli.job_options import parse_size
from jlora.cli.output import say
from jlora.cli.outputs import check_outputs
from jlora.cli.spectra import MatrixSpectrum, plot_spectra
from jlora.cli.targets import (
    add_targets,
    check_seed,
    check_targets,
    plan_targets,
)
from jlora.factorization.svd import randomized_svd
from jlora.rank_selection.budget import allocate_ranks
from jlora.rank_selection.rules import RULES, choose_rank

_WHOLE = 1024  # largest matrix with a full SVD by default, which takes about a second
_ENERGY_RANKS = (8, 16, 32, 64, 128)


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Return the parser of `jlora ranks`, added to the other subcommands."""
    parser = commands.add_parser(
        "ranks",
        help="print the rank that each rule chooses for each matrix of a model",
        description=(
            "Prints, per matrix, a summary of its singular values and the rank that "
            "each rule chooses from them. For a matrix with more than "
            f"{_WHOLE} rows and columns only the leading values are computed, unless "
            "--exact is given."
        ),
    )
    add, default = parser.add_argument, "(default: %(default)s)"

    add(
        "weights",
        metavar="WEIGHTS",
        help=".npy, .npz or .safetensors file, or a model folder",
    )
    add_targets(parser, "look at")
    _add_rules(parser)

    add(
        "--budget",
        type=int,
        metavar="N",
        help="also distribute N parameters over the matrices",
    )
    add(
        "--multiple-of",
        type=int,
        default=8,
        help=f"divisor of the ranks that --budget gives {default}",
    )
    add(
        "--plot",
        metavar="FILE.png",
        help="draw spectra and cumulative energy (needs matplotlib)",
    )
    add("--seed", type=int, default=0, help=f"of the random projections {default}")
    add(
        "--max-memory",
        metavar="SIZE",
        help="memory of the process, such as 4GiB; JAX itself takes about 200 MiB",
    )
    return parser


def _add_rules(parser: argparse.ArgumentParser) -> None:
    """Add the options that the rules and the singular values depend on."""
    add, default = parser.add_argument, "(default: %(default)s)"

    add(
        "--energy",
        type=float,
        default=0.9,
        help=f"part of the squared norm to keep {default}",
    )
    add(
        "--tolerance",
        type=float,
        default=0.1,
        help=f"relative error to allow {default}",
    )
    add(
        "--max-rank",
        type=int,
        default=256,
        help=f"number of leading values of a large matrix {default}",
    )
    add("--exact", action="store_true", help="compute all values of large matrices too")


def run(arguments: argparse.Namespace) -> None:
    """Run `jlora ranks`."""
    _check_arguments(arguments)
    checkpoint = open_checkpoint(arguments.weights)
    plan = plan_targets(arguments, checkpoint, Rule(arguments.targets, 1))
    max_memory = None
    if arguments.max_memory is not None:
        max_memory = check_max_memory(parse_size(arguments.max_memory, "--max-memory"))

    spectra = []
    for entry in plan.entries:
        _check_memory(arguments, entry, checkpoint, max_memory)
        for name, a in _list_matrices(arguments, entry.path, checkpoint):
            spectra.append(_measure_spectrum(arguments, name, a))
            is_read = _say_all(_describe(arguments, spectra[-1]))
            if not is_read and not arguments.plot:
                return  # nobody is left to read the rest

    if arguments.budget is not None:
        _print_budget(arguments, spectra)
    if arguments.plot:
        plot_spectra(arguments.plot, spectra, arguments.energy)
        say(f"wrote {arguments.plot}: {len(spectra)} spectra")


def _check_memory(
    arguments: argparse.Namespace,
    entry: PlanEntry,
    checkpoint: Checkpoint,
    max_memory: int | None,
) -> None:
    """Refuse a tensor that does not fit in the memory of the command."""
    info = checkpoint.info(entry.path)
    *stack, m, n = info.shape
    needed = count_work_bytes((m, n), arguments.max_rank)
    if stack or _is_exact(arguments, (m, n)):  # read whole, and in float64
        needed += info.num_bytes + 24 * m * n
    check_fits(max_memory, needed, entry.path)


def _say_all(lines: Sequence[str]) -> bool:
    return all([say(line) for line in lines])


def _check_arguments(arguments: argparse.Namespace) -> None:
    check_targets(arguments)
    check_seed(arguments)
    _checks.check_integer(arguments.max_rank, "--max-rank")
    _checks.check_integer(arguments.multiple_of, "--multiple-of")
    if arguments.budget is not None:
        _checks.check_integer(arguments.budget, "--budget")
    check, advice = _checks.check_interval, "Choose another."
    check(arguments.energy, "--energy", 0, 1, closed="right", advice=advice)
    check(arguments.tolerance, "--tolerance", 0, 1, closed="left", advice=advice)

    if arguments.plot:
        if pathlib.Path(arguments.plot).suffix != ".png":
            raise ValueError(
                f"`--plot` must end in .png, got {arguments.plot}. Rename it."
            )
        check_outputs({"--plot": arguments.plot}, {"WEIGHTS": arguments.weights})
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError(
                "`--plot` must have matplotlib to draw with, got an environment "
                "without it. Install jlora[plot]."
            )


def _is_exact(arguments: argparse.Namespace, shape: tuple[int, ...]) -> bool:
    """Return whether all singular values of a matrix are computed."""
    return arguments.exact or min(shape) <= max(_WHOLE, arguments.max_rank)


def _list_matrices(
    arguments: argparse.Namespace, path: str, checkpoint: Checkpoint
) -> Iterator[tuple[str, Float[AnyArray, "m n"]]]:
    """Yield (name, matrix) of an array: itself, or each matrix of a stack."""
    shape = checkpoint.info(path).shape
    if len(shape) == 2 and not _is_exact(arguments, shape):
        yield path, read_wide(checkpoint, path)
        return
    array = checkpoint[path]
    if array.ndim == 2:
        yield path, array
        return
    for index in np.ndindex(array.shape[:-2]):
        yield f"{path}[{', '.join(map(str, index))}]", array[index]


def _measure_spectrum(
    arguments: argparse.Namespace, name: str, a: Float[AnyArray, "m n"]
) -> MatrixSpectrum:
    norm = float(frobenius_norm(to_compute(jnp.asarray(a))))
    if not math.isfinite(norm):
        _checks.check_finite(np.asarray(a), name)
    m, n = a.shape
    shape = (m, n)
    if _is_exact(arguments, shape):
        values = np.linalg.svd(np.asarray(a, np.float64), compute_uv=False)
        return MatrixSpectrum(name, shape, values, float(np.linalg.norm(values)))

    matrix = to_compute(jnp.asarray(a))
    key = fold_path(jax.random.key(arguments.seed), name)
    svd = randomized_svd(matrix, arguments.max_rank, key=key)
    return MatrixSpectrum(name, shape, np.asarray(svd.s, np.float64), norm)


def _describe(arguments: argparse.Namespace, spectrum: MatrixSpectrum) -> list[str]:
    """Return the lines to print about one matrix."""
    m, n = spectrum.shape
    num_values, is_whole = len(spectrum.values), spectrum.is_whole
    kind = f"all {num_values}" if is_whole else f"leading {num_values} of {min(m, n)}"
    median = f", median {np.median(spectrum.values):.4g}" if is_whole else ""
    lines = [
        f"{spectrum.name}: {m}x{n}, {kind} values, norm {spectrum.norm:.4g}, "
        f"largest {spectrum.values[0]:.4g}{median}"
    ]

    energy = spectrum.energy
    ranks = [rank for rank in _ENERGY_RANKS if rank <= num_values]
    if ranks:
        kept = ", ".join(f"{rank}: {energy[rank - 1]:.3f}" for rank in ranks)
        lines.append(f"  energy kept at rank {kept}")

    choices = [f"{rule} {_apply_rule(arguments, spectrum, rule)}" for rule in RULES]
    return [*lines, f"  {', '.join(choices)}"]


def _apply_rule(
    arguments: argparse.Namespace, spectrum: MatrixSpectrum, rule: str
) -> str:
    """Return the rank that a rule chooses, or "-" if it needs other values."""
    # The last values of a nearly singular matrix fall off steeply. That is no gap
    # between signal and noise, so the rule sees only the first half.
    num_values = len(spectrum.values)
    max_rank = max(1, num_values // 2) if rule == "gap" else None
    try:
        rank, _ = choose_rank(
            spectrum.values,
            rule,
            shape=spectrum.shape,
            norm=spectrum.norm,
            max_rank=max_rank,
            energy=arguments.energy,
            tolerance=arguments.tolerance,
        )
    except ValueError:
        return "-"

    is_lower_bound = rule != "gap" and rank == num_values and not spectrum.is_whole
    return f"{rank} or more" if is_lower_bound else str(rank)


def _print_budget(
    arguments: argparse.Namespace, spectra: Sequence[MatrixSpectrum]
) -> None:
    ranks = allocate_ranks(
        {spectrum.name: spectrum.values for spectrum in spectra},
        budget=arguments.budget,
        shapes={spectrum.name: spectrum.shape for spectrum in spectra},
        multiple_of=arguments.multiple_of,
    )
    assert isinstance(ranks, dict)  # as the spectra

    # Sum the parameters and the energy of the chosen ranks.
    spent, kept = 0, 0.0
    for spectrum, rank in zip(spectra, ranks.values(), strict=True):
        spent += rank * sum(spectrum.shape)
        kept += np.sum(spectrum.values[:rank] ** 2)
    total = sum(spectrum.norm**2 for spectrum in spectra)

    say(
        f"budget: {spent} of {arguments.budget} parameters, energy kept "
        f"{kept / (total or 1):.3f}"
    )
    for name, rank in ranks.items():
        say(f"  {name}: {rank}")
