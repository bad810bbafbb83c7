import os

# LAPACK's threads fight those of XLA: small decompositions get 10 to 100 times slower.
# Read when LAPACK is loaded, so it has to be set before JAX is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

# optax itself promotes int32 counters to float, so the modules that train say "standard".
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield
