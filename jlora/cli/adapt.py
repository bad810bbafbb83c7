"""`jlora adapt`: factorise the matrices of a file, change V, write them to a file."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._numerics import frobenius_norm, to_compute
from jlora._types import Array, Float
from jlora.adaptation.adapted_weight import AdaptedWeight
from jlora.adaptation.merging import merge
from jlora.adaptation.paths import fold_path
from jlora.adaptation.plan import Plan
from jlora.adaptation.rule import Rule
from jlora.checkpoints.arrays import (
    check_count,
    check_savable,
    check_suffix,
    load_arrays,
    save_arrays,
)
from jlora.cli.domain import read_domain, replace_columns
from jlora.cli.output import say
from jlora.cli.outputs import check_outputs
from jlora.cli.pairs import read_pairs, train_on_pairs
from jlora.cli.targets import (
    add_targets,
    check_seed,
    check_targets,
    plan_targets,
)
from jlora.factorization.svd import randomized_svd
from jlora.factors import Factors, split_svd
from jlora.reconstruction.dense import reconstruct

# Returns an adapted weight with its new V, and a note to print about it.
Change = Callable[[AdaptedWeight], tuple[AdaptedWeight, str]]


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Return the parser of `jlora adapt`, added to the other subcommands."""
    parser = commands.add_parser(
        "adapt",
        help="factorise matrices of a file, change V, write the rebuilt weights",
        description=(
            "Each matching matrix A [m, n] becomes U V of the given rank, V is "
            "changed, and A' = U V is written in its place. Everything else in the "
            "file is copied."
        ),
    )
    add = parser.add_argument

    add("weights", metavar="WEIGHTS", help=".npy, .npz or .safetensors file")
    add(
        "-o",
        "--output",
        metavar="OUT",
        required=True,
        help="file to write, in any of these formats",
    )
    add("--rank", type=int, required=True, help="number of columns of U")
    add_targets(parser, "adapt")

    _add_changes(parser)
    add(
        "--factors",
        metavar="FILE",
        help="also write NAME.u and NAME.v of each matrix to this file",
    )
    _add_training(parser)
    return parser


