"""A small vision transformer with a class head and an image head.

Every matrix product with a weight of a layer goes through `jlora.linear`, so the same
function runs on the plain tree and on the adapted tree.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jlora


class PatchEncoderSize(NamedTuple):
    """Sizes of the model. Images are squares with one channel."""

    num_classes: int = 10
    image: int = 8
    patch: int = 2
    width: int = 64
    num_layers: int = 3
    num_heads: int = 4


SIZE = PatchEncoderSize()


def init_patch_encoder(key: jax.Array, size: PatchEncoderSize = SIZE) -> dict[str, Any]:
    """Return random weights, matrices as [inputs, outputs].

    The tree has this structure:

        embed, positions, norm
        layers    list of dictionaries: qkv, out, up, down, norms [2, width]
        heads     classes, pixels
    """
    keys = iter(jax.random.split(key, 4 + 4 * size.num_layers))
    width, num_pixels = size.width, size.patch**2

    def matrix(rows, columns, gain=1.0):
        shape = rows, columns
        return gain * rows**-0.5 * jax.random.normal(next(keys), shape, jnp.float32)

    def layer():
        return {
            "qkv": matrix(width, 3 * width),
            "out": matrix(width, width, 0.5),
            "up": matrix(width, 4 * width),
            "down": matrix(4 * width, width, 0.5),
            "norms": jnp.ones((2, width), jnp.float32),
        }

    return {
        "embed": matrix(num_pixels, width),
        "positions": matrix((size.image // size.patch) ** 2, width),
        "layers": [layer() for _ in range(size.num_layers)],
        "norm": jnp.ones(width, jnp.float32),
        "heads": {
            "classes": matrix(width, size.num_classes),
            "pixels": matrix(width, num_pixels),
        },
    }


def run_patch_encoder(params, images, size: PatchEncoderSize = SIZE):
    """Return (logits [batch, classes], images [batch, image, image])."""
    x = _split_patches(images, size) @ params["embed"] + params["positions"][None]

    for layer in params["layers"]:
        norms = layer["norms"]
        x = x + _attend(layer, _normalize(x, norms[0]), size.num_heads)
        hidden = jax.nn.gelu(jlora.linear(_normalize(x, norms[1]), layer["up"]))
        x = x + jlora.linear(hidden, layer["down"])

    x = _normalize(x, params["norm"])
    logits = jnp.mean(x, axis=1) @ params["heads"]["classes"]
    return logits, _join_patches(x @ params["heads"]["pixels"], size)


def _split_patches(images, size):
    """Return [batch, patches, pixels]."""
    side, patch = size.image // size.patch, size.patch
    blocks = images.reshape(-1, side, patch, side, patch).swapaxes(2, 3)
    return blocks.reshape(-1, side**2, patch**2)


def _join_patches(patches, size):
    """Return [batch, image, image], the inverse of `_split_patches`."""
    side, patch = size.image // size.patch, size.patch
    blocks = patches.reshape(-1, side, side, patch, patch).swapaxes(2, 3)
    return blocks.reshape(-1, size.image, size.image)


def _attend(layer, x, num_heads):
    qkv = jlora.linear(x, layer["qkv"])
    heads = [
        each.reshape(*x.shape[:2], num_heads, -1) for each in jnp.split(qkv, 3, axis=-1)
    ]
    mixed = jax.nn.dot_product_attention(*heads)
    return jlora.linear(mixed.reshape(x.shape), layer["out"])


def _normalize(x, gain):
    mean_square = jnp.mean(x**2, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + 1e-6) * gain[None, None]
