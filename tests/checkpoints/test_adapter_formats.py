"""Adapters of kohya, diffusers and PEFT: what is read, and what is refused."""

import re

import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora import Factors
from jlora.checkpoints import load_adapter, open_checkpoint
from tests.helpers.adapter_files import (
    DOWN,
    UP,
    A,
    B,
    check,
    draw,
    find_delta,
    make_tensors,
    save,
)

UNET = "unet.down_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.layers.1.q_proj"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "adapter.safetensors"


# kohya


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (1.0, 0.5), (-8, -4.0)])
def test_kohya_scales_by_alpha(file, alpha, scale):
    save(file, make_tensors("lora_unet_mid_to_q", alpha=alpha))
    check(load_adapter(file), {"lora_unet_mid_to_q": scale * find_delta()})


def test_kohya_finds_the_modules_of_a_pipeline(file):
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    flat = text.replace(".", "_")
    tensors = make_tensors("lora_unet_down_blocks_0_attn_1_to_q", alpha=4)
    tensors |= make_tensors(f"lora_te1_{flat}") | make_tensors(f"lora_te2_{flat}", m=8)
    save(file, tensors)
    modules = [
        "unet.down_blocks.0.attn_1.to_q.weight",
        "unet.conv_in.bias",
        f"text_encoder.{text}.weight",
        f"text_encoder_2.{text}",
    ]

    expected = {
        "unet.down_blocks.0.attn_1.to_q": 2 * find_delta(),
        f"text_encoder.{text}": find_delta(),
        f"text_encoder_2.{text}": find_delta(m=8),
    }
    check(load_adapter(file, modules=iter(modules)), expected)


@pytest.mark.parametrize(
    ("prefix", "start"),
    [
        ("lora_unet_", ""),
        ("lora_unet_", "transformer."),
        ("lora_unet_", "model.diffusion_model."),
        ("lora_transformer_", "transformer."),
        ("lora_te_", "text_encoder."),
        ("lora_te3_", "text_encoder_2."),
    ],
)
def test_kohya_finds_modules_behind_each_prefix(file, tmp_path, prefix, start):
    save(file, make_tensors(f"{prefix}blocks_0_to_q"))
    model = tmp_path / "model.safetensors"
    save(model, {f"{start}blocks.0.to_q.weight": draw(4, 6)})
    found = load_adapter(file, modules=open_checkpoint(model))
    check(found, {f"{start}blocks.0.to_q": find_delta()})


def test_small_convolutions_are_matrices_and_dtypes_are_kept(file):
    tensors = {
        f"lora_unet_proj_in.{end}": array[..., None, None].astype(ml_dtypes.bfloat16)
        for end, array in ((DOWN, draw(2, 6)), (UP, draw(4, 2)))
    }
    jlora.save_arrays(file, tensors)
    u, v = load_adapter(file, scale=1)["lora_unet_proj_in"]
    assert (u.dtype, v.dtype) == (ml_dtypes.bfloat16, ml_dtypes.bfloat16)
    assert (u.shape, v.shape) == ((6, 2), (2, 4))

    jlora.save_arrays(file, tensors | {"lora_unet_proj_in.alpha": np.ones(1)})
    assert load_adapter(file)["lora_unet_proj_in"].v.dtype == np.float32


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        (["a.c"], "`modules` must hold a module for each factor, got none for "),
        (["a.b", "a_b"], "must hold one module for lora_te1_a_b, got a.b and a_b."),
        (["a.b"], "got a.b for lora_te1_a_b and lora_te2_a_b. Put 'unet.', "),
    ],
)
def test_modules_that_do_not_decide_are_refused(file, modules, text):
    save(file, make_tensors("lora_te1_a_b") | make_tensors("lora_te2_a_b"))
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        load_adapter(file, modules=modules)
    assert str(error.value).startswith(f"{file}: ")


@pytest.mark.parametrize("modules", ["a.b", [("a", "b")]])
def test_modules_of_the_wrong_kind_are_refused(file, modules):
    save(file, make_tensors("lora_te_a_b"))
    with pytest.raises(TypeError, match="`modules` must "):
        load_adapter(file, modules=modules)


# diffusers


