"""No update makes the whole matrix."""

import jax
import jax.numpy as jnp
import pytest

import jlora

SHAPES = {
    "u": (1024, 16),
    "s": (16,),
    "vt": (16, 1024),
    "x": (1024, 4),
    "y": (4, 1024),
    "wide": (1024, 200),
    "high": (200, 1024),
}

# Name → (function, the inputs that it takes).
FUNCTIONS = {
    "add_low_rank": (jlora.updates.add_low_rank, ("svd", "x", "y")),
    "append_columns": (jlora.updates.append_columns, ("svd", "x")),
    "append_rows": (jlora.updates.append_rows, ("svd", "y")),
    "replace_columns": (
        lambda svd, c: jlora.updates.replace_columns(svd, 4, c),
        ("svd", "x"),
    ),
    "remove_columns": (lambda svd: jlora.updates.remove_columns(svd, 4), ("svd",)),
    "recompress": (lambda factors: jlora.recompress(factors, 8), ("factors",)),
    "recompress with a key": (
        lambda factors: jlora.recompress(factors, 8, key=jax.random.key(0)),
        ("factors",),
    ),
    "balance": (jlora.updates.balance, ("factors",)),
    "orthogonalize_product": (jlora.updates.orthogonalize_product, ("factors",)),
    "integrate_low_rank": (
        lambda svd, x, y: jlora.training.integrate_low_rank(svd, jlora.Factors(x, y)),
        ("svd", "x", "y"),
    ),
}


def make_compiled(name):
    """Return the compiled program of one function of matrices of 1024×1024."""
    arrays = {
        key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in SHAPES.items()
    }
    svd = jlora.SVD(arrays["u"], arrays["s"], arrays["vt"])
    factors = jlora.Factors(arrays["wide"], arrays["high"])
    inputs = {
        "svd": svd,
        "x": arrays["x"],
        "y": arrays["y"],
        "factors": factors,
    }

    function, names = FUNCTIONS[name]
    return jax.jit(function).lower(*(inputs[key] for key in names)).compile()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_update_forms_the_matrix(name):
    compiled = make_compiled(name)
    assert "f32[1024,1024]" not in compiled.as_text()
    # A few copies of factors of rank 200 are as large as the matrix; all other arrays
    # are far smaller.
    most = 6 if name.startswith(("recompress", "balance", "orthogonalize")) else 1
    assert compiled.memory_analysis().temp_size_in_bytes < most * 4 * 1024 * 1024
