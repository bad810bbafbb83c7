"""`jlora ranks`: what the spectrum of each matrix of a file says about its rank."""

import importlib.util
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._numerics import frobenius_norm, to_compute
from jlora.adaptation.paths import fold_path
from jlora.adaptation.rule import Rule
from jlora.checkpoints.arrays import load_arrays
from jlora.checkpoints.files import replace_file
from jlora.cli.targets import add_targets, check_targets, plan_targets
from jlora.factorization.svd import randomized_svd
from jlora.rank_selection.budget import allocate_ranks
from jlora.rank_selection.rules import RULES, choose_rank

_WHOLE = 1024  # the full decomposition of a matrix no larger takes about a second
_ENERGY_RANKS = (8, 16, 32, 64, 128)
_MOST_NAMES = 12  # in the legend of a plot


def add_parser(commands):
    parser = commands.add_parser(
        "ranks",
        help="print what each rule says about the rank of each matrix of a file",
        description=(
            "Per matrix: the summary of its singular values, and the rank that each rule reads "
            "from them. Of a matrix of more than "
            f"{_WHOLE} rows and columns only the leading values are computed, unless --exact."
        ),
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    add("weights", metavar="WEIGHTS", help=".npy, .npz or .safetensors file")
    add_targets(parser, "look at")
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
        help=f"leading values of a large matrix {default}",
    )
    add("--exact", action="store_true", help="compute all values of large matrices too")
    add(
        "--budget",
        type=int,
        metavar="N",
        help="also share N parameters out over the matrices",
    )
    add(
        "--multiple-of",
        type=int,
        default=8,
        help=f"ranks that --budget gives {default}",
    )
    add(
        "--plot",
        metavar="FILE.png",
        help="draw spectra and cumulative energy (needs matplotlib)",
    )
    add("--seed", type=int, default=0, help=f"of the random projections {default}")
    return parser


class _Matrix(NamedTuple):
    name: str
    shape: tuple[int, int]
    values: np.ndarray  # [k] leading singular values, descending
    norm: float

    @property
    def is_whole(self):
        return len(self.values) == min(self.shape)


def run(arguments):
    _check_arguments(arguments)
    arrays = load_arrays(arguments.weights)
    plan = plan_targets(arguments, arrays, Rule(arguments.targets, 1))
    matrices = []
    for entry in plan.entries:
        for name, a in _list_matrices(entry.path, arrays[entry.path]):
            matrices.append(_measure(arguments, name, a))
            print(_describe(arguments, matrices[-1]), flush=True)
    if arguments.budget is not None:
        _print_budget(arguments, matrices)
    if arguments.plot:
        _draw(arguments, matrices)
        print(f"wrote {arguments.plot}: {len(matrices)} spectra")


def _check_arguments(arguments):
    check_targets(arguments)
    _checks.check_integer(arguments.max_rank, "--max-rank")
    _checks.check_integer(arguments.multiple_of, "--multiple-of")
    if arguments.budget is not None:
        _checks.check_integer(arguments.budget, "--budget")
    if not 0 < arguments.energy <= 1:
        raise ValueError(
            f"`--energy` must lie in (0, 1], got {arguments.energy}. Choose another."
        )
    if not 0 <= arguments.tolerance < 1:
        raise ValueError(
            f"`--tolerance` must lie in [0, 1), got {arguments.tolerance}. Choose another."
        )
    if arguments.plot:
        if pathlib.Path(arguments.plot).suffix != ".png":
            raise ValueError(
                f"`--plot` must end in .png, got {arguments.plot}. Rename it."
            )
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError(
                "`--plot` must have matplotlib to draw with, got an environment without it. "
                "Install jlora[plot]."
            )


def _list_matrices(path, array):
    """Return [(name, matrix)]: each matrix of a stack by itself."""
    _checks.check_finite(array, path)
    if array.ndim == 2:
        return [(path, array)]
    indices = np.ndindex(array.shape[:-2])
    return [
        (f"{path}[{', '.join(map(str, index))}]", array[index]) for index in indices
    ]


