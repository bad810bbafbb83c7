import os

# The threads of LAPACK and of XLA compete, which makes small decompositions 10 to 100
# times slower. LAPACK reads the variable when it is loaded, so it must be set before
# JAX is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Most of a test is compiling: without the optimisations of LLVM it takes two thirds of
# the time. XLA's own passes run. XLA_FLAGS="" pytest tests the programs that users get;
# .ci/run does so in its last run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

# optax itself promotes int32 counters to float, so the modules that train say
# "standard".
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Free the compiled programs of a file.

    Each holds memory maps, of which Linux gives a process 65,530: some thousands of
    programs use them up, and the compiler crashes.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def minilm_params():
    """The pretrained weights of MiniLM, where their package is installed."""
    from benchmarks.models import minilm

    try:
        return jax.tree.map(jax.numpy.asarray, minilm.load_minilm())
    except FileNotFoundError as error:
        pytest.skip(str(error))
