"""Adapters from adapters and from checkpoints: resize, combine, extract."""

import jax
import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora import Factors
from jlora.checkpoints import (
    combine_adapters,
    extract_checkpoint,
    read_peft,
    resize_adapter,
)

KEY = jax.random.key(0)
Q, UP, EXPERTS = "layers.0.q_proj", "layers.0.up_proj", "layers.0.experts.down_proj"


def draw(*shape, seed=0):
    rng = np.random.default_rng((seed, *shape))
    return rng.standard_normal(shape).astype(np.float32)


def make_factors(seed=0):
    return {
        Q: Factors(draw(12, 4, seed=seed), draw(4, 10, seed=seed)),
        UP: Factors(draw(12, 6, seed=seed), draw(6, 20, seed=seed)),
        EXPERTS: Factors(draw(3, 8, 4, seed=seed), draw(3, 4, 9, seed=seed)),
    }


def multiply(factors):
    return np.asarray(factors.u, np.float64) @ np.asarray(factors.v, np.float64)


def cut(a, rank):
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def find_energy(a, rank):
    s = np.linalg.svd(a, compute_uv=False) ** 2
    return s[..., :rank].sum() / s.sum()


@pytest.fixture
def adapter(tmp_path):
    config = {"base_model_name_or_path": "org/model", "task_type": "CAUSAL_LM"}
    jlora.save_peft(tmp_path / "a", make_factors(), config=config, portable=False)
    return tmp_path / "a"


def test_resize_to_a_rank_is_the_best_approximation(adapter, tmp_path):
    report = resize_adapter(adapter, tmp_path / "b", rank=2)
    found, config = jlora.load_peft(tmp_path / "b")
    assert (config["base_model_name_or_path"], config["r"]) == ("org/model", 2)
    for row in report.modules:
        exact = multiply(make_factors()[row.module])
        # Thin float32 factors of products of size ten.
        np.testing.assert_allclose(
            multiply(found[row.module]), cut(exact, 2), atol=1e-5
        )
        assert row.rank == 2
        assert row.energy == pytest.approx(find_energy(exact, 2), abs=1e-6)
        assert row.error == pytest.approx(np.sqrt(1 - row.energy), abs=1e-6)
    assert "energy kept" in str(report)


def test_resize_by_energy_and_by_budget(adapter, tmp_path):
    report = resize_adapter(adapter, tmp_path / "b", energy=0.8, portable=False)
    found, _ = jlora.load_peft(tmp_path / "b")
    assert len({row.rank for row in report.modules}) > 1
    for row in report.modules:
        assert row.energy >= 0.8
        exact = multiply(make_factors()[row.module])
        assert row.rank == 1 or find_energy(exact, row.rank - 1) < 0.8
        assert found[row.module].u.shape[-1] == row.rank

    report = resize_adapter(adapter, tmp_path / "c", budget=150, portable=False)
    found, _ = jlora.load_peft(tmp_path / "c")
    costs = {Q: 22, UP: 32, EXPERTS: 17}
    spent = sum(costs[row.module] * row.rank for row in report.modules)
    assert 150 - min(costs.values()) < spent <= 150
    assert set(found) == {row.module for row in report.modules}


def test_combine_adds_the_deltas_without_cross_terms(adapter, tmp_path):
    jlora.save_peft(tmp_path / "b", {Q: make_factors(1)[Q]})
    combine_adapters({adapter: 0.5, tmp_path / "b": -2.0}, tmp_path / "sum")
    found, config = jlora.load_peft(tmp_path / "sum")
    expected = 0.5 * multiply(make_factors()[Q]) - 2 * multiply(make_factors(1)[Q])
    np.testing.assert_allclose(multiply(found[Q]), expected, atol=2e-5)
    np.testing.assert_allclose(
        multiply(found[UP]), 0.5 * multiply(make_factors()[UP]), atol=1e-5
    )
    assert config["task_type"] == "CAUSAL_LM"

    report = combine_adapters(
        {adapter: 0.5, tmp_path / "b": -2.0}, tmp_path / "thin", rank=3
    )
    found, _ = jlora.load_peft(tmp_path / "thin")
    np.testing.assert_allclose(multiply(found[Q]), cut(expected, 3), atol=2e-5)
    assert {row.rank for row in report.modules} == {3}