def _measure(arguments, name, a):
    shape = a.shape
    if arguments.exact or min(shape) <= max(_WHOLE, arguments.max_rank):
        values = np.linalg.svd(a.astype(np.float64), compute_uv=False)
        return _Matrix(name, shape, values, float(np.linalg.norm(values)))
    a = to_compute(jnp.asarray(a))
    key = fold_path(jax.random.key(arguments.seed), name)
    values = np.asarray(randomized_svd(a, arguments.max_rank, key=key).s, np.float64)
    return _Matrix(name, shape, values, float(frobenius_norm(a)))


def _describe(arguments, matrix):
    m, n = matrix.shape
    values, norm = matrix.values, matrix.norm
    kind = (
        f"all {len(values)}"
        if matrix.is_whole
        else f"leading {len(values)} of {min(m, n)}"
    )
    energy = np.cumsum(values**2) / (norm**2 or 1)
    kept = [
        f"{rank}: {energy[rank - 1]:.3f}"
        for rank in _ENERGY_RANKS
        if rank <= len(values)
    ]
    median = f", median {np.median(values):.4g}" if matrix.is_whole else ""
    ranks = ", ".join(f"{rule} {_ask(arguments, matrix, rule)}" for rule in RULES)
    return (
        f"{matrix.name}: {m}x{n}, {kind} values, norm {norm:.4g}, largest {values[0]:.4g}{median}\n"
        + (f"  energy kept at rank {', '.join(kept)}\n" if kept else "")
        + f"  {ranks}"
    )


def _ask(arguments, matrix, rule):
    """Return what a rule says, as text; "-" where it cannot be applied to these values."""
    # The last values of a matrix that is all but singular fall off steeply, and say nothing.
    most = max(1, len(matrix.values) // 2) if rule == "gap" else None
    try:
        rank, _ = choose_rank(
            matrix.values,
            rule,
            shape=matrix.shape,
            norm=matrix.norm,
            max_rank=most,
            energy=arguments.energy,
            tolerance=arguments.tolerance,
        )
    except ValueError:
        return "-"
    is_cut = rule != "gap" and rank == len(matrix.values) and not matrix.is_whole
    return f"{rank} or more" if is_cut else str(rank)


def _print_budget(arguments, matrices):
    ranks = allocate_ranks(
        {matrix.name: matrix.values for matrix in matrices},
        budget=arguments.budget,
        shapes={matrix.name: matrix.shape for matrix in matrices},
        multiple_of=arguments.multiple_of,
    )
    spent = sum(
        rank * sum(matrix.shape)
        for rank, matrix in zip(ranks.values(), matrices, strict=True)
    )
    total = sum(matrix.norm**2 for matrix in matrices)
    kept = sum(
        np.sum(matrix.values[:rank] ** 2)
        for rank, matrix in zip(ranks.values(), matrices, strict=True)
    )
    print(
        f"budget: {spent} of {arguments.budget} parameters, energy kept {kept / total:.3f}"
    )
    for name, rank in ranks.items():
        print(f"  {name}: {rank}")


def _draw(arguments, matrices):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, matrix in enumerate(matrices):
        ranks = np.arange(1, len(matrix.values) + 1)
        label = matrix.name if number < _MOST_NAMES else None
        left.loglog(ranks, matrix.values / (matrix.values[0] or 1), label=label)
        right.semilogx(ranks, np.cumsum(matrix.values**2) / (matrix.norm**2 or 1))
    left.set(xlabel="k", ylabel="singular value over the largest", title="Spectra")
    right.set(
        xlabel="rank",
        ylabel="part of the squared norm",
        title="Cumulative energy",
        ylim=(0, 1.02),
    )
    right.axhline(arguments.energy, color="gray", linewidth=0.8, linestyle=":")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    if len(matrices) > _MOST_NAMES:
        left.plot([], [], " ", label=f"and {len(matrices) - _MOST_NAMES} more")
    figure.legend(loc="outside right upper", fontsize="small")
    with replace_file(arguments.plot) as file:
        figure.savefig(file, format="png", dpi=150)
