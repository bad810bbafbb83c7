"""Data loaders of other libraries as the batches of `fit`."""

import jax
import numpy as np
import optax
import pytest

import jlora
from tests.helpers.training import make_problem, mean_square

pytestmark = pytest.mark.usefixtures("standard_promotion")
NUM_EXAMPLES, BATCH_SIZE = 48, 4


def make_examples():
    """Return (adapted, x, y) with a number of examples."""
    adapted, (x, y) = make_problem(jlora.Rule("w", 4, trainable="uv"))
    rng = np.random.default_rng(0)
    order = rng.integers(0, len(x), NUM_EXAMPLES)
    return adapted, np.asarray(x)[order], np.asarray(y)[order]


def fit(adapted, batches, **settings):
    settings = {"progress": False, **settings}
    return jlora.fit(mean_square, adapted, optax.adam(0.01), batches, **settings)


def assert_same_bits(one, other):
    pairs = (jax.tree.leaves((each.adapted, each.losses)) for each in (one, other))
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_loader_of_torch_gives_the_bits_of_its_arrays():
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader, TensorDataset

    adapted, x, y = make_examples()
    tensors = torch.from_numpy(x.copy()), torch.from_numpy(y.copy())
    loader = DataLoader(TensorDataset(*tensors), batch_size=BATCH_SIZE)
    shape = NUM_EXAMPLES // BATCH_SIZE, BATCH_SIZE, -1
    arrays = list(zip(x.reshape(shape), y.reshape(shape), strict=True))
    assert_same_bits(fit(adapted, loader), fit(adapted, arrays))


def make_grain(x, y, kind):
    """Return batches of one of Grain's two interfaces, shuffled."""
    grain = pytest.importorskip("grain")
    examples = list(zip(x, y, strict=True))
    if kind == "dataset":
        dataset = grain.MapDataset.source(examples).shuffle(seed=3)
        return iter(dataset.batch(BATCH_SIZE).to_iter_dataset())

    sampler = grain.samplers.IndexSampler(
        len(examples), num_epochs=1, shuffle=True, seed=3
    )
    batch = grain.transforms.Batch(BATCH_SIZE)
    return iter(
        grain.DataLoader(data_source=examples, sampler=sampler, operations=[batch])
    )


@pytest.mark.parametrize("kind", ["dataset", "loader"])
def test_grain_goes_on_from_its_own_state(tmp_path, kind):
    pytest.importorskip("orbax.checkpoint")
    adapted, x, y = make_examples()
    expected = fit(adapted, make_grain(x, y, kind))
    assert len(expected.losses) == NUM_EXAMPLES // BATCH_SIZE

    # The second run asks a new iterator, whose state is set to the fifth batch.
    settings = {"checkpoint": tmp_path / "run", "checkpoint_every": 5}
    fit(adapted, make_grain(x, y, kind), num_steps=5, **settings)
    again = CountedIterator(make_grain(x, y, kind))
    found = fit(adapted, again, **settings)
    assert again.num_read < NUM_EXAMPLES // BATCH_SIZE
    assert_same_bits(found, expected)


class CountedIterator:
    """Grain's iterator, with the number of batches that were read."""

    def __init__(self, iterator):
        self.iterator, self.num_read = iterator, 0
        self.get_state, self.set_state = iterator.get_state, iterator.set_state

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self.iterator)
        self.num_read += 1
        return batch
