"""Translation of messages of programs: from Django's catalogues to Sphinx's."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from benchmarks.models.translator import (
    END,
    PADDING,
    START,
    TranslatorSize,
    decode,
    encode,
    init_translator,
    translate,
)
from benchmarks.tasks.data.catalogues import LANGUAGES, read_messages, read_names
from benchmarks.tasks.data.splits import Split, sample_indices, split_examples
from benchmarks.tasks.task import NEW, OLD, Metric, Task

NUM_TOKENS = 1000
SOURCE_LENGTH, TARGET_LENGTH = 24, 26  # enough for 98 % of the texts
BATCH_SIZE = 32
NUM_TESTED = 192  # pairs of each domain
PRETRAIN_RATE = 3e-3
CHRF = Metric("chrF", NEW, True)
EXACT = Metric("exact", NEW, True)
OLD_CHRF = Metric("chrF, old domain", OLD, True)


class Examples(NamedTuple):
    """Pairs of texts as tokens."""

    source: np.ndarray  # int32 [pairs, SOURCE_LENGTH], the first token is the language
    target: np.ndarray  # int32 [pairs, TARGET_LENGTH + 1], from START to END
    translations: list[str]

    def take(self, indices: np.ndarray) -> "Examples":
        """Return some of the pairs."""
        texts = [self.translations[index] for index in indices]
        return Examples(self.source[indices], self.target[indices], texts)


def make_task(num_steps: int, num_pretrain_steps: int) -> Task:
    """Return the task, with a model that is pretrained here."""
    general, domain = (_list_pairs(package) for package in ("django", "sphinx"))
    names = [
        (language, *pair)
        for language in LANGUAGES
        for pair in read_names(language).items()
    ]
    tokenizer = _train_tokenizer([*general, *names])

    # Pretrain on most of the old domain.
    old = _encode(tokenizer, general)
    parts = split_examples(len(old.translations), fractions=(0.8, 0.0))
    known = np.concatenate([parts.train, len(old.translations) + np.arange(len(names))])
    everything = _encode(tokenizer, [*general, *names])
    size = TranslatorSize(tokenizer.get_vocab_size(), SOURCE_LENGTH, TARGET_LENGTH)
    params = _pretrain(size, everything, known, num_pretrain_steps)

    examples = _encode(tokenizer, domain)
    split = split_examples(len(examples.translations))
    return Task(
        name="translation",
        model=f"encoder and decoder, width {size.width}, {size.num_layers} layers each",
        shift="messages of Django and names of Babel → messages of Sphinx, fr and es",
        params=params,
        loss=_compute_loss,
        sample=functools.partial(_sample, examples, split.train, num_steps),
        num_steps=num_steps,
        validate=functools.partial(_validate, examples.take(split.validation)),
        measure=functools.partial(
            _measure, tokenizer, examples, split, old.take(parts.test[:NUM_TESTED])
        ),
        metrics=(CHRF, EXACT, OLD_CHRF),
        pattern="(encoder|decoder)/.*/(self|cross|mlp)/|head",
        rank=16,
        num_columns=32,
        full_rate=2e-3,
        scaled_rate=0.3,
    )


def _list_pairs(package: str) -> list[tuple[str, str, str]]:
    """Return (language, message, translation) of the catalogues of a package."""
    pairs = []
    for language in LANGUAGES:
        messages = read_messages(package, language)
        pairs += [(language, *pair) for pair in sorted(messages.items())]
    return pairs


def _train_tokenizer(pairs: list[tuple[str, str, str]]) -> Any:
    """Return a byte-level tokenizer of the old domain; it knows every text."""
    from tokenizers import ByteLevelBPETokenizer

    special = ["<padding>", "<start>", "<end>"] + [f"<{each}>" for each in LANGUAGES]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [text for _, *texts in pairs for text in texts],
        vocab_size=NUM_TOKENS,
        special_tokens=special,
        show_progress=False,
    )
    return tokenizer


def _encode(tokenizer: Any, pairs: list[tuple[str, str, str]]) -> Examples:
    """Return `Examples`; longer texts lose their ends."""
    source, target = [], []
    for language, text, translation in pairs:
        prefix = [tokenizer.token_to_id(f"<{language}>")]
        source.append(_pad(prefix + tokenizer.encode(text).ids, SOURCE_LENGTH))
        tokens = tokenizer.encode(translation).ids[: TARGET_LENGTH - 1]
        target.append(_pad([START, *tokens, END], TARGET_LENGTH + 1))
    translations = [translation for *_, translation in pairs]
    return Examples(np.stack(source), np.stack(target), translations)


def _pad(tokens: list[int], length: int) -> np.ndarray:
    padded = np.full(length, PADDING, np.int32)
    padded[: len(tokens)] = tokens[:length]
    return padded


def _pretrain(
    size: TranslatorSize, examples: Examples, known: np.ndarray, num_steps: int
) -> Any:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, PRETRAIN_RATE, min(100, num_steps // 2), num_steps
    )
    result = jlora.fit(
        _compute_loss,
        init_translator(size, jax.random.key(0)),
        optax.adamw(schedule, weight_decay=0.01),
        _sample(examples, known, num_steps, seed=0),
        also_train=".*",
        num_steps=num_steps,
        progress=False,
    )
    return result.adapted


def _compute_loss(params: Any, batch: Any) -> Any:
    """Return the mean cross-entropy of the target tokens of (source, target)."""
    source, target = batch
    num_heads = TranslatorSize._field_defaults["num_heads"]
    encoded = encode(params, source, num_heads)
    logits = decode(params, encoded, source, target[:, :-1], num_heads)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target[:, 1:])
    return jnp.mean(losses, where=target[:, 1:] != PADDING)


def _sample(examples: Examples, indices: np.ndarray, num_steps: int, seed: int):
    for batch in sample_indices(indices, BATCH_SIZE, num_steps, seed):
        yield examples.source[batch], examples.target[batch]


def _validate(examples: Examples, params: Any) -> float:
    return float(_compute_loss_once(params, (examples.source, examples.target)))


def _measure(
    tokenizer: Any, examples: Examples, split: Split, old: Examples, params: Any
) -> dict[str, float]:
    new = examples.take(split.test[:NUM_TESTED])
    found = _translate_texts(tokenizer, new, params)
    is_exact = [a == b for a, b in zip(found, new.translations, strict=True)]
    found_old = _translate_texts(tokenizer, old, params)
    return {
        CHRF.name: _compute_chrf(found, new.translations),
        EXACT.name: float(np.mean(is_exact)),
        OLD_CHRF.name: _compute_chrf(found_old, old.translations),
    }


def _translate_texts(tokenizer: Any, examples: Examples, params: Any) -> list[str]:
    tokens = np.asarray(_translate_once(params, examples.source))
    texts = []
    for row in tokens:
        ends = np.flatnonzero(row == END)
        texts.append(tokenizer.decode(row[: ends[0] if len(ends) else None].tolist()))
    return texts


def _compute_chrf(found: list[str], expected: list[str]) -> float:
    import sacrebleu

    return sacrebleu.corpus_chrf(found, [expected]).score


_compute_loss_once = jax.jit(_compute_loss)


@jax.jit
def _translate_once(params, source):
    num_heads = TranslatorSize._field_defaults["num_heads"]
    return translate(params, source, num_heads, TARGET_LENGTH)