def _add_changes(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how V and the weight change."""
    add = parser.add_argument

    add(
        "--columns",
        type=int,
        metavar="K",
        help="set the last K columns of V, from --domain",
    )
    add("--domain", metavar="FILE", help="array [rank, K] for the last K columns of V")
    add(
        "--data",
        metavar="PAIRS.npz",
        help="x [N, m] and y [N, n]: train V so that x A' meets y",
    )

    add(
        "--split",
        choices=("balanced", "left", "right"),
        default="right",
        help=(
            "factor that gets the singular values; right: U is orthonormal "
            "(default: %(default)s)"
        ),
    )
    add(
        "--keep-residual",
        action="store_true",
        help="A' = A - U V + U V', instead of U V'",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options of the training with --data."""
    add, default = parser.add_argument, "(default: %(default)s)"

    add("--steps", type=int, default=500, help=f"training steps with --data {default}")
    add(
        "--learning-rate",
        type=float,
        default=1e-2,
        help=f"of Adam, relative to the scale of V {default}",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help=f"of the random projections and of the batches {default}",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `jlora adapt`."""
    _check_arguments(arguments)
    arrays = load_arrays(arguments.weights)
    # A float64 file is computed in float64. For other files x64 would change nothing.
    with jax.enable_x64(any(array.dtype == np.float64 for array in arrays.values())):
        _adapt_file(arguments, arrays)


def _check_arguments(arguments: argparse.Namespace) -> None:
    _checks.check_integer(arguments.rank, "--rank")
    _checks.check_integer(arguments.steps, "--steps")
    check_seed(arguments)
    _check_changes(arguments)

    if not 0 < arguments.learning_rate < float("inf"):
        raise ValueError(
            "`--learning-rate` must be positive and finite, got "
            f"{arguments.learning_rate}. Choose another."
        )
    for path in filter(None, (arguments.output, arguments.factors)):
        check_suffix(path)
    check_targets(arguments)

    # WEIGHTS may be written in place.
    outputs = {"-o": arguments.output, "--factors": arguments.factors}
    check_outputs(outputs, {"--domain": arguments.domain, "--data": arguments.data})
    check_outputs({"--factors": arguments.factors}, {"WEIGHTS": arguments.weights})


def _check_changes(arguments: argparse.Namespace) -> None:
    if (arguments.columns is None) != (arguments.domain is None):
        raise ValueError(
            "`--columns` and `--domain` must come together, got one. Give both."
        )
    if (arguments.domain is None) == (arguments.data is None):
        raise ValueError(
            "`--domain` or `--data` must say what V becomes, got "
            f"{'neither' if arguments.data is None else 'both'}. Give one of them."
        )
    if arguments.columns is not None:
        _checks.check_integer(arguments.columns, "--columns")


def _adapt_file(
    arguments: argparse.Namespace, arrays: Mapping[str, np.ndarray]
) -> None:
    # Read and check everything before the first decomposition.
    rule = Rule(arguments.targets, arguments.rank, num_columns=arguments.columns)
    plan = plan_targets(arguments, arrays, rule)
    change = _choose_change(arguments, plan)
    check_savable(arguments.output, arrays)
    if arguments.factors:
        check_count(arguments.factors, 2 * len(plan.entries))

    # Factorise, change and rebuild each matrix.
    rebuilt, factors = {}, {}
    for entry in plan.entries:
        name, a = entry.path, arrays[entry.path]
        factorised = _factorise(arguments, name, a)
        error = _measure_error(a, factorised)
        adapted, note = change(factorised)

        rebuilt[name] = np.asarray(merge(adapted))
        _checks.check_finite(rebuilt[name], f"{name} (adapted)")
        factors |= {f"{name}.u": adapted.u, f"{name}.v": adapted.v}
        line = _describe(arguments, name, a, rebuilt[name], error)
        say(line + note)

    # Write the files only if all went well.
    save_arrays(arguments.output, {**arrays, **rebuilt})
    if arguments.factors:
        save_arrays(arguments.factors, factors)
    _print_total(arguments, rebuilt, len(arrays))


def _choose_change(arguments: argparse.Namespace, plan: Plan) -> Change:
    """Return the function that changes V, and read the file that it needs."""
    if arguments.domain is not None:
        values = read_domain(arguments)
        return lambda w: (replace_columns(w, values), "")

    x, y = read_pairs(arguments, plan)
    return functools.partial(train_on_pairs, arguments, x=x, y=y)


def _factorise(
    arguments: argparse.Namespace, name: str, a: np.ndarray
) -> AdaptedWeight:
    """Return the matrix, or stack, as factors; with --keep-residual also a base."""
    matrix = _checks.check_matrix(a, name)
    _checks.check_finite(matrix, name)
    key = fold_path(jax.random.key(arguments.seed), name)
    u, v = split_svd(randomized_svd(matrix, arguments.rank, key=key), arguments.split)

    base = None
    if arguments.keep_residual:
        base = reconstruct(Factors(u, v), matrix, scale=-1.0)
    return AdaptedWeight(base, u, v, jnp.ones((), u.dtype), "v", None, matrix.dtype)


def _measure_error(a: np.ndarray, w: AdaptedWeight) -> float:
    """Return the relative error of the factors, before V is changed."""
    exact = to_compute(jnp.asarray(a))
    residual = _norm_of_all(exact - reconstruct(w.factors))
    return float(residual / _one_if_zero(_norm_of_all(exact)))


def _norm_of_all(a: Float[Array, ...]) -> Float[Array, ""]:
    """Return the Frobenius norm of a matrix, or of all matrices of a stack together."""
    return jnp.linalg.norm(frobenius_norm(a))


def _one_if_zero(norm: Float[Array, ""]) -> Float[Array, ""]:
    """Return the norm to divide by: errors of a zero matrix are absolute."""
    return jnp.where(norm > 0, norm, 1)


def _describe(
    arguments: argparse.Namespace,
    name: str,
    a: np.ndarray,
    rebuilt: np.ndarray,
    error: float,
) -> str:
    before, after = to_compute(jnp.asarray(a), jnp.asarray(rebuilt))
    change = float(_norm_of_all(after - before) / _one_if_zero(_norm_of_all(before)))
    shape = "x".join(map(str, a.shape))
    return (
        f"{name}: {shape}, rank {arguments.rank}, energy kept {1 - error**2:.4f}, "
        f"relative error {error:.3e}, change in the weight {change:.3e}"
    )


def _print_total(
    arguments: argparse.Namespace, rebuilt: Mapping[str, np.ndarray], num_arrays: int
) -> None:
    # A matrix m x n of rank r has (m + n) r elements in its factors.
    num_full = sum(a.size for a in rebuilt.values())
    num_thin = 0
    for a in rebuilt.values():
        m, n = a.shape[-2:]
        num_thin += a.size // (m * n) * arguments.rank * (m + n)

    num_adapted = len(rebuilt)
    say(
        f"total: {num_adapted} of {num_arrays} arrays adapted, {num_full} elements as "
        f"{num_thin} in factors ({num_thin / num_full:.1%})"
    )
    say(
        f"wrote {arguments.output}: {num_arrays} arrays, {num_arrays - num_adapted} "
        "as before"
    )
    if arguments.factors:
        say(f"wrote {arguments.factors}: {2 * num_adapted} factors")
