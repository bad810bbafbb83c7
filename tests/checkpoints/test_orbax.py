"""`open_checkpoint` of Orbax checkpoints, through orbax: a leaf at a time."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora.checkpoints import (
    extract_checkpoint,
    initialize_checkpoint,
    merge_checkpoint,
    open_checkpoint,
)
from jlora.cli.main import main

ocp = pytest.importorskip("orbax.checkpoint")

RNG = np.random.default_rng(0)


def make_tree():
    kernel = RNG.standard_normal((6, 4)).astype(np.float32)
    return {
        "params": {
            "dense": {"kernel": jnp.asarray(kernel), "bias": np.ones(4, np.float16)},
            "blocks": [
                {"kernel": jnp.ones((2, 3), jnp.bfloat16)},
                {"kernel": jnp.full((2, 3), 2, jnp.bfloat16)},
            ],
            "eight": jnp.ones((2, 2), jnp.float8_e4m3fn),
        },
        "step": np.int32(7),
        "rate": 0.5,
        "nothing": None,
    }


def list_leaves(tree):
    params = tree["params"]
    return {
        "params.blocks.0.kernel": np.asarray(params["blocks"][0]["kernel"]),
        "params.blocks.1.kernel": np.asarray(params["blocks"][1]["kernel"]),
        "params.dense.bias": params["dense"]["bias"],
        "params.dense.kernel": np.asarray(params["dense"]["kernel"]),
        "params.eight": np.asarray(params["eight"]),
        "rate": np.asarray(0.5),
        "step": np.asarray(7, np.int32),
    }


def save_standard(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def save_pytree(folder, tree, **settings):
    ocp.PyTreeCheckpointer(**settings).save(folder, {**tree, "name": "a model"})
    return folder


def save_old_files(folder, tree):
    return save_pytree(folder, tree, use_ocdbt=False)


def save_step(folder, tree):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(3, args=ocp.args.StandardSave(tree))
    return folder / "3"


def save_items(folder, tree):
    items = {"params": tree, "state": {"count": np.ones(2)}}
    with ocp.CheckpointManager(folder, item_names=tuple(items)) as manager:
        arguments = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        manager.save(3, args=ocp.args.Composite(**arguments))
    return folder / "3"


def save_one_item(folder, tree):
    with ocp.CheckpointManager(folder, item_names=("state",)) as manager:
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(tree))
        manager.save(3, args=arguments)
    return folder / "3"


WRITERS = [
    save_standard,
    save_pytree,
    save_old_files,
    save_step,
    save_items,
    save_one_item,
]


@pytest.mark.parametrize("save", WRITERS)
def test_leaves_are_the_arrays_bit_by_bit(tmp_path, save):
    tree = make_tree()
    checkpoint = open_checkpoint(save(tmp_path / "saved", tree))
    expected = list_leaves(tree)
    assert sorted(checkpoint) == sorted(expected)
    for name, array in expected.items():
        found, info = checkpoint[name], checkpoint.info(name)
        assert (info.shape, info.dtype) == (array.shape, array.dtype.name)
        assert info.num_bytes == array.nbytes
        assert info.file == checkpoint.files[0]
        assert (found.shape, found.dtype) == (array.shape, array.dtype)
        assert type(found) is np.ndarray
        assert found.tobytes() == array.tobytes()
        assert found.flags.writeable


def test_rows_and_values(tmp_path):
    tree = make_tree()
    checkpoint = open_checkpoint(save_standard(tmp_path / "saved", tree))
    kernel = np.asarray(tree["params"]["dense"]["kernel"])
    rows = checkpoint.read_rows("params.dense.kernel", 2, 5)
    assert np.array_equal(rows, kernel[2:5])
    assert rows.base is None
    assert checkpoint.read_rows("params.dense.kernel", 4, 2).shape == (0, 4)
    assert checkpoint.read_rows("step", 1, None) == 7
    half = checkpoint.read_dequantized("params.blocks.1.kernel")
    assert half.tolist() == [[2.0] * 3] * 2
    with pytest.raises(ValueError, match=r"params\.eight is in fp8 and must have one"):
        checkpoint.read_dequantized("params.eight")
    with pytest.raises(KeyError, match="has no array 'params'"):
        checkpoint["params"]


def test_one_leaf_is_read_without_the_others(tmp_path):
    tree = {name: np.full((50, 50), i) for i, name in enumerate(("left", "right"))}
    folder = save_pytree(tmp_path / "saved", tree, use_ocdbt=False)
    checkpoint = open_checkpoint(folder)
    shutil.rmtree(folder / "left")
    assert checkpoint["right"].min() == 1
    with pytest.raises(ValueError, match=r"saved: must be a whole Orbax checkpoint"):
        checkpoint["left"]


def test_show_prints_names_and_shapes(tmp_path, capsys):
    folder = save_step(tmp_path / "saved", make_tree())
    capsys.readouterr()
    assert main(["show", str(folder)]) == 0
    captured = capsys.readouterr()
    assert "params.dense.kernel" in captured.out
    assert "6×4" in captured.out
    assert "7 arrays" in captured.out + captured.err
    assert "WARNING" not in captured.err


def test_a_flax_model(tmp_path):
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(model))
    checkpoint = open_checkpoint(save_standard(tmp_path / "saved", state))
    assert sorted(checkpoint) == ["bias", "kernel"]
    assert np.array_equal(checkpoint["kernel"], np.asarray(model.kernel[...]))


def test_the_difference_of_two_trees_is_extracted(tmp_path):
    kernel = RNG.standard_normal((6, 4)).astype(np.float32)
    delta = RNG.standard_normal((6, 1)) @ RNG.standard_normal((1, 4))
    for name, array in (("base", kernel), ("tuned", kernel + delta.astype("f4"))):
        save_standard(tmp_path / name, {"layer": {"kernel": array}})
    settings = {"rank": 1, "key": jax.random.key(0), "progress": False}
    paths = [tmp_path / name for name in ("base", "tuned", "adapter")]
    extract_checkpoint(*paths, **settings)
    factors, _ = jlora.load_peft(tmp_path / "adapter")
    (pair,) = factors.values()
    np.testing.assert_allclose(pair.u @ pair.v, delta, atol=1e-5)


def test_merge_and_init_ask_for_safetensors(tmp_path):
    base = save_standard(tmp_path / "base", {"q": np.ones((4, 6), np.float32)})
    text = r"base: must be a \.safetensors file .* with save_arrays first"
    with pytest.raises(ValueError, match=text):
        initialize_checkpoint(
            base, tmp_path / "new", rank=2, key=jax.random.key(0), progress=False
        )
    pair = jlora.Factors(np.ones((4, 1), np.float32), np.ones((1, 6), np.float32))
    jlora.save_peft(tmp_path / "adapter", {"q": pair})
    with pytest.raises(ValueError, match=text):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "new", progress=False)

    # As that sentence says.
    arrays = dict(open_checkpoint(base))
    jlora.save_arrays(tmp_path / "base.safetensors", arrays)
    merge_checkpoint(
        tmp_path / "base.safetensors",
        tmp_path / "adapter",
        tmp_path / "new",
        progress=False,
    )
    assert (open_checkpoint(tmp_path / "new")["q"] == 2).all()


def test_unfinished_checkpoints_are_refused(tmp_path):
    tree = {"w": np.ones(2)}
    folder = save_standard(tmp_path / "saved", tree)
    temporary = tmp_path / "saved.orbax-checkpoint-tmp-17"
    shutil.copytree(folder, temporary)
    (tmp_path / "5.orbax-checkpoint-tmp-18").mkdir()
    step = save_step(tmp_path / "steps", tree)
    for path in (folder, step):
        file = path / "_CHECKPOINT_METADATA"
        content = json.loads(file.read_text()) | {"commit_timestamp_nsecs": None}
        file.write_text(json.dumps(content))

    names = (temporary, tmp_path / "5.orbax-checkpoint-tmp-18", folder, step)
    for path in (*names, step / "default"):
        with pytest.raises(ValueError, match="must be a finished checkpoint, got one"):
            open_checkpoint(path)


def test_folders_of_several_checkpoints_are_refused(tmp_path):
    tree = {"w": np.ones(2)}
    step = save_step(tmp_path / "steps", tree)
    with pytest.raises(
        ValueError, match=r"steps: must be the folder of one step.* 3\."
    ):
        open_checkpoint(tmp_path / "steps")
    (step / "default").rename(step / "one")
    shutil.copytree(step / "one", step / "two")
    with pytest.raises(ValueError, match=r"must be the folder of one tree.* one, two"):
        open_checkpoint(step)
    assert open_checkpoint(step / "two")["w"].tolist() == [1, 1]


def test_safetensors_beside_an_orbax_checkpoint_come_first(tmp_path):
    save_standard(tmp_path / "saved", {"w": np.ones(2)})
    jlora.save_arrays(tmp_path / "model.safetensors", {"v": np.ones(2)})
    assert list(open_checkpoint(tmp_path)) == ["v"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tree_metadata": {}}', "\x00"])
def test_damaged_descriptions(tmp_path, text):
    folder = save_standard(tmp_path / "saved", {"w": np.ones(2)})
    (folder / "_METADATA").write_text(text)
    with pytest.raises(ValueError, match="saved: must") as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_changes_is_noticed(tmp_path):
    folder = save_standard(tmp_path / "saved", {"w": np.ones(2)})
    checkpoint = open_checkpoint(folder)
    shutil.rmtree(folder)
    save_standard(folder, {"w": np.ones(3)})
    with pytest.raises(ValueError, match="must not change while it is open"):
        checkpoint["w"]


def test_without_orbax_one_sentence_says_so(tmp_path, monkeypatch):
    folder = save_standard(tmp_path / "saved", {"w": np.ones(2)})
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"saved: orbax-.*Install jlora\[train\]\.$"):
        open_checkpoint(folder)


def test_numbers_of_python_and_small_dtypes(tmp_path):
    arrays = {
        dtype: np.ones((2, 2)).astype(getattr(ml_dtypes, dtype))
        for dtype in ("bfloat16", "float8_e5m2", "float8_e4m3fn")
    }
    checkpoint = open_checkpoint(save_pytree(tmp_path / "saved", arrays))
    for dtype, array in arrays.items():
        assert checkpoint.info(dtype).dtype == dtype
        assert checkpoint[dtype].tobytes() == array.tobytes()