@pytest.mark.parametrize("scale", [None, 3.0])
def test_diffusers_without_settings_has_the_scale_1_or_the_given_one(file, scale):
    save(file, make_tensors(UNET, (A, B)) | make_tensors(TEXT, (A, B), rank=3))
    expected = {UNET: find_delta(), TEXT: find_delta(rank=3)}
    factor = np.float32(scale or 1)
    found = load_adapter(file, scale=scale)
    check(found, {path: factor * delta for path, delta in expected.items()})


def test_diffusers_scales_by_the_settings_of_each_part(file):
    other = "unet.mid_block.attn1.to_q"
    tensors = make_tensors(UNET, (A, B)) | make_tensors(other, (A, B), rank=4)
    save(
        file,
        tensors | make_tensors(TEXT, (A, B), rank=4),
        {
            "unet.peft_type": "LORA",
            "unet.r": 2,
            "unet.lora_alpha": 1,
            "unet.rank_pattern": {"^mid_block.attn1.to_q": 4},
            "unet.alpha_pattern": {"mid_block.attn1.to_q": 16},
            "text_encoder.r": 4,
            "text_encoder.lora_alpha": 4,
            "text_encoder.use_rslora": True,
        },
    )
    deltas = {UNET: 0.5 * find_delta(), other: 4 * find_delta(rank=4)}
    check(load_adapter(file), deltas | {TEXT: 2 * find_delta(rank=4)})


def test_diffusers_reads_a_single_model_in_a_folder(tmp_path):
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save(path, make_tensors("blocks.0.to_q", (A, B)), settings)
    check(load_adapter(tmp_path), {"blocks.0.to_q": 4 * find_delta()})


@pytest.mark.parametrize("middle", ["lora", "lora_linear_layer"])
def test_diffusers_reads_the_older_names(file, middle):
    ends = (f"{middle}.down.weight", f"{middle}.up.weight")
    save(file, make_tensors(UNET, ends, alpha=4))
    check(load_adapter(file), {UNET: 2 * find_delta()})


SETTINGS = {"unet.r": 2, "unet.lora_alpha": 2}


@pytest.mark.parametrize(
    ("tensors", "settings", "text"),
    [
        (
            make_tensors(UNET, (A, B)),
            SETTINGS | {"unet.r": 4},
            "must say the ranks of the factors, got 4 for down_blocks.0.attn1.to_q",
        ),
        (
            make_tensors(UNET, (A, B)),
            SETTINGS | {"unet.lora_alpha": "2"},
            "`lora_alpha` must be a number above 0, got '2'",
        ),
        (
            make_tensors(UNET, (A, B)),
            SETTINGS | {"unet.init_lora_weights": "pissa"},
            "`init_lora_weights` must be one that leaves the base unchanged",
        ),
        (make_tensors(UNET, (A, B)), [1], "must hold a JSON object, got list"),
        (
            make_tensors(UNET, (A, B), alpha=1),
            SETTINGS,
            f"must say the scale once, got lora_adapter_metadata and {UNET}.alpha",
        ),
        (
            make_tensors("vae.to_q", (A, B)),
            SETTINGS,
            "must hold modules of unet, transformer, text_encoder, text_encoder_2, got "
            "vae.to_q",
        ),
    ],
)
def test_settings_that_contradict_the_file_are_refused(file, tensors, settings, text):
    save(file, tensors, settings)
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        load_adapter(file)
    assert str(error.value).startswith(f"{file}: ")


# All formats


def test_a_folder_of_peft_is_read(tmp_path):
    factors = {"layers.0.q": Factors(draw(6, 2), draw(2, 4))}
    jlora.save_peft(tmp_path, factors)
    check(load_adapter(tmp_path), {"layers.0.q": draw(6, 2) @ draw(2, 4)})
    with pytest.raises(ValueError, match="`scale` must be None for an adapter of PEFT"):
        load_adapter(tmp_path, scale=1.0)
    with pytest.raises(ValueError, match="Pass the folder"):
        load_adapter(tmp_path / "adapter_model.safetensors")


def test_factors_survive_a_round_trip_through_peft(file, tmp_path):
    save(file, make_tensors("lora_unet_a_to_q", alpha=1))
    factors = load_adapter(file, modules=["a.to_q"])
    jlora.save_peft(tmp_path / "peft", factors)
    found = load_adapter(tmp_path / "peft")
    check(found, {"a.to_q": 0.5 * find_delta()})


