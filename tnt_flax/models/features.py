# SPDX-License-Identifier: Apache-2.0
"""Outputs of single blocks, and the networks as backbones: maps of features."""

import functools
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import flax.traverse_util
import jax.numpy as jnp
from jaxtyping import Array

from tnt_flax.core.errors import InputError
from tnt_flax.models.network import Grid, Images, Network


def block_outputs(
    model: Network, variables: Mapping[str, Any], images: Images
) -> list[dict[str, Array]]:
    """Returns the outputs of every block for `images`, in evaluation mode.

    Under `jax.jit`, unused outputs cost nothing.

    Returns:
        One dictionary per block, first block first:
        words (B, N, M, C) and sentences (B, N + 1, D), class token first;
        outer_attention (B, heads, N + 1, N + 1), softmax weights [query, key];
        inner_attention (B, N, heads, M, M), absent from blocks without words.
        PyramidTNT has no class token, N depends on the stage, and outer attention is
        (B, heads, N, K).
    """
    _, state = model.apply(variables, images, train=False, mutable=["intermediates", "maps"])
    blocks = []
    for path, length in model.stacks():
        group = _subtree(state["intermediates"], path)
        stacked = {
            "words": group["words"][0],
            "sentences": _subtree(state["maps"], path)["sentences"][0],
            "outer_attention": group["outer"]["attention"]["weights"][0],
        }
        if "inner" in group:
            stacked["inner_attention"] = group["inner"]["attention"]["weights"][0]
        blocks += [{name: x[i] for name, x in stacked.items()} for i in range(length)]
    return blocks


def _subtree(tree, path):
    return functools.reduce(operator.getitem, path, tree)


@flax.struct.dataclass
class FeatureMap:
    """Features at every `stride` pixels.

    The map covers (h * stride, w * stride) pixels from the upper left corner. The image fills the
    first `valid` (height, width) of these pixels; the rest is padding.
    """

    features: Any  # Float[Array, "B h w C"]; under JAX's transformations also shapes and the like
    stride: int = flax.struct.field(pytree_node=False)
    valid: tuple[int, int] = flax.struct.field(pytree_node=False)


def feature_maps(
    model: Network,
    variables: Mapping[str, Any],
    images: Images,
    at: Sequence[int] | None = None,
    *,
    train: bool = False,
    rngs: Mapping[str, Array] | None = None,
    mutable: Sequence[str] = (),
) -> Any:
    """Returns maps of the sentences after some blocks, for images of any size.

    Images that are not divisible into patches, or smaller than 32 pixels for PyramidTNT, are padded
    with zeros to the right and below. If the number of sentences differs from that of the weights,
    the tables of positions are resampled from a square grid, as `tnt_flax.load` does; this is
    differentiable. Another shape with the same number of sentences (256x256, 128x512) cannot be
    recognized: load with `tnt_flax.load(..., image_size=(128, 512))`. Works under `jax.jit`, with
    `model` and `at` static.

    Args:
        model: the network.
        variables: its parameters and, for PyramidTNT, `batch_stats`.
        images: [B, H, W, channels], normalized.
        at: indices of the maps. For TNT, blocks, all of stride 16; by default the last block of
            each quarter, as in the paper (section 4.5). For PyramidTNT, stages, of strides 8, 16,
            32 and 64; by default all.
        train, rngs, mutable: as in `model.apply`. BatchNorm stays frozen, also in training,
            without `mutable=["batch_stats"]`.

    Returns:
        A list of `FeatureMap` of [B, h, w, C], in the order of `at`; with `mutable`, a pair
        (maps, {"batch_stats": ...}), as flax returns it.

    Raises:
        InputError: an index in `at` does not exist, images are not of rank 4, or positions of a
            grid that is not square would have to be resampled.
    """
    at = model.default_maps if at is None else at
    last = len(model.map_blocks) - 1
    if not all(0 <= i <= last for i in at):
        raise InputError(f"at={list(at)}: the maps of this {type(model).__name__} are 0 to {last}")
    if images.ndim != 4:
        raise InputError(f"images must be [B, H, W, channels], not {list(images.shape)}")
    size = images.shape[1:3]
    images, grid = _pad(images, model)
    variables = {**variables, "params": with_positions(model, variables["params"], grid)}
    captured = ["maps", *mutable]
    _, state = model.apply(variables, images, train=train, rngs=rngs, mutable=captured)
    sown = state.pop("maps")
    stacks = (_subtree(sown, path)["sentences"][0] for path, _ in model.stacks())
    sentences = list(itertools.chain.from_iterable(stacks))
    layouts = model.block_layouts(grid)
    maps = []
    for block in (model.map_blocks[i] for i in at):
        layout = layouts[block]
        features = sentences[block][:, model.has_class_token :]
        features = features.reshape(len(images), *layout.grid, -1)
        maps.append(FeatureMap(features, model.patch_size * layout.side, size))
    return (maps, state) if mutable else maps


def _pad(images, model):
    """Returns images padded to whole patches, and their grid."""
    patch = model.patch_size
    size = images.shape[1:3]
    grid = tuple(max(-(-pixels // patch), model.min_grid) for pixels in size)
    padding = [(0, n * patch - pixels) for n, pixels in zip(grid, size, strict=True)]
    return jnp.pad(images, ((0, 0), *padding, (0, 0))), grid


def with_positions(model: Network, params: Mapping[str, Any], grid: Grid) -> Any:
    """Returns `params` with tables of positions for images of `grid` sentences.

    Raises:
        InputError: positions of a grid that is not square would have to be resampled.
    """
    sentences = params["sentence_pos"].shape[1] - model.has_class_token
    if sentences == math.prod(grid):
        return params
    side = math.isqrt(sentences)
    if side * side != sentences:
        raise InputError(
            f"these weights have {sentences} sentences, which form no square: "
            f"cannot resample their positions for {grid[0]}x{grid[1]}"
        )
    flat = dict(flax.traverse_util.flatten_dict(params))
    flat |= model.resampled_positions(params, (side, side), grid)
    return flax.traverse_util.unflatten_dict(flat)
