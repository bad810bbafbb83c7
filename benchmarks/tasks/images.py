"""Images: digits 0 to 4, then 5 to 9; classes and denoising by one transformer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from benchmarks.models.patch_encoder import init_patch_encoder, run_patch_encoder
from benchmarks.tasks.data.splits import Split, sample_indices, split_examples
from benchmarks.tasks.task import NEW, OLD, Metric, Task

NOISE = 0.3  # standard deviation, of pixels between 0 and 1
PIXEL_WEIGHT = 10.0  # of the squared error beside the cross-entropy
BATCH_SIZE = 32
PRETRAIN_RATE = 2e-3
_HEADS = "heads"
ACCURACY = Metric("accuracy", NEW, True)
PSNR = Metric("PSNR, dB", NEW, True)
OLD_ACCURACY = Metric("accuracy, digits 0 to 4", OLD, True)


def make_task(num_steps: int, num_pretrain_steps: int) -> Task:
    """Return the task, with a model that is pretrained here on the digits 0 to 4."""
    (old_images, old_labels), (images, labels) = _read_digits()
    old_split = split_examples(len(old_labels), fractions=(0.8, 0.0))
    split = split_examples(len(labels))

    batches = _sample(old_images, old_labels, old_split.train, num_pretrain_steps, 0)
    params = _pretrain(batches, num_pretrain_steps)
    old = _add_noise(old_images[old_split.test]), old_labels[old_split.test]
    return Task(
        name="images",
        model="vision transformer, width 64, 3 layers",
        shift="digits 0 to 4 → 5 to 9, with noise",
        params=params,
        loss=_compute_loss,
        sample=functools.partial(_sample, images, labels, split.train, num_steps),
        num_steps=num_steps,
        validate=functools.partial(_validate, images, labels, split.validation),
        measure=functools.partial(_measure, images, labels, split, old),
        metrics=(ACCURACY, PSNR, OLD_ACCURACY),
        pattern="layers/.*/(qkv|out|up|down)",
        rank=8,
        num_columns=16,
        full_rate=2e-3,
        scaled_rate=0.03,
        head=_HEADS,
        head_rate=1e-2,
    )


def _read_digits() -> list[tuple[np.ndarray, np.ndarray]]:
    """Return [(images, labels)] of the digits 0 to 4, and of 5 to 9."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = np.float32(digits.images / 16), np.int32(digits.target)
    return [(images[part], labels[part]) for part in (labels < 5, labels >= 5)]


def _add_noise(images: np.ndarray, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(images.shape, np.float32)
    return images + np.float32(NOISE) * noise


def _sample(images, labels, train, num_steps, seed):
    """Yield batches (noisy images, images, labels)."""
    batches = sample_indices(train, BATCH_SIZE, num_steps, seed)
    for number, indices in enumerate(batches):
        clean = images[indices]
        yield _add_noise(clean, seed * num_steps + number + 1), clean, labels[indices]


def _pretrain(batches: Any, num_steps: int) -> Any:
    schedule = optax.cosine_decay_schedule(PRETRAIN_RATE, num_steps)
    params = init_patch_encoder(jax.random.key(0))
    optimizer = optax.adam(schedule)
    return jlora.fit(
        _compute_loss, params, optimizer, batches, also_train=".*", progress=False
    ).adapted


def _compute_loss(params: Any, batch: Any) -> Any:
    """Return cross-entropy plus weighted squared error of the pixels."""
    noisy, clean, labels = batch
    logits, pixels = run_patch_encoder(params, noisy)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses) + PIXEL_WEIGHT * jnp.mean((pixels - clean) ** 2)


def _validate(images, labels, validation, params) -> float:
    clean = images[validation]
    batch = _add_noise(clean), clean, labels[validation]
    return float(_compute_loss_once(params, batch))


def _measure(
    images: np.ndarray,
    labels: np.ndarray,
    split: Split,
    old: tuple[np.ndarray, np.ndarray],
    params: Any,
) -> dict[str, float]:
    clean = images[split.test]
    logits, pixels = _run_once(params, _add_noise(clean))
    old_logits, _ = _run_once(params, old[0])
    squared_error = np.mean((np.asarray(pixels) - clean) ** 2)
    return {
        ACCURACY.name: _compute_accuracy(logits, labels[split.test]),
        PSNR.name: float(-10 * np.log10(squared_error)),
        OLD_ACCURACY.name: _compute_accuracy(old_logits, old[1]),
    }


def _compute_accuracy(logits: Any, labels: np.ndarray) -> float:
    return float(np.mean(np.argmax(logits, axis=-1) == labels))


_compute_loss_once = jax.jit(_compute_loss)
_run_once = jax.jit(run_patch_encoder)
