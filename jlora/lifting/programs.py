"""Programs run with lifted weights among their arguments."""

from collections.abc import Sequence

import quax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import ArrayLike

# These imports register the rules with quax.
from jlora.lifting import (  # noqa: F401
    rules_algebra,
    rules_calls,
    rules_convolve,
    rules_groups,
    rules_layout,
    rules_lookups,
    rules_products,
)
from jlora.lifting.lifted_weight import LiftedWeight, to_array
from jlora.lifting.rules_opaque import hide_custom_derivatives


def run_program(
    program: ClosedJaxpr, values: Sequence[LiftedWeight | ArrayLike]
) -> list[ArrayLike]:
    """Return the results of a program as plain arrays.

    Args:
        program: one traced with plain arrays of the shapes and dtypes of `values`.
        values: its arguments, some of them weights.
    """
    run = quax.quaxify(jaxpr_as_fun(hide_custom_derivatives(program)))
    operation = "a result that is the weight itself"
    return [to_array(value, operation) for value in run(*values)]
