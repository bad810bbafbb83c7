"""Text classification: the topic of a sentence, with MiniLM and a linear head."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.tasks.data.conversations import read_conversations
from benchmarks.tasks.data.splits import Split, sample_indices, split_examples
from benchmarks.tasks.sentences import (
    PATTERN,
    Sentences,
    embed,
    embed_all,
    load_encoder,
    measure_moments,
    run_frozen,
)
from benchmarks.tasks.task import NEW, OLD, Metric, Task

LENGTH = 16  # tokens; 95 % of the sentences are shorter
LEAST, MOST = 15, 120  # sentences of a topic: smaller topics are left out
BATCH_SIZE = 32
NUM_GENERAL = 256
ACCURACY = Metric("accuracy", NEW, True)
SIMILARITY = Metric("kept similarity", OLD, True)


def make_task(num_steps: int) -> Task:
    """Return the task.

    The head of all methods begins as a logistic regression on the pretrained
    embeddings, and "no adaptation" is that regression. The kept similarity is the
    correlation of the cosines between general sentences before and after training.
    """
    texts, labels = _list_examples()
    split = split_examples(len(texts))
    encoder = load_encoder()
    sentences = run_frozen(encoder, texts, LENGTH)
    known = sentences.take(split.train)
    before = embed_all(encoder.layers, known)
    params = {
        "layers": encoder.layers,
        "head": _fit_head(before, labels[split.train]),
    }

    general = run_frozen(encoder, _list_general(), LENGTH)
    measure = functools.partial(
        _measure, sentences, labels, split, general, embed_all(encoder.layers, general)
    )
    return Task(
        name="text classification",
        model="MiniLM-L6, its last two layers",
        shift=f"general text → {labels.max() + 1} topics of chatterbot-corpus",
        params=params,
        loss=_compute_loss,
        sample=functools.partial(_sample, sentences, labels, split.train, num_steps),
        num_steps=num_steps,
        validate=functools.partial(_validate, sentences, labels, split.validation),
        measure=measure,
        metrics=(ACCURACY, SIMILARITY),
        pattern=PATTERN,
        rank=8,
        num_columns=96,
        full_rate=1e-4,
        scaled_rate=0.3,
        head="head",
        head_rate=1e-2,
        measure_moments=lambda: {"layers": measure_moments(encoder.layers, known)},
    )


def _list_examples() -> tuple[list[str], np.ndarray]:
    """Return questions, each once, and the number of the topic of each."""
    texts, labels, num_topics = [], [], 0
    for pairs in read_conversations().values():
        questions = list(dict.fromkeys(question for question, _ in pairs))[:MOST]
        questions = [each for each in questions if each not in texts]
        if len(questions) >= LEAST:
            texts += questions
            labels += [num_topics] * len(questions)
            num_topics += 1
    return texts, np.array(labels)


def _list_general() -> list[str]:
    """Return answers from all topics: sentences that no method trains on."""
    conversations = read_conversations()
    answers = [answer for pairs in conversations.values() for _, answer in pairs]
    answers = list(dict.fromkeys(answers))
    return answers[:: len(answers) // NUM_GENERAL][:NUM_GENERAL]


def _fit_head(embeddings: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=30.0, max_iter=1000).fit(embeddings, labels)
    weights = {"w": model.coef_.T, "b": model.intercept_}
    return {name: np.float32(each) for name, each in weights.items()}


def _compute_logits(head: Any, embeddings: Any) -> Any:
    return embeddings @ head["w"] + head["b"][None]


def _compute_loss(params: Any, batch: Any) -> Any:
    """Return the mean cross-entropy of a batch (x, mask, labels)."""
    x, mask, labels = batch
    logits = _compute_logits(
        params["head"], embed(params["layers"], Sentences(x, mask))
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


def _sample(sentences, labels, train, num_steps, seed):
    for indices in sample_indices(train, BATCH_SIZE, num_steps, seed):
        yield (*sentences.take(indices), np.int32(labels[indices]))


def _validate(sentences, labels, validation, params) -> float:
    """Return the mean cross-entropy of the validation sentences."""
    logits = _predict(params, sentences.take(validation))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[validation])
    return float(jnp.mean(losses))


def _measure(
    sentences: Sentences,
    labels: np.ndarray,
    split: Split,
    general: Sentences,
    general_before: np.ndarray,
    params: Any,
) -> dict[str, float]:
    found = np.argmax(_predict(params, sentences.take(split.test)), axis=-1)
    after = embed_all(params["layers"], general)
    return {
        ACCURACY.name: float(np.mean(found == labels[split.test])),
        SIMILARITY.name: correlate_cosines(general_before, after),
    }


def _predict(params: Any, sentences: Sentences) -> np.ndarray:
    return _compute_logits(params["head"], embed_all(params["layers"], sentences))


def correlate_cosines(before: np.ndarray, after: np.ndarray) -> float:
    """Return the correlation of all pairwise cosines of two sets of unit vectors."""
    rows, columns = np.triu_indices(len(before), 1)
    cosines = [(each @ each.T)[rows, columns] for each in (before, after)]
    return float(np.corrcoef(*cosines)[0, 1])
