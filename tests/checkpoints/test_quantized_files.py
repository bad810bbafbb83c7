"""Quantised arrays in files: jlora's own, bitsandbytes', and fp8 with scales."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora.checkpoints import bitsandbytes_files, load_weights
from jlora.quantization import QuantizedArray, fp8, int4, int8, nf4, quantize

FORMATS = [nf4(), nf4(double_quant=False), int8(), int8(block_size=32), int4(), fp8()]
Q = "layers.0.q_proj.weight"
BFLOAT16 = ml_dtypes.bfloat16


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def assert_equal(found, array):
    assert isinstance(found, QuantizedArray)
    assert jax.tree.structure(found) == jax.tree.structure(array)
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(array), strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.label)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_saved_arrays_come_back_bit_for_bit(tmp_path, format, suffix):
    path = tmp_path / f"w{suffix}"
    arrays = {
        "plain": draw(3),
        "matrix": quantize(draw(70, 9), format),
        "stack": quantize(
            draw(2, 9, 70).astype(ml_dtypes.bfloat16), format, layout="oi"
        ),
        "heads": quantize(draw(8, 3, 4), format, layout="ioo"),
    }
    jlora.save_arrays(path, arrays)
    for load in (jlora.load_arrays, load_weights):
        found = load(path)
        assert found.keys() == arrays.keys()
        np.testing.assert_array_equal(found["plain"], arrays["plain"])
        for name in ("matrix", "stack", "heads"):
            assert_equal(found[name], arrays[name])


def write_foreign(folder, arrays, config=None):
    folder.mkdir()
    jlora.save_arrays(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_of_bitsandbytes_is_read_without_a_change(tmp_path, double_quant):
    w = quantize(draw(12, 128), nf4(double_quant=double_quant), layout="oi")
    tensors = bitsandbytes_files.list_tensors(Q, w) | {"norm.weight": draw(3)}
    found = load_weights(write_foreign(tmp_path / "model", tensors))
    assert sorted(found) == [Q, "norm.weight"]
    assert_equal(found[Q], w)


def test_nf4_blocks_that_cross_rows_are_read_exactly(tmp_path):
    """bitsandbytes blocks the flat weight; 96 inputs are one block and a half."""
    flat = quantize(
        draw(64, 15), nf4(double_quant=True), layout="oi".replace("oi", "io")
    )
    values = np.asarray(flat.dequantize()).T.reshape(10, 96)
    tensors = bitsandbytes_files.list_tensors(Q, flat)
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [10, 96],
        "nested_blocksize": 256, "nested_offset": float(flat.scales.offset),
    }  # fmt: off
    name = f"{Q}.quant_state.bitsandbytes__nf4"
    tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    found = load_weights(write_foreign(tmp_path / "model", tensors))[Q]
    assert found.shape == (10, 96)
    assert found.format.block_size == 32
    # The nested scales are read in NumPy, and computed by XLA: an ulp.
    np.testing.assert_allclose(found.dequantize(), values, rtol=1e-6)


def test_int8_of_bitsandbytes_is_read(tmp_path):
    w = quantize(draw(12, 40), int8(), layout="oi")
    tensors = bitsandbytes_files.list_tensors(Q, w)
    model = write_foreign(tmp_path / "model", tensors, {"dtype": "float16"})
    found = load_weights(model)[Q]
    assert found.dtype == np.float16
    assert_equal(found.astype(np.float32), w)


@pytest.mark.parametrize(
    ("shape", "grid", "name", "block"),
    [
        ((256, 384), (2, 3), "_scale_inv", [128, 128]),
        ((200, 300), (2, 3), "_scale_inv", [128, 128]),  # no multiples
        ((12, 40), (12, 1), "_scale", None),
        ((12, 40), (1,), "_scale", None),
    ],
)
def test_fp8_with_scales_stays_in_8_bits(tmp_path, shape, grid, name, block):
    w = draw(*shape).astype(ml_dtypes.float8_e4m3fn)
    scales = np.random.default_rng(1).uniform(0.5, 2, grid).astype(np.float32)
    config = {"quantization_config": {"weight_block_size": block}} if block else {}
    model = write_foreign(tmp_path / "model", {Q: w, f"{Q}{name}": scales}, config)
    found = load_weights(model, dtype=np.float32)
    assert list(found) == [Q]
    expected = jlora.checkpoints.open_checkpoint(model).read_dequantized(Q)
    np.testing.assert_array_equal(found[Q].dequantize(), expected)
    assert found[Q].codes.nbytes == w.size


def test_a_quantised_checkpoint_is_adapted_and_trained(tmp_path):
    w = quantize(draw(12, 128), nf4(), layout="oi")
    model = write_foreign(tmp_path / "model", bitsandbytes_files.list_tensors(Q, w))
    params = load_weights(model)
    plan = jlora.make_plan(params, jlora.Rule(Q, 4, init="lora", layout="oi"))
    adapted = jlora.adapt(params, plan, key=jax.random.key(0))
    assert_equal(adapted[Q].base, w)
    x = draw(5, 128, seed=1)
    y = jlora.lift(lambda params, x: x @ params[Q].T)(adapted, x)
    np.testing.assert_allclose(y, x @ np.asarray(w.dequantize()).T, atol=1e-4)
    other = jlora.make_plan(params, jlora.Rule(Q, 4, init="lora"))
    with pytest.raises(ValueError, match="`layout` must be 'oi', in which"):
        jlora.adapt(params, other, key=jax.random.key(0))


def spoil(tensors, name, array):
    return tensors | {name: array}


def test_bad_files_are_refused_by_name(tmp_path):
    w = quantize(draw(12, 128), nf4(), layout="oi")
    own = tmp_path / "own.safetensors"
    jlora.save_arrays(own, {"w": w})
    plain = dict(jlora.checkpoints.open_checkpoint(own))
    foreign = bitsandbytes_files.list_tensors(Q, w)
    state = f"{Q}.quant_state.bitsandbytes__nf4"
    levels = foreign[f"{Q}.quant_map"]
    e5m2 = draw(4, 4).astype(ml_dtypes.float8_e5m2)
    fp4 = {f"{Q}.quant_state.bitsandbytes__fp4": foreign[state], Q: foreign[Q]}
    cases = [
        (
            spoil(plain, "w.scales", plain["w.scales"][:5]),
            "w must have codes and scales",
        ),
        (spoil(plain, "w", plain["w"][:, :7]), "w must have codes and scales of one"),
        (spoil(plain, "w.quantized", np.frombuffer(b"{}", np.uint8)), "a known format"),
        (spoil(plain, "w.quantized", np.frombuffer(b"[", np.uint8)), "JSON"),
        ({k: v for k, v in plain.items() if k != "w.scales"}, "the tensor w.scales"),
        (spoil(foreign, f"{Q}.absmax", foreign[f"{Q}.absmax"][:5]), "of one size"),
        (spoil(foreign, f"{Q}.quant_map", levels[::-1].copy()), "levels of NF4"),
        (spoil(foreign, state, np.frombuffer(b"{}", np.uint8)), "a quant_state with"),
        (fp4, "must be in NF4 or int8, got fp4"),
        ({Q: e5m2, f"{Q}_scale": np.ones(1, np.float32)}, "must be in e4m3"),
        (
            {Q: draw(3, 4).astype(np.int8), "layers.0.q_proj.SCB": draw(4)},
            "a scale for each output",
        ),
    ]
    for number, (tensors, text) in enumerate(cases):
        path = tmp_path / f"{number}.safetensors"
        jlora.save_arrays(path, tensors)
        with pytest.raises(ValueError, match=text) as error:
            load_weights(path)
        assert str(path) in str(error.value)


def test_bad_arguments(tmp_path):
    w = quantize(draw(12, 128), nf4())
    path = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match="`arrays` must not hold 'w"):
        jlora.save_arrays(path, {"w": w, "w.scales": draw(3)})
    jlora.save_arrays(path, {"w": w})
    with pytest.raises(TypeError, match="`dtype` must be float32, bfloat16 or float16"):
        load_weights(path, dtype=np.int8)
    with pytest.raises(ValueError, match="exactly one array, got 5"):
        jlora.save_arrays(tmp_path / "w.npy", w)


def test_a_mixed_tree_through_fit_save_load_and_merge(tmp_path, standard_promotion):
    import optax

    params = {"a": draw(64, 32), "b": draw(32, 8), "c": draw(8)}
    rules = [
        jlora.Rule("a", 4, init="pissa", quantize=nf4()),
        jlora.Rule("b", 4, init="pissa"),
    ]
    params = jax.tree.map(jnp.asarray, params)
    plan = jlora.make_plan(params, rules)
    adapted = jlora.adapt(params, plan, key=jax.random.key(0))
    x, y = jnp.asarray(draw(16, 64, seed=1)), jnp.asarray(draw(16, 8, seed=2))

    def loss(params, batch):
        x, y = batch
        found = jnp.tanh(x @ params["a"] / 8) @ params["b"] + params["c"][None]
        return jnp.mean((found - y) ** 2)

    batches = [(x, y)] * 10
    result = jlora.fit(loss, adapted, optax.adam(1e-2), batches, progress=False)
    assert result.losses[-1] < result.losses[0]

    bases = {name: result.adapted[name].base for name in "ab"}
    jlora.save_arrays(tmp_path / "bases.safetensors", bases)
    factors = jlora.adaptation.get_factors(result.adapted)
    jlora.save_peft(tmp_path / "adapter", factors)

    # Elsewhere: the bases and the adapter from their files.
    loaded = jlora.load_arrays(tmp_path / "bases.safetensors") | {"c": params["c"]}
    slots = jlora.adapt(
        loaded,
        jlora.make_plan(loaded, jlora.Rule("a|b", 4, init="lora")),
        key=jax.random.key(1),
    )
    adapter, _ = jlora.load_peft(tmp_path / "adapter")
    again = jlora.adaptation.set_factors(slots, adapter)
    merged, expected = jlora.merge(again), jlora.merge(result.adapted)
    for name in "abc":
        # The factors are in float32 in the file, as in the tree.
        np.testing.assert_allclose(merged[name], expected[name], atol=1e-6)