def make_pair(folder, *, dtype=np.float32, rank=3):
    """Write a checkpoint and the same after a change of rank `rank`."""
    old = {
        "layers.0.q_proj.weight": draw(20, 16),
        "layers.0.up_proj.weight": draw(30, 16),
        "layers.0.norm.weight": draw(16),
        "layers.0.k_proj.weight": draw(9, 16),
        "embed_tokens.weight": draw(25, 16),
        "gone.weight": draw(3, 3),
        "head.weight": draw(4, 16),
    }
    new = dict(old)
    del new["gone.weight"]
    for name in ("layers.0.q_proj", "layers.0.up_proj", "embed_tokens"):
        w = old[f"{name}.weight"]
        delta = draw(len(w), rank, seed=1) @ draw(rank, w.shape[1], seed=1)
        new[f"{name}.weight"] = w + delta
    new["layers.0.norm.weight"] = old["layers.0.norm.weight"] + 1
    new["head.weight"] = draw(5, 16)
    new["new.weight"] = draw(2, 2)
    paths = [folder / f"{name}.safetensors" for name in ("old", "new")]
    for path, arrays in zip(paths, (old, new), strict=True):
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
        jlora.save_arrays(path, arrays)
    return paths


def extract(*args, **settings):
    return extract_checkpoint(*args, key=KEY, progress=False, **settings)


def test_a_change_of_low_rank_is_extracted(tmp_path):
    old, new = make_pair(tmp_path)
    report = extract(old, new, tmp_path / "adapter", energy=0.999999)
    found, _ = jlora.load_peft(tmp_path / "adapter")
    before, after = jlora.load_arrays(old), jlora.load_arrays(new)
    assert set(found) == {"layers.0.q_proj", "layers.0.up_proj", "embed_tokens"}
    for module, factors in found.items():
        exact = after[f"{module}.weight"] - before[f"{module}.weight"]
        exact = exact if module == "embed_tokens" else exact.T
        np.testing.assert_allclose(multiply(factors), exact, atol=1e-4)
    for row in report.modules:
        assert (row.rank, row.old_rank) == (3, 16)
        assert row.error < 1e-5

    reasons = dict(report.skipped)
    assert reasons.keys() == {
        "gone.weight",
        "layers.0.norm.weight",
        "head.weight",
        "new.weight",
    }
    assert "base only" in reasons["gone.weight"]
    assert "no matrix" in reasons["layers.0.norm.weight"]
    assert "(4, 16) in the base and (5, 16)" in reasons["head.weight"]
    assert "tuned checkpoint only" in reasons["new.weight"]
    assert "gone.weight: left out, it is in the base only" in str(report)


def test_whole_modules_ranks_targets_and_the_way_back(tmp_path):
    old, new = make_pair(tmp_path, dtype=ml_dtypes.bfloat16)
    report = extract(
        old, new, tmp_path / "a", rank=16, targets="layers", modules_to_save="norm"
    )
    assert [row.module for row in report.modules] == [
        "layers.0.q_proj",
        "layers.0.up_proj",
    ]
    adapter = read_peft(tmp_path / "a")
    assert set(adapter.saved) == {"layers.0.norm.weight"}
    assert adapter.config["modules_to_save"] == ["layers.0.norm"]
    assert "is no target" in dict(report.skipped)["embed_tokens.weight"]

    # A full rank gives every bit back.
    merged = tmp_path / "merged"
    jlora.checkpoints.merge_checkpoint(old, tmp_path / "a", merged, progress=False)
    found = jlora.checkpoints.open_checkpoint(merged)
    after = jlora.load_arrays(new)
    for name in ("layers.0.q_proj.weight", "layers.0.norm.weight"):
        assert found[name].tobytes() == after[name].tobytes()


def test_refusals(adapter, tmp_path):
    old, new = make_pair(tmp_path)
    with pytest.raises(ValueError, match="exactly one of them, got 0"):
        resize_adapter(adapter, tmp_path / "b")
    with pytest.raises(ValueError, match="exactly one of them, got 2"):
        resize_adapter(adapter, tmp_path / "b", rank=1, energy=0.5)
    with pytest.raises(ValueError, match=r"`energy` must"):
        resize_adapter(adapter, tmp_path / "b", energy=1.5)
    with pytest.raises(ValueError, match="at least one, got none"):
        combine_adapters({}, tmp_path / "b")
    jlora.save_peft(tmp_path / "other", {Q: Factors(draw(5, 1), draw(1, 10))})
    with pytest.raises(ValueError, match=f"{Q}: `adapters` must be of one model"):
        combine_adapters({adapter: 1.0, tmp_path / "other": 1.0}, tmp_path / "b")
    with pytest.raises(ValueError, match="got no difference"):
        extract(old, old, tmp_path / "b", rank=1)
    with pytest.raises(ValueError, match="does not exist yet"):
        extract(old, new, adapter, rank=1)
    arrays = jlora.load_arrays(new)
    arrays["layers.0.q_proj.weight"][0, 0] = np.nan
    jlora.save_arrays(new, arrays)
    with pytest.raises(ValueError, match=r"NaN or Inf in the change of layers\.0\.q"):
        extract(old, new, tmp_path / "b", rank=1)
    assert not (tmp_path / "b").exists()
