"""The demo: its story, its small language model, and its corpora."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.demo.corpus import DOMAIN, GENERAL, read_corpus, sample_batches
from jlora.demo.model import ModelSize, bits_per_byte, compute_logits, init_model
from jlora.demo.story import DemoSettings, run_demo

SIZE = ModelSize(width=48, num_layers=1, num_heads=2, context=32)


def test_the_demo_tells_its_story(capsys, standard_promotion):
    settings = DemoSettings(
        SIZE, pretrain_steps=200, adapt_steps=80, rank=16, num_eval_batches=4
    )
    rows, reloaded = run_demo(settings, progress=False)
    none, v_only, lora, full = rows

    # A tenth of a bit: far above the noise of 4 batches of held-out text.
    assert v_only.new_domain < none.new_domain - 0.1
    assert abs(reloaded - v_only.new_domain) <= 1e-5
    assert (
        none.num_trained == 0 < v_only.num_trained < lora.num_trained < full.num_trained
    )
    assert v_only.optimizer_bytes < lora.optimizer_bytes < full.optimizer_bytes

    printed = capsys.readouterr().out
    assert all(row.name in printed for row in rows)


def test_the_model_is_causal():
    params = init_model(SIZE, key=jax.random.key(0))
    tokens = jnp.arange(32)[None]
    changed = tokens.at[0, 20].set(99)
    one, other = (compute_logits(params, t, SIZE.num_heads) for t in (tokens, changed))
    np.testing.assert_allclose(one[:, :20], other[:, :20], atol=1e-5)
    assert not np.allclose(one[:, 20], other[:, 20], atol=1e-3)


def test_an_untrained_model_knows_about_eight_bits():
    params = init_model(SIZE, key=jax.random.key(0))
    text = next(sample_batches(read_corpus((DOMAIN,)).train, 1, 8, 32, 0))
    assert float(bits_per_byte(params, text, SIZE.num_heads)) == pytest.approx(
        8, abs=0.6
    )


def test_corpora_are_disjoint():
    assert DOMAIN not in GENERAL
    corpus = read_corpus((DOMAIN,))
    assert len(corpus.train) > len(corpus.held_out) > 10_000
    with pytest.raises(ValueError, match="must hold the sources of nothing"):
        read_corpus(("nothing",))
