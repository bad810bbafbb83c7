"""`jlora adapt`: factorise the matrices of a file, change V, write them back."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora import _checks
from jlora._numerics import frobenius_norm, to_compute
from jlora.adaptation.adapted_weight import AdaptedWeight, linear, merge
from jlora.adaptation.paths import fold_path
from jlora.adaptation.rule import Rule
from jlora.checkpoints.arrays import check_count, check_suffix, load_arrays, save_arrays
from jlora.cli.targets import add_targets, check_targets, plan_targets
from jlora.factorization.svd import randomized_svd
from jlora.factors import Factors, split_svd
from jlora.reconstruction.dense import reconstruct
from jlora.training.loop import fit
from jlora.updates.columns import set_columns

_BATCH_ROWS = 256


def add_parser(commands):
    parser = commands.add_parser(
        "adapt",
        help="factorise matrices of a file, change V, write the reconstructed weights",
        description=(
            "Each matching matrix A [m, n] becomes U V of the given rank, V is changed, and "
            "A' = U V is written in its place. Everything else in the file is copied."
        ),
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    add("weights", metavar="WEIGHTS", help=".npy, .npz or .safetensors file")
    add(
        "-o",
        "--output",
        metavar="OUT",
        required=True,
        help="file to write, any of the formats",
    )
    add("--rank", type=int, required=True, help="columns of U")
    add_targets(parser, "adapt")
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
        help=f"where the singular values go; right: U orthonormal {default}",
    )
    add("--keep-residual", action="store_true", help="A' = A - U V + U V', not U V'")
    add(
        "--factors",
        metavar="FILE",
        help="also write NAME.u and NAME.v of each matrix here",
    )
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
    return parser


def run(arguments):
    _check_arguments(arguments)
    arrays = load_arrays(arguments.weights)
    # A float64 file is computed in float64; switching it on otherwise would change nothing.
    with jax.enable_x64(any(array.dtype == np.float64 for array in arrays.values())):
        _adapt_file(arguments, arrays)


def _adapt_file(arguments, arrays):
    rule = Rule(arguments.targets, arguments.rank, num_columns=arguments.columns)
    plan = plan_targets(arguments, arrays, rule)
    change = _choose_change(arguments, plan)
    _check_outputs(arguments, arrays)
    changed, factors = {}, {}
    for entry in plan.entries:
        a, name = arrays[entry.path], entry.path
        factorised = _factorise(arguments, name, a)
        kept = _measure_kept(a, factorised)
        adapted, note = change(factorised)
        changed[name] = np.asarray(merge(adapted))
        _checks.check_finite(changed[name], f"{name} (adapted)")
        factors |= {f"{name}.u": adapted.u, f"{name}.v": adapted.v}
        print(_describe(arguments, name, a, changed[name], kept) + note, flush=True)
    save_arrays(arguments.output, arrays | changed)
    if arguments.factors:
        save_arrays(arguments.factors, factors)
    _print_total(arguments, arrays, changed)


def _factorise(arguments, name, a):
    a = _checks.check_matrix(a, name)
    _checks.check_finite(a, name)
    key = fold_path(jax.random.key(arguments.seed), name)
    u, v = split_svd(randomized_svd(a, arguments.rank, key=key), arguments.split)
    base = (
        reconstruct(Factors(u, v), a, scale=-1.0) if arguments.keep_residual else None
    )
    return AdaptedWeight(base, u, v, jnp.ones((), u.dtype), "v", None, a.dtype)


def _choose_change(arguments, plan):
    """Return change(adapted) -> (adapted with its new V, what to print about it)."""
    if arguments.domain is not None:
        values = _read_domain(arguments)
        return lambda w: (_replace_columns(w, arguments.columns, values), "")
    x, y = _read_pairs(arguments, plan)
    return lambda w: _train(arguments, w, x, y)


def _replace_columns(w, columns, values):
    return dataclasses.replace(w, v=set_columns(w.factors, columns, values).v)


def _read_domain(arguments):
    path, rank = arguments.domain, arguments.rank
    if check_suffix(path) != ".npy":
        raise ValueError(
            f"{path}: `--domain` must be a .npy file, got another. Save it as one."
        )
    (values,) = load_arrays(path).values()
    if values.ndim != 2 or values.shape[0] != rank:
        raise ValueError(
            f"{path}: `--domain` must be an array with rank = {rank} rows, got shape "
            f"{values.shape}. Each of its columns becomes a column of V."
        )
    expected = (rank, arguments.columns)
    _checks.check_shape(
        values.shape, expected, f"--domain {path}", "rank rows, --columns columns"
    )
    values = _checks.check_matrix(values, f"--domain {path}")
    _checks.check_finite(values, f"--domain {path}")
    return values


def _read_pairs(arguments, plan):
    path = arguments.data
    pairs = load_arrays(path)
    if not {"x", "y"} <= pairs.keys():
        raise ValueError(
            f"{path}: `--data` must hold arrays named x and y, got {', '.join(pairs) or 'none'}. "
            "Save it with numpy.savez(path, x=x, y=y)."
        )
    x, y = (_checks.check_matrix(pairs[name], f"{name} in {path}") for name in "xy")
    for name, array in (("x", x), ("y", y)):
        _checks.check_finite(array, f"{name} in {path}")
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0] or x.shape[0] < 2:
        raise ValueError(
            f"{path}: x and y must be [N, m] and [N, n] with N of at least 2, got {x.shape} and "
            f"{y.shape}. Pair each input with one output."
        )
    for entry in plan.entries:
        expected = (x.shape[-1], y.shape[-1])
        _checks.check_shape(
            entry.shape, expected, entry.path, f"the columns of x and y in {path}"
        )
    return x, y


def _train(arguments, w, x, y):
    dtype = w.v.dtype
    rng = np.random.default_rng(arguments.seed)
    order = rng.permutation(len(x))
    num_held = max(1, len(x) // 10)
    x, y = np.asarray(x, dtype)[order], np.asarray(y, dtype)[order]
    held, x, y = (x[:num_held], y[:num_held]), x[num_held:], y[num_held:]
    root_mean_square = float(jnp.sqrt(jnp.mean(w.v**2))) or 1.0
    rate = optax.cosine_decay_schedule(
        arguments.learning_rate * root_mean_square, arguments.steps
    )
    batches = _sample_rows(rng, x, y, arguments.steps)
    result = fit(_mean_square, w, optax.adam(rate), batches, num_steps=arguments.steps)
    if result.stop_reason:
        raise ValueError(
            f"`--data` must train to a finite loss, got: {result.stop_reason}"
        )
    errors = [_relative_output_error(weight, *held) for weight in (w, result.adapted)]
    note = f", held-out error {errors[0]:.4g} -> {errors[1]:.4g} ({num_held} of {len(order)} rows)"
    return result.adapted, note


def _sample_rows(rng, x, y, num_steps):
    for _ in range(num_steps):
        rows = rng.choice(len(x), min(_BATCH_ROWS, len(x)), replace=False)
        yield x[rows], y[rows]


def _mean_square(w, batch):
    x, y = batch
    return jnp.mean((linear(x, w) - y) ** 2)


def _relative_output_error(w, x, y):
    return float(frobenius_norm(linear(x, w) - y) / frobenius_norm(jnp.asarray(y)))


def _check_arguments(arguments):
    _checks.check_integer(arguments.rank, "--rank")
    _checks.check_integer(arguments.steps, "--steps")
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
    if not 0 < arguments.learning_rate < float("inf"):
        raise ValueError(
            f"`--learning-rate` must be positive and finite, got {arguments.learning_rate}. "
            "Choose another."
        )
    for path in filter(None, (arguments.output, arguments.factors)):
        check_suffix(path)
    check_targets(arguments)


def _check_outputs(arguments, arrays):
    check_count(arguments.output, len(arrays))
    for path in filter(None, (arguments.output, arguments.factors)):
        folder = os.path.dirname(os.path.realpath(path))
        if (
            os.path.isdir(path)
            or not os.path.isdir(folder)
            or not os.access(folder, os.W_OK)
        ):
            raise ValueError(
                f"{path}: must be a file in a folder that can be written to, got none. "
                "Choose another path."
            )


def _measure_kept(a, w):
    """Return (energy kept, relative error) of the factors, before V is changed."""
    a = to_compute(jnp.asarray(a))
    left = frobenius_norm(a - reconstruct(w.factors))
    error = float(jnp.linalg.norm(left) / _positive(jnp.linalg.norm(frobenius_norm(a))))
    return 1 - error**2, error


def _describe(arguments, name, a, changed, kept):
    before, after = to_compute(jnp.asarray(a), jnp.asarray(changed))
    moved = jnp.linalg.norm(frobenius_norm(after - before))
    change = float(moved / _positive(jnp.linalg.norm(frobenius_norm(before))))
    shape = "x".join(map(str, a.shape))
    return (
        f"{name}: {shape}, rank {arguments.rank}, energy kept {kept[0]:.4f}, "
        f"relative error {kept[1]:.3e}, change in the weight {change:.3e}"
    )


def _positive(norm):
    """A zero matrix has no relative error; against 1, its error and change come out absolute."""
    return jnp.where(norm > 0, norm, 1)


def _print_total(arguments, arrays, changed):
    full = sum(a.size for a in changed.values())
    thin = sum(
        a.size
        // (a.shape[-2] * a.shape[-1])
        * arguments.rank
        * (a.shape[-2] + a.shape[-1])
        for a in changed.values()
    )
    print(
        f"total: {len(changed)} of {len(arrays)} arrays adapted, {full} numbers as {thin} in "
        f"factors ({thin / full:.1%})"
    )
    print(
        f"wrote {arguments.output}: {len(arrays)} arrays, {len(arrays) - len(changed)} as before"
    )
    if arguments.factors:
        print(f"wrote {arguments.factors}: {2 * len(changed)} factors")
