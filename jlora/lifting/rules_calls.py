"""Rules for programs inside a program: remat, conditionals, loops, scans."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import quax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jax.extend.core.primitives import remat_p
from jaxtyping import ArrayLike

from jlora._types import AnyArray
from jlora.lifting.lifted_weight import LiftedWeight, materialize, replace, to_array
from jlora.quantization.quantized_array import QuantizedArray

Arrays = tuple[AnyArray | QuantizedArray | None, AnyArray, AnyArray]  # base, u, v


@quax.register(remat_p)
def rematerialize(
    *args: LiftedWeight | ArrayLike,
    jaxpr: Jaxpr,
    policy: Callable[..., Any] | None,
    prevent_cse: Any,
    **params: Any,
) -> list:
    del params
    run = quax.quaxify(jaxpr_as_fun(ClosedJaxpr(jaxpr, ())))
    return jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse)(*args)


@quax.register(lax.cond_p)
def choose_branch(
    index: ArrayLike,
    *args: LiftedWeight | ArrayLike,
    branches: Sequence[ClosedJaxpr],
    **params: Any,
) -> list:
    del params

    # The results of all branches must have one type, and an array is that.
    def make_branch(program: ClosedJaxpr) -> Callable[..., list]:
        run = quax.quaxify(jaxpr_as_fun(program))
        return lambda *args: [to_array(value, "`cond`") for value in run(*args)]

    return lax.switch(index, [make_branch(program) for program in branches], *args)


@quax.register(lax.while_p)
def loop_while(
    *args: LiftedWeight | ArrayLike,
    cond_nconsts: int,
    cond_jaxpr: ClosedJaxpr,
    body_nconsts: int,
    body_jaxpr: ClosedJaxpr,
) -> list:
    num_consts = cond_nconsts + body_nconsts
    cond_consts, body_consts = args[:cond_nconsts], args[cond_nconsts:num_consts]
    carry: list[Any] = list(args[num_consts:])
    run_cond = quax.quaxify(jaxpr_as_fun(cond_jaxpr))
    run_body = quax.quaxify(jaxpr_as_fun(body_jaxpr))

    def should_continue(carry: list) -> ArrayLike:
        return run_cond(*cond_consts, *carry)[0]

    def step(carry: list) -> list:
        # If an entry of the carry starts as an array, keep it an array.
        out = run_body(*body_consts, *carry)
        return [
            new if isinstance(old, LiftedWeight) else to_array(new, "`while`")
            for old, new in zip(carry, out, strict=True)
        ]

    # A weight can stay in the carry only if a step keeps its type. Once one entry is an
    # array, a step may change the type of another one, so check again.
    while changed := _find_changed(carry, jax.eval_shape(step, carry)):
        for index in changed:
            carry[index] = materialize(carry[index], "`while`")
    return lax.while_loop(should_continue, step, carry)


def _find_changed(carry: list, out: list) -> list[int]:
    """Return the indices of the weights in the carry whose type a step changes."""
    return [
        index
        for index, (old, new) in enumerate(zip(carry, out, strict=True))
        if isinstance(old, LiftedWeight) and _describe_type(old) != _describe_type(new)
    ]


def _describe_type(value: Any) -> tuple[Any, list]:
    leaves, structure = jax.tree.flatten(value)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


@quax.register(lax.scan_p)
def scan(
    *args: LiftedWeight | ArrayLike,
    jaxpr: ClosedJaxpr,
    length: int,
    reverse: bool,
    unroll: int,
    **params: Any,
) -> list:
    consts, carry, xs = _group_arguments(args, params)
    run = quax.quaxify(jaxpr_as_fun(jaxpr))
    carry = [to_array(value, "the carry of `scan`") for value in carry]

    # Scan over the arrays of stacked weights; a step builds the weight of one row.
    xs = [_check_stack(x) for x in xs]
    y_templates = []

    def step(carry: list, rows: list) -> tuple[list, list]:
        rows = [_build_row(x, row) for x, row in zip(xs, rows, strict=True)]
        out = run(*consts, *carry, *rows)

        # Keep the weights among the outputs: their fields say how to build the stacks.
        new_carry, ys = out[: len(carry)], out[len(carry) :]
        y_templates[:] = ys
        new_carry = [to_array(value, "the carry of `scan`") for value in new_carry]
        return new_carry, [_take_arrays(y) for y in ys]

    carry, ys = lax.scan(
        step,
        carry,
        [_take_arrays(x) for x in xs],
        length=length,
        reverse=reverse,
        unroll=unroll,
    )
    stacks = [_build_stack(y, rows) for y, rows in zip(y_templates, ys, strict=True)]
    return [*carry, *stacks]


def _group_arguments(args: Sequence, params: dict[str, Any]) -> tuple[list, list, list]:
    """Return (constants, carry, xs); versions of JAX tell their numbers in two ways."""
    if "num_consts" in params:
        num_consts = params["num_consts"]
        num_before_xs = num_consts + params["num_carry"]
        consts, carry = args[:num_consts], args[num_consts:num_before_xs]
        return list(consts), list(carry), list(args[num_before_xs:])

    consts, carry, xs = params["ft_in"].update(args).unpack()
    return list(consts.vals), list(carry.vals), list(xs.vals)


def _check_stack(x: LiftedWeight | ArrayLike) -> LiftedWeight | ArrayLike:
    """Return the input of a scan; a weight with no batch axis first is materialised."""
    if isinstance(x, LiftedWeight) and x.layout[0] != "b":
        return materialize(x, "`scan` over its inputs or outputs")
    return x


def _take_arrays(value: LiftedWeight | ArrayLike) -> Arrays | ArrayLike:
    if isinstance(value, LiftedWeight):
        return value.base, value.u, value.v
    return value


def _build_row(stack: Any, row: Any) -> Any:
    """Return one row of an input of a scan: a weight, if the input is one."""
    if isinstance(stack, LiftedWeight):
        return _replace_arrays(stack, row, stack.layout[1:])
    return row


def _build_stack(row: Any, stack: Any) -> Any:
    """Return an output of a scan: a weight, if a row of it is one."""
    if isinstance(row, LiftedWeight):
        return _replace_arrays(row, stack, "b" + row.layout)
    return stack


def _replace_arrays(weight: LiftedWeight, arrays: Arrays, layout: str) -> LiftedWeight:
    base, u, v = arrays
    return replace(weight, base=base, u=u, v=v, layout=layout)
