"""Rules for programs inside a program: scans, rematerialisation, derivatives of the user's own."""

import functools

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive, Var, jaxpr_as_fun
from jax.extend.core.primitives import custom_jvp_call_p, custom_vjp_call_p, remat_p
from jax.interpreters import ad, batching, mlir
from jaxtyping import ArrayLike

from jlora.lifting.lifted_weight import LiftedWeight, form, replace

# Stands for a call with a derivative of the user's own that quax does not know. Under quax it runs
# as it is on plain arrays; elsewhere it is that call in every respect.
opaque_p = Primitive("custom_vjp_call")
opaque_p.multiple_results = True


def _run(*args, call, results):
    del results
    return call(*args)


def _differentiate(primals, tangents, *, call, results):
    del results
    tangents = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
    return jax.jvp(call, tuple(primals), tangents)


def _batch(args, axes, *, call, results):
    return jax.vmap(call, in_axes=tuple(axes))(*args), [0] * len(results)


opaque_p.def_impl(_run)
opaque_p.def_abstract_eval(lambda *args, call, results: results)
ad.primitive_jvps[opaque_p] = _differentiate
batching.primitive_batchers[opaque_p] = _batch
mlir.register_lowering(opaque_p, mlir.lower_fun(_run, multiple_results=True))


@quax.register(opaque_p)
def run_opaque(*args: LiftedWeight | ArrayLike, call, results):
    args = [
        form(arg, "`custom_vjp`") if isinstance(arg, LiftedWeight) else arg
        for arg in args
    ]
    return call(*args)


def run_program(program, values):
    """Return the results, plain arrays all, of a closed jaxpr for values, some of them weights."""
    run = quax.quaxify(jaxpr_as_fun(shield_custom_derivatives(program)))
    return [
        _form_if_lifted(value, "a result that is the weight itself")
        for value in run(*values)
    ]


def shield_custom_derivatives(program):
    """Return a closed jaxpr with its custom_vjp calls, inner ones too, made opaque to quax."""
    jaxpr = _shield(program.jaxpr)
    return program if jaxpr is program.jaxpr else ClosedJaxpr(jaxpr, program.consts)


def _shield(jaxpr):
    equations = [_shield_equation(equation, jaxpr) for equation in jaxpr.eqns]
    is_same = all(new is old for new, old in zip(equations, jaxpr.eqns, strict=True))
    return jaxpr if is_same else jaxpr.replace(eqns=equations)


def _shield_equation(equation, jaxpr):
    if equation.primitive is custom_vjp_call_p:
        return _hide_equation(equation, jaxpr)
    changed = {name: _shield_value(value) for name, value in equation.params.items()}
    if all(changed[name] is value for name, value in equation.params.items()):
        return equation
    if (
        equation.primitive is custom_jvp_call_p
    ):  # its rule, which is no program yet, calls it too
        return _hide_equation(equation, jaxpr)
    return equation.replace(params=changed)


def _shield_value(value):
    """Return a parameter of an equation, shielded if it is a program or a tuple of programs."""
    if isinstance(value, tuple) and value and all(map(_is_program, value)):
        shielded = tuple(map(_shield_value, value))
        is_same = all(new is old for new, old in zip(shielded, value, strict=True))
        return value if is_same else shielded
    if not _is_program(value):
        return value
    return (
        shield_custom_derivatives(value)
        if isinstance(value, ClosedJaxpr)
        else _shield(value)
    )


def _is_program(value):
    return isinstance(value, (ClosedJaxpr, Jaxpr))


def _hide_equation(equation, jaxpr):
    """Return the equation as one of `opaque_p`, which runs it as a program of its own."""
    inputs = list(dict.fromkeys(var for var in equation.invars if isinstance(var, Var)))
    # Results that nobody uses have no variable to be read from.
    used = [_is_used(var) for var in equation.outvars]
    alone = jaxpr.replace(
        constvars=[],
        invars=inputs,
        eqns=[equation],
        outvars=[
            var for var, is_used in zip(equation.outvars, used, strict=True) if is_used
        ],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    run = jaxpr_as_fun(ClosedJaxpr(alone, []))
    results = tuple(var.aval for var in equation.outvars)

    def call(*args):
        found = iter(run(*args))
        return [
            next(found) if is_used else jnp.zeros(aval.shape, aval.dtype)
            for is_used, aval in zip(used, results, strict=True)
        ]

    params = {"call": call, "results": results}
    return equation.replace(primitive=opaque_p, invars=inputs, params=params)


def _is_used(var):
    return type(var).__name__ != "DropVar"


@quax.register(remat_p)
def rematerialize(
    *args: LiftedWeight | ArrayLike, jaxpr, policy, prevent_cse, **params
):
    del params
    run = quax.quaxify(jaxpr_as_fun(ClosedJaxpr(jaxpr, ())))
    return jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse)(*args)


