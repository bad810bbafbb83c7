"""Weights in fp8: multiplied by their scales, or refused; never cast without one."""

import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora.checkpoints import (
    extract_checkpoint,
    initialize_checkpoint,
    merge_checkpoint,
    open_checkpoint,
    read_peft,
)

RNG = np.random.default_rng(0)
FP8 = ml_dtypes.float8_e4m3fn
Q = "layers.0.q.weight"


def quantize(w, grid, block):
    """Return fp8 values and the float32 scales of blocks, and their product."""
    scales = RNG.uniform(0.5, 2, grid).astype(np.float32)
    full = scales
    for axis, size in enumerate(block):
        full = full.repeat(size, axis)
    full = full[tuple(slice(n) for n in w.shape)]
    values = (w / full).astype(FP8)
    return values, scales, values.astype(np.float32) * full


def draw(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def write(folder, arrays, block=None):
    folder.mkdir(exist_ok=True)
    jlora.save_arrays(folder / "model.safetensors", arrays)
    settings = {"quant_method": "fp8", "weight_block_size": block}
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return open_checkpoint(folder)


def assert_dequantizes(checkpoint, name, expected):
    found = checkpoint.read_dequantized(name)
    assert found.dtype == np.float32
    assert found.flags.writeable
    np.testing.assert_array_equal(found, expected)
    for rows in (slice(0, 3), slice(5, 9), slice(7, None), slice(4, 2)):
        part = checkpoint.read_dequantized(name, rows.start, rows.stop)
        np.testing.assert_array_equal(part, expected[rows])
    wide = checkpoint.read_dequantized(name, dtype=np.float64)
    assert wide.dtype == np.float64
    np.testing.assert_allclose(wide, expected, rtol=1e-7)  # one rounding of the product


# {case: (shape, grid, block, size in config.json)}
BLOCKS = {
    "even, in config.json": ((16, 12), (4, 3), (4, 4), [4, 4]),
    "ragged, in config.json": ((10, 13), (3, 2), (4, 8), [4, 8]),
    "smaller than a block": ((10, 13), (1, 1), (128, 128), [128, 128]),
    "even, by the shapes": ((16, 24), (4, 3), (4, 8), None),
    "one row of blocks, by the shapes": ((10, 16), (1, 2), (10, 8), None),
    "a stack of experts": ((9, 8, 6), (9, 2, 2), (1, 4, 4), [4, 4]),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks(tmp_path, case):
    shape, grid, block, size = BLOCKS[case]
    values, scales, expected = quantize(draw(*shape), grid, block)
    checkpoint = write(tmp_path, {"w": values, "w_scale_inv": scales}, size)
    assert checkpoint.scales == {"w": "w_scale_inv"}
    assert_dequantizes(checkpoint, "w", expected)
    stored = checkpoint["w"]
    assert stored.dtype == FP8
    assert stored.tobytes() == values.tobytes()


@pytest.mark.parametrize("grid", [(), (1,), (1, 1), (12,), (12, 1), (1, 10)])
def test_scales_of_the_whole_weight_or_of_each_channel(tmp_path, grid):
    full = (12, 1) if grid == (12,) else grid if len(grid) == 2 else (1, 1)
    block = tuple(n // count for n, count in zip((12, 10), full, strict=True))
    values, scales, expected = quantize(draw(12, 10), full, block)
    arrays = {"w": values, "w_scale": scales.reshape(grid)}
    assert_dequantizes(write(tmp_path, arrays), "w", expected)


def test_other_dtypes_of_weights_and_scales(tmp_path):
    for dtype in (ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fnuz):
        values = draw(4, 32).astype(dtype)
        for kind in (ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e8m0fnu):
            scales = np.full((4, 1), 2.0).astype(kind)
            checkpoint = write(tmp_path, {"w": values, "w_scale": scales})
            found = checkpoint.read_dequantized("w")
            np.testing.assert_array_equal(found, 2 * values.astype(np.float32))


def test_other_floats_are_only_cast(tmp_path):
    arrays = {
        "half": draw(3, 4).astype(ml_dtypes.bfloat16),
        "wide": draw(3, 4).astype(np.float64),
        "scalar": np.float32(3).reshape(()),
        "ids": np.arange(3),
        "w_scale": np.ones(2, np.float32),  # of no weight
    }
    checkpoint = write(tmp_path, arrays)
    assert checkpoint.scales == {}
    for name in ("half", "wide", "scalar", "w_scale"):
        found = checkpoint.read_dequantized(name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, arrays[name].astype(np.float32))
    with pytest.raises(ValueError, match=r"safetensors: ids must be floating of 8"):
        checkpoint.read_dequantized("ids")
    with pytest.raises(TypeError, match="`dtype` must be float32 or float64, got bflo"):
        checkpoint.read_dequantized("half", dtype=ml_dtypes.bfloat16)
    with pytest.raises(KeyError, match="has no array 'v'"):
        checkpoint.read_dequantized("v")


def test_scales_in_another_shard(tmp_path):
    values, scales, expected = quantize(draw(8, 8), (2, 2), (4, 4))
    jlora.save_arrays(tmp_path / "a.safetensors", {"w": values})
    jlora.save_arrays(tmp_path / "b.safetensors", {"w_scale_inv": scales})
    places = {"w": "a.safetensors", "w_scale_inv": "b.safetensors"}
    index = json.dumps({"weight_map": places})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert_dequantizes(open_checkpoint(tmp_path), "w", expected)


# {case: (scales, size in config.json, text)}
HOSTILE = {
    "no scale": ({}, None, r"w is in fp8 and must have one scale, .* got 0 of them"),
    "two scales": (
        {"w_scale": draw(1), "w_scale_inv": draw(1)},
        None,
        "got 2 of them",
    ),
    "blocks of two sizes": (
        {"w_scale_inv": draw(1, 3)},
        None,
        r"w_scale_inv must have .*\(12, 300\), got shape \(1, 3\) and no size",
    ),
    "another block size": (
        {"w_scale_inv": draw(3, 1)},
        [8, 512],
        r"got shape \(3, 1\) and blocks of \[8, 512\]",
    ),
    "one block where there are more": (
        {"w_scale_inv": draw(1, 2)},
        [8, 256],
        r"got shape \(1, 2\) and blocks of \[8, 256\]",
    ),
    "too many": ({"w_scale": draw(13, 1)}, None, r"got shape \(13, 1\)"),
    "vector of another length": ({"w_scale": draw(7)}, None, r"got shape \(7,\)"),
    "empty": ({"w_scale": draw(0, 1)}, None, r"got shape \(0, 1\)"),
    "three axes": ({"w_scale": draw(12, 1, 1)}, None, r"got shape \(12, 1, 1\)"),
    "bytes": (
        {"w_scale": np.ones((12, 1), np.uint8)},
        None,
        "w_scale must be floating, got uint8",
    ),
    "a size that is no pair": (
        {"w_scale_inv": draw(3, 1)},
        [128],
        r"`weight_block_size` must be two positive integers, got \[128\]",
    ),
    "a size of zero": ({"w_scale_inv": draw(3, 1)}, [0, 4], "positive integers"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_scales_that_do_not_fit(tmp_path, case):
    scales, size, text = HOSTILE[case]
    checkpoint = write(tmp_path, {"w": draw(12, 300).astype(FP8), **scales}, size)
    with pytest.raises(ValueError, match=text) as caught:
        checkpoint.read_dequantized("w")
    assert str(tmp_path) in str(caught.value)
    assert checkpoint["w"].dtype == FP8


def test_memory_of_a_big_weight(tmp_path):
    values = np.ones((2048, 2048)).astype(FP8)
    scales = np.full((16, 16), 2.0, np.float32)
    checkpoint = write(tmp_path, {"w": values, "w_scale_inv": scales}, [128, 128])
    checkpoint.read_dequantized("w", 0, 1)
    tracemalloc.start()
    found = checkpoint.read_dequantized("w")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    rows = checkpoint.read_dequantized("w", 100, 200)
    row_peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert (found == 2).all()
    assert peak < found.nbytes + values.nbytes + 2**23  # and one block of scales
    assert row_peak < 3 * rows.nbytes


def make_models(tmp_path):
    """Write a base and a tuned model in fp8 that differ by a matrix of rank one."""
    arrays, expected = {}, {}
    rank_one = draw(16, 1) @ draw(1, 16)
    w = draw(16, 16)
    for name, matrix in (("base", w), ("tuned", w + rank_one)):
        values, scales, expected[name] = quantize(matrix, (4, 4), (4, 4))
        arrays[name] = {Q: values, f"{Q}_scale_inv": scales, "norm.weight": np.ones(4)}
        write(tmp_path / name, arrays[name], [4, 4])
    return tmp_path / "base", tmp_path / "tuned", expected["tuned"] - expected["base"]


def extract(*paths, **settings):
    return extract_checkpoint(
        *paths, key=jax.random.key(0), progress=False, **{"rank": 16, **settings}
    )


def test_the_difference_of_dequantized_weights_is_extracted(tmp_path):
    base, tuned, delta = make_models(tmp_path)
    report = extract(base, tuned, tmp_path / "adapter")
    assert report.skipped == ()
    factors, _ = jlora.load_peft(tmp_path / "adapter")
    assert list(factors) == ["layers.0.q"]
    found = (factors["layers.0.q"].u @ factors["layers.0.q"].v).T
    np.testing.assert_allclose(found, delta, atol=1e-4)


def test_a_base_in_bfloat16_and_weights_that_are_no_targets(tmp_path):
    base, tuned, _ = make_models(tmp_path)
    expected = open_checkpoint(tuned).read_dequantized(Q)
    plain = {Q: np.zeros((16, 16), ml_dtypes.bfloat16), "norm.weight": np.ones(4)}
    write(tmp_path / "plain", plain)
    assert extract(tmp_path / "plain", tuned, tmp_path / "a", rank=2).skipped == ()

    # Stored whole, the weight is dequantised as well.
    for folder, number in ((base, 0), (tuned, 1)):
        k = {"layers.0.k.weight": np.full((4, 4), number, np.float32)}
        write(folder, dict(open_checkpoint(folder)) | k, [4, 4])
    extract(base, tuned, tmp_path / "b", rank=1, targets="k", modules_to_save="q")
    saved = read_peft(tmp_path / "b").saved
    np.testing.assert_array_equal(*saved.values(), expected)
    with pytest.raises(ValueError, match="Dequantise the model first"):
        merge_checkpoint(base, tmp_path / "b", tmp_path / "c", dry_run=True)


def test_a_new_scale_is_a_change(tmp_path):
    base, _, _ = make_models(tmp_path)
    arrays = dict(open_checkpoint(base))
    write(tmp_path / "new", arrays | {f"{Q}_scale_inv": draw(4, 4)}, [4, 4])
    assert len(extract(base, tmp_path / "new", tmp_path / "a").modules) == 1
    with pytest.raises(ValueError, match="got no difference"):
        extract(base, tmp_path / "new", tmp_path / "b", targets="none")
    with pytest.raises(ValueError, match="got no difference"):
        extract(base, base, tmp_path / "c")


def test_fp8_without_scales_is_not_extracted_merged_or_initialized(tmp_path):
    base, tuned, _ = make_models(tmp_path)
    write(tmp_path / "bare", {Q: draw(16, 16).astype(FP8)})
    with pytest.raises(ValueError, match=rf"{Q} is in fp8 and must have one scale"):
        extract(tmp_path / "bare", tuned, tmp_path / "out")

    pair = jlora.Factors(draw(16, 1), draw(1, 16))
    jlora.save_peft(tmp_path / "adapter", {"layers.0.q": pair})
    text = rf"model\.safetensors: {Q} must be floating of 16 to 64 .* Dequantise the mo"
    with pytest.raises(ValueError, match=text):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", dry_run=True)
    with pytest.raises(ValueError, match=text):
        initialize_checkpoint(
            base, tmp_path / "out", rank=2, key=jax.random.key(0), progress=False
        )
    assert not (tmp_path / "out").exists()
