"""Question answering: find the answer to a question among all answers, by MiniLM."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.tasks.data.conversations import TECHNICAL, read_conversations
from benchmarks.tasks.data.splits import Split, sample_indices, split_examples
from benchmarks.tasks.sentences import (
    PATTERN,
    Encoder,
    Sentences,
    embed,
    embed_all,
    load_encoder,
    measure_moments,
    run_frozen,
)
from benchmarks.tasks.task import NEW, OLD, Metric, Task

LENGTH = 20  # tokens
BATCH_SIZE = 24
TEMPERATURE = 0.05  # of the cosines, as sentence encoders are trained
MRR = Metric("MRR", NEW, True)
RECALL = Metric("recall@1", NEW, True)
OLD_MRR = Metric("MRR, other topics", OLD, True)


class Pairs(NamedTuple):
    """Questions, the distinct answers, and the number of each question's answer."""

    questions: Sentences
    answers: Sentences
    numbers: np.ndarray


def make_task(num_steps: int) -> Task:
    """Return the task of the technical topics."""
    conversations = read_conversations()
    technical = [pair for topic in TECHNICAL for pair in conversations[topic]]
    general = [
        pair
        for topic, pairs in conversations.items()
        if topic not in TECHNICAL
        for pair in pairs
    ]

    encoder = load_encoder()
    pairs, other = (_encode(encoder, each) for each in (technical, general))
    split = split_examples(len(pairs.numbers))
    return Task(
        name="question answering",
        model="MiniLM-L6, its last two layers",
        shift="general text → technical questions of chatterbot-corpus",
        params={"layers": encoder.layers},
        loss=_compute_loss,
        sample=functools.partial(_sample, pairs, split.train, num_steps),
        num_steps=num_steps,
        validate=functools.partial(_validate, pairs, split.validation),
        measure=functools.partial(_measure, pairs, split, other),
        metrics=(MRR, RECALL, OLD_MRR),
        pattern=PATTERN,
        rank=8,
        num_columns=96,
        full_rate=1e-4,
        scaled_rate=0.1,
        measure_moments=functools.partial(
            _measure_moments, encoder, _take_pairs(pairs, split.train)
        ),
    )


def _encode(encoder: Encoder, pairs: list[tuple[str, str]]) -> Pairs:
    answers = list(dict.fromkeys(answer for _, answer in pairs))
    numbers = np.array([answers.index(answer) for _, answer in pairs])
    questions = run_frozen(encoder, [question for question, _ in pairs], LENGTH)
    return Pairs(questions, run_frozen(encoder, answers, LENGTH), numbers)


def _compute_loss(params: Any, batch: Any) -> Any:
    """Return the cross-entropy of the right pairs among all pairs of the batch."""
    x, mask, numbers = batch
    questions, answers = jnp.split(embed(params["layers"], Sentences(x, mask)), 2)
    scores = questions @ answers.T / TEMPERATURE

    # Two questions of a batch may share their answer.
    is_same = numbers[:, None] == numbers[None, :]
    is_other = is_same & ~jnp.eye(len(numbers), dtype=bool)
    scores = jnp.where(is_other, -jnp.inf, scores)

    right = jnp.arange(len(numbers))
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    both = cross_entropy(scores, right) + cross_entropy(scores.T, right)
    return jnp.mean(both) / 2


def _sample(pairs: Pairs, train: np.ndarray, num_steps: int, seed: int):
    for indices in sample_indices(train, BATCH_SIZE, num_steps, seed):
        x, mask = _take_pairs(pairs, indices)
        yield x, mask, np.int32(pairs.numbers[indices])


def _take_pairs(pairs: Pairs, indices: np.ndarray) -> Sentences:
    """Return the questions of some pairs, followed by their answers."""
    sides = pairs.questions.take(indices), pairs.answers.take(pairs.numbers[indices])
    return Sentences(*(np.concatenate(each) for each in zip(*sides, strict=True)))


def _measure_moments(encoder: Encoder, train: Sentences) -> Any:
    return {"layers": measure_moments(encoder.layers, train)}


def _validate(pairs: Pairs, validation: np.ndarray, params: Any) -> float:
    """Return 1 - MRR, with the answers of the validation questions as candidates."""
    numbers, positions = np.unique(pairs.numbers[validation], return_inverse=True)
    part = Pairs(
        pairs.questions.take(validation), pairs.answers.take(numbers), positions
    )
    return 1 - float(np.mean(1 / _rank_answers(part, params)))


def _measure(pairs: Pairs, split: Split, other: Pairs, params: Any) -> dict[str, float]:
    """Return the metrics of the test questions, with all answers as candidates."""
    part = Pairs(
        pairs.questions.take(split.test), pairs.answers, pairs.numbers[split.test]
    )
    ranks = _rank_answers(part, params)
    return {
        MRR.name: float(np.mean(1 / ranks)),
        RECALL.name: float(np.mean(ranks == 1)),
        OLD_MRR.name: float(np.mean(1 / _rank_answers(other, params))),
    }


def _rank_answers(pairs: Pairs, params: Any) -> np.ndarray:
    """Return the rank of each right answer among all answers, from 1."""
    questions, answers = (
        embed_all(params["layers"], each) for each in (pairs.questions, pairs.answers)
    )
    scores = questions @ answers.T
    right = np.take_along_axis(scores, pairs.numbers[:, None], axis=1)
    return 1 + np.sum(scores > right, axis=1)