@quax.register(lax.cond_p)
def choose(index: ArrayLike, *args: LiftedWeight | ArrayLike, branches, **params):
    del params

    def run(branch, *args):
        return [
            _form_if_lifted(value, "`cond`")
            for value in quax.quaxify(jaxpr_as_fun(branch))(*args)
        ]

    return lax.switch(
        index, [functools.partial(run, branch) for branch in branches], *args
    )


@quax.register(lax.while_p)
def loop(
    *args: LiftedWeight | ArrayLike, cond_nconsts, cond_jaxpr, body_nconsts, body_jaxpr
):
    num_consts = cond_nconsts + body_nconsts
    cond_consts, body_consts = args[:cond_nconsts], args[cond_nconsts:num_consts]
    go_on, run = (quax.quaxify(jaxpr_as_fun(part)) for part in (cond_jaxpr, body_jaxpr))

    def step(carry):
        out = run(*body_consts, *carry)
        # A place that began as an array stays one.
        return [
            new if isinstance(old, LiftedWeight) else _form_if_lifted(new, "`while`")
            for old, new in zip(carry, out, strict=True)
        ]

    carry = list(args[num_consts:])
    while changed := _find_changed(carry, jax.eval_shape(step, carry)):
        for place in changed:
            carry[place] = form(carry[place], "`while`")
    return lax.while_loop(lambda carry: go_on(*cond_consts, *carry)[0], step, carry)


def _find_changed(carry, out):
    """Return the places of weights that come back as something else than they were."""
    return [
        place
        for place, (old, new) in enumerate(zip(carry, out, strict=True))
        if isinstance(old, LiftedWeight) and _describe(old) != _describe(new)
    ]


def _describe(value):
    leaves, structure = jax.tree.flatten(value)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _form_if_lifted(value, operation):
    return form(value, operation) if isinstance(value, LiftedWeight) else value


@quax.register(lax.scan_p)
def scan(*args: LiftedWeight | ArrayLike, jaxpr, length, reverse, unroll, **params):
    consts, carry, xs = _group_arguments(args, params)
    run = quax.quaxify(jaxpr_as_fun(jaxpr))
    carry = [_form_if_lifted(value, "the carry of `scan`") for value in carry]
    sliced = [_slice_stack(x) if isinstance(x, LiftedWeight) else (x, None) for x in xs]
    results = []

    def step(carry, rows):
        rows = [
            row if model is None else _rebuild(model, row, model.letters[1:])
            for (_, model), row in zip(sliced, rows, strict=True)
        ]
        out = run(*consts, *carry, *rows)
        results[:] = out[len(carry) :]
        carry = [
            _form_if_lifted(value, "the carry of `scan`") for value in out[: len(carry)]
        ]
        return carry, [_take_arrays(y) for y in results]

    carry, ys = lax.scan(
        step,
        carry,
        [arrays for arrays, _ in sliced],
        length=length,
        reverse=reverse,
        unroll=unroll,
    )
    ys = [
        _rebuild(model, y, "b" + model.letters)
        if isinstance(model, LiftedWeight)
        else y
        for model, y in zip(results, ys, strict=True)
    ]
    return [*carry, *ys]


def _group_arguments(args, params):
    """Return (constants, carry, xs): JAX names their numbers in two ways, by version."""
    if "num_consts" in params:
        first, second = params["num_consts"], params["num_consts"] + params["num_carry"]
        return list(args[:first]), list(args[first:second]), list(args[second:])
    groups = params["ft_in"].update(args).unpack()
    return tuple(list(group.vals) for group in groups)


def _slice_stack(w):
    """Return the arrays of a stack and the weight that tells what a row of them is."""
    if w.letters[0] != "b":
        return form(w, "`scan` over its inputs or outputs"), None
    return _take_arrays(w), w


def _take_arrays(value):
    return (value.base, value.u, value.v) if isinstance(value, LiftedWeight) else value


def _rebuild(model, arrays, letters):
    base, u, v = arrays
    return replace(model, base=base, u=u, v=v, letters=letters)
