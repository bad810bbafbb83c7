"""Calls with a derivative of the user's own, hidden from quax.

quax cannot interpret `custom_vjp`. Such calls are wrapped in a primitive of our own,
which quax runs as one operation on plain arrays.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax.extend.core import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Primitive,
    Var,
    jaxpr_as_fun,
)
from jax.extend.core.primitives import custom_jvp_call_p, custom_vjp_call_p
from jax.interpreters import ad, batching, mlir
from jaxtyping import ArrayLike

from jlora.lifting.lifted_weight import LiftedWeight, to_array

# Runs the hidden call. Outside of quax it differentiates, batches and lowers like it.
opaque_p = Primitive("custom_vjp_call")
opaque_p.multiple_results = True


def _evaluate_opaque(
    *args: ArrayLike, call: Callable[..., list], results: tuple
) -> list:
    del results
    return call(*args)


def _differentiate_opaque(
    primals: Sequence, tangents: Sequence, *, call: Callable[..., list], results: tuple
) -> tuple[list, list]:
    del results
    tangents = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
    return jax.jvp(call, tuple(primals), tangents)


def _batch_opaque(
    args: Sequence, axes: Sequence, *, call: Callable[..., list], results: tuple
) -> tuple[list, list[int]]:
    return jax.vmap(call, in_axes=tuple(axes))(*args), [0] * len(results)


opaque_p.def_impl(_evaluate_opaque)
opaque_p.def_abstract_eval(lambda *args, call, results: results)
ad.primitive_jvps[opaque_p] = _differentiate_opaque
batching.primitive_batchers[opaque_p] = _batch_opaque
mlir.register_lowering(
    opaque_p, mlir.lower_fun(_evaluate_opaque, multiple_results=True)
)


@quax.register(opaque_p)
def run_opaque(
    *args: LiftedWeight | ArrayLike, call: Callable[..., list], results: tuple
) -> list:
    del results
    return call(*(to_array(arg, "`custom_vjp`") for arg in args))


def hide_custom_derivatives(program: ClosedJaxpr) -> ClosedJaxpr:
    """Return a program whose `custom_vjp` calls, inner ones too, are opaque to quax.

    A program without such calls is returned itself, so that caches keep it.
    """
    jaxpr = _hide_in_jaxpr(program.jaxpr)
    return program if jaxpr is program.jaxpr else ClosedJaxpr(jaxpr, program.consts)


def _hide_in_jaxpr(jaxpr: Jaxpr) -> Jaxpr:
    equations = [_hide_in_equation(equation, jaxpr) for equation in jaxpr.eqns]
    is_same = all(new is old for new, old in zip(equations, jaxpr.eqns, strict=True))
    return jaxpr if is_same else jaxpr.replace(eqns=equations)


def _hide_in_equation(equation: JaxprEqn, jaxpr: Jaxpr) -> JaxprEqn:
    if equation.primitive is custom_vjp_call_p:
        return _make_opaque(equation, jaxpr)

    params = equation.params
    changed = {name: _hide_in_parameter(value) for name, value in params.items()}
    if all(changed[name] is value for name, value in params.items()):
        return equation

    # The rule of a custom_jvp is a Python function, and may call custom_vjp too.
    if equation.primitive is custom_jvp_call_p:
        return _make_opaque(equation, jaxpr)
    return equation.replace(params=changed)


def _hide_in_parameter(value: Any) -> Any:
    """Return a parameter of an equation, rewritten if it holds programs."""
    if isinstance(value, tuple) and value and all(map(_is_program, value)):
        programs = tuple(map(_hide_in_parameter, value))
        is_same = all(new is old for new, old in zip(programs, value, strict=True))
        return value if is_same else programs

    if isinstance(value, ClosedJaxpr):
        return hide_custom_derivatives(value)
    return _hide_in_jaxpr(value) if isinstance(value, Jaxpr) else value


def _is_program(value: Any) -> bool:
    return isinstance(value, (ClosedJaxpr, Jaxpr))


def _make_opaque(equation: JaxprEqn, jaxpr: Jaxpr) -> JaxprEqn:
    """Return the equation as one of `opaque_p` that runs it as a program of its own."""
    variables = (var for var in equation.invars if isinstance(var, Var))
    inputs: list[Any] = list(dict.fromkeys(variables))
    results: tuple[Any, ...] = tuple(var.aval for var in equation.outvars)

    # A result that nobody uses has no variable that the new program could return.
    is_used = [type(var).__name__ != "DropVar" for var in equation.outvars]
    outputs = [var for var, used in zip(equation.outvars, is_used, strict=True) if used]

    program = jaxpr.replace(
        constvars=[],
        invars=inputs,
        eqns=[equation],
        outvars=outputs,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    run = jaxpr_as_fun(ClosedJaxpr(program, []))

    def call(*args: ArrayLike) -> list:
        values = iter(run(*args))
        return [
            next(values) if used else jnp.zeros(aval.shape, aval.dtype)
            for used, aval in zip(is_used, results, strict=True)
        ]

    params = {"call": call, "results": results}
    return equation.replace(primitive=opaque_p, invars=inputs, params=params)