NAME = "lora_unet_a"
GOOD = make_tensors(NAME)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({f"{NAME}.hada_w1_a": draw(2)}, f"got {NAME}.hada_w1_a, LoHa. Merge it"),
        ({f"{NAME}.lokr_w1": draw(2)}, f"got {NAME}.lokr_w1, LoKr."),
        ({f"{NAME}.dora_scale": draw(2)}, f"got {NAME}.dora_scale, DoRA."),
        ({"unet.q.lora_magnitude_vector": draw(2)}, "lora_magnitude_vector, DoRA."),
        ({"unet.q.lora_B.bias": draw(2)}, "got unet.q.lora_B.bias, a bias."),
        ({f"{NAME}.lora_mid.weight": draw(2)}, "LoCon with a middle factor."),
        ({"layers.0.q.lora_a": draw(2)}, "the unknown tensor layers.0.q.lora_a."),
        ({"step": draw(1)}, "got the unknown tensor step. Remove the tensor"),
        ({"lora_unet_b.alpha": draw(1)}, "both factors of lora_unet_b, got only "),
        ({f"lora_unet_b.{DOWN}": draw(2, 3)}, f"got only lora_unet_b.{DOWN}."),
        ({f"lora_unet_b.{UP}": draw(3, 2)}, f"got only lora_unet_b.{UP}."),
        (
            make_tensors("unet.q", (A, B)),
            f"must hold one format, got unet.q.{A} of diffusers and {NAME}.{DOWN} of "
            "kohya. Save one file for each.",
        ),
        ({f"{NAME}.{UP}": draw(4, 3)}, f"got (2, 6) at {NAME}.{DOWN} and (4, 3) at "),
        ({f"{NAME}.{DOWN}": draw(2, 6, 3, 3)}, f"got shape (2, 6, 3, 3) at {NAME}."),
        ({f"{NAME}.{DOWN}": draw(2)}, "must hold matrices or 1 x 1 convolutions"),
        ({f"{NAME}.{DOWN}": draw(0, 6)}, f"got shape (0, 6) at {NAME}.{DOWN}."),
        ({f"{NAME}.{DOWN}": np.ones((2, 6), int)}, f"got int64 at {NAME}.{DOWN}."),
        ({f"{NAME}.{UP}": draw(4, 2) * np.nan}, f"NaN or Inf in {NAME}.{UP}."),
        ({f"{NAME}.alpha": np.float32([0])}, "other than 0 as alpha, got [0.0] at "),
        ({f"{NAME}.alpha": np.full((), np.inf)}, "got inf at"),
        ({f"{NAME}.alpha": draw(2)}, f"at {NAME}.alpha. Write the number"),
    ],
)
def test_what_is_no_pair_of_factors_is_refused(file, extra, text):
    save(file, GOOD | extra)
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        load_adapter(file)
    assert str(error.value).startswith(f"{file}")


def test_names_of_one_factor_are_refused(file):
    array = draw(6, 2)
    jlora.save_arrays(file, {"m/w_lora_a": array, "m.w_lora_a": array})
    with pytest.raises(ValueError, match="must hold one adapter, got m"):
        load_adapter(file, scale=1)


@pytest.mark.parametrize(
    ("tensors", "arguments", "text"),
    [
        (make_tensors(NAME, alpha=1), {"scale": 1.0}, "`scale` must be None for an "),
        (
            {"w_lora_a": draw(6, 2), "w_lora_b": draw(2, 4)},
            {},
            "`scale` must be alpha / rank of the training for an adapter of qwix",
        ),
        (
            {"w_lora_a": draw(6, 2), "w_lora_b": draw(2, 4)},
            {"scale": 1.0, "modules": ["w"]},
            "`modules` must be None for an adapter of qwix, whose files name the "
            "modules in full, got list. Leave it out.",
        ),
        (GOOD, {"scale": np.inf}, "`scale` must be finite, got inf."),
    ],
)
def test_scales_that_are_missing_or_said_twice_are_refused(
    file, tensors, arguments, text
):
    save(file, tensors)
    with pytest.raises(ValueError, match=re.escape(text)):
        load_adapter(file, **arguments)


def test_files_without_factors_are_refused(file, tmp_path):
    save(file, {})
    with pytest.raises(ValueError, match="must hold factors, got none"):
        load_adapter(file)
    (tmp_path / "lora.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"lora\.bin: "):
        load_adapter(tmp_path / "lora.bin")
    with pytest.raises(OSError, match="none"):
        load_adapter(tmp_path / "none.safetensors")
