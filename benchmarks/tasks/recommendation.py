"""Recommendation: ratings by old users, then by new users with other tastes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from benchmarks.models.towers import init_towers, predict_ratings
from benchmarks.tasks.data.ratings import Ratings, generate_world
from benchmarks.tasks.data.splits import sample_indices, split_examples
from benchmarks.tasks.task import NEW, OLD, Metric, Task

BATCH_SIZE = 256  # ratings
PRETRAIN_RATE = 1e-2
NUM_BEST = 10  # of NDCG
RMSE = Metric("RMSE", NEW, False)
NDCG = Metric("NDCG@10", NEW, True)
OLD_RMSE = Metric("RMSE, old users", OLD, False)


def make_task(num_steps: int, num_pretrain_steps: int) -> Task:
    """Return the task, with a model that is pretrained here on the old users.

    Validation and test users rate nothing in training: only their features are known.
    """
    world = generate_world()
    old_split = split_examples(len(world.old.features), fractions=(0.8, 0.0))
    split = split_examples(len(world.new.features))

    sample = functools.partial(_sample, world.item_features)
    known = world.old.take(old_split.train)
    params = _pretrain(world, sample(known, num_pretrain_steps, 0), num_pretrain_steps)

    train, validation, test = (world.new.take(part) for part in split)
    old = world.old.take(old_split.test)
    return Task(
        name="recommendation",
        model="matrix factorisation with a tower for users and for items",
        shift="old users → new users with other tastes, generated",
        params=params,
        loss=_compute_loss,
        sample=functools.partial(sample, train, num_steps),
        num_steps=num_steps,
        validate=functools.partial(_compute_rmse, world.item_features, validation),
        measure=functools.partial(_measure, world.item_features, test, old),
        metrics=(RMSE, NDCG, OLD_RMSE),
        pattern="users/|items/features",
        rank=8,
        num_columns=8,
        full_rate=6e-3,
        scaled_rate=1.0,
    )


def _pretrain(world: Any, batches: Any, num_steps: int) -> Any:
    shapes = len(world.item_features), world.old.features.shape[1]
    params = init_towers(*shapes, world.item_features.shape[1], jax.random.key(0))
    schedule = optax.cosine_decay_schedule(PRETRAIN_RATE, num_steps)
    return jlora.fit(
        _compute_loss,
        params,
        optax.adamw(schedule, weight_decay=0.01),
        batches,
        also_train=".*",
        progress=False,
    ).adapted


def _compute_loss(params: Any, batch: Any) -> Any:
    """Return the mean squared error of a batch from `_make_batch`."""
    *inputs, ratings = batch
    return jnp.mean((predict_ratings(params, *inputs) - ratings) ** 2)


def _sample(item_features, ratings: Ratings, num_steps: int, seed: int):
    indices = np.arange(ratings.values.size)
    for batch in sample_indices(indices, BATCH_SIZE, num_steps, seed):
        yield _make_batch(item_features, ratings, batch)


def _make_batch(item_features, ratings: Ratings, indices: np.ndarray):
    """Return (user features, item features, items, ratings) of some ratings."""
    users, columns = np.unravel_index(indices, ratings.values.shape)
    items = ratings.items[users, columns]
    values = ratings.values[users, columns]
    return ratings.features[users], item_features[items], items, values


def _compute_rmse(item_features, ratings: Ratings, params: Any) -> float:
    predicted = _predict(item_features, ratings, params)
    return float(np.sqrt(np.mean((predicted - ratings.values) ** 2)))


def _measure(item_features, test: Ratings, old: Ratings, params) -> dict[str, float]:
    from sklearn.metrics import ndcg_score

    # Gains must not be negative; ratings reach below zero at times.
    gains = np.maximum(test.values, 0)
    predicted = _predict(item_features, test, params)
    return {
        RMSE.name: _compute_rmse(item_features, test, params),
        NDCG.name: float(ndcg_score(gains, predicted, k=NUM_BEST)),
        OLD_RMSE.name: _compute_rmse(item_features, old, params),
    }


def _predict(item_features, ratings: Ratings, params: Any) -> np.ndarray:
    """Return the predicted ratings, in the shape of the given ones."""
    batch = _make_batch(item_features, ratings, np.arange(ratings.values.size))
    return np.asarray(_predict_once(params, *batch[:-1])).reshape(ratings.values.shape)


_predict_once = jax.jit(predict_ratings)
