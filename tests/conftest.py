import os

# The threads of LAPACK and of XLA compete, which makes small decompositions 10 to 100
# times slower. LAPACK reads the variable when it is loaded, so it must be set before
# JAX is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Most of a test is compiling. Without the optimisations of LLVM, with the older code
# generator for fusions and in one thread it takes less than half of the time. XLA's own
# passes run. XLA_FLAGS="" pytest tests the programs that users get; .ci/run does so in
# its last run.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
)
# Eight devices for the tests of sharding; all others run on the first of them.
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import jax
import pytest

# optax itself promotes int32 counters to float, so the modules that train say
# "standard".
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Programs with collectives that are in flight together may block each other on a CPU.
jax.config.update("jax_cpu_enable_async_dispatch", False)


# Tests in these places do the same in both precisions, and run in single precision.
ANY_PRECISION = (
    "tests/adaptation/test_processes.py",
    "tests/adaptation/test_sharding.py",
    "tests/benchmarks/",
    "tests/checkpoints/",
    "tests/cli/test_streams.py",
    "tests/demo/",
    "tests/lifting/test_frameworks.py",
    "tests/lifting/test_minilm.py",
    "tests/lifting/test_table.py",
    "tests/package/test_documents.py",
    "tests/package/test_editors.py",
    "tests/package/test_import.py",
    "tests/package/test_layers.py",
    "tests/package/test_neighbours.py",
    "tests/package/test_prose.py",
    "tests/package/test_public_api.py",
    "tests/training/test_resume.py",
    "tests/training/test_sharded_resume.py",
    "tests/package/test_scalars.py",
    "tests/package/test_sharding.py",
    "tests/package/test_source.py",
    "tests/training/test_faults.py",
    "tests/training/test_optax_contract.py",
    "tests/training/test_sharding.py",
)


def pytest_collection_modifyitems(config, items):
    if not jax.config.jax_enable_x64:
        return
    left_out = [item for item in items if item.nodeid.startswith(ANY_PRECISION)]
    items[:] = [item for item in items if not item.nodeid.startswith(ANY_PRECISION)]
    config.hook.pytest_deselected(items=left_out)


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
