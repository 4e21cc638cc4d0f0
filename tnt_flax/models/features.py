# SPDX-License-Identifier: Apache-2.0
"""The networks as backbones of dense tasks: maps of features from images of any size."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array

from tnt_flax.core.errors import InputError
from tnt_flax.models.pyramid_layers import Grid
from tnt_flax.models.pyramid_tnt import REDUCTION, PyramidTNT, stage_grids
from tnt_flax.models.tnt import TNT
from tnt_flax.models.word_embedding import Images


@flax.struct.dataclass
class FeatureMap:
    """Features at every `stride` pixels.

    The map covers (h * stride, w * stride) pixels from the upper left corner on, of which the
    images fill the first `valid` (height, width); what is beyond them is padding.
    """

    features: Any  # Float[Array, "B h w C"]; jax also puts shapes, shardings and the like here
    stride: int = flax.struct.field(pytree_node=False)
    valid: tuple[int, int] = flax.struct.field(pytree_node=False)


def feature_maps(
    model: TNT | PyramidTNT,
    variables: Mapping[str, Any],
    images: Images,
    at: Sequence[int] | None = None,
    *,
    train: bool = False,
    rngs: Mapping[str, Array] | None = None,
    mutable: Sequence[str] = (),
) -> Any:
    """Maps of features [B, h, w, C], as the blocks leave them, from images of any size.

    Images that the patches do not divide (for PyramidTNT, also those with less than 32 pixels on a
    side) are padded with zeros, to the right and below. Where they have more or fewer sentences
    than the weights, the tables of positions are resampled from a square, as `tnt_flax.load` does
    it, which is differentiable. As many sentences of another shape (256x256, 128x512) are not told
    apart: for those say `tnt_flax.load(..., image_size=(128, 512))`. Works under `jax.jit`, with
    `model` and `at` static.

    Args:
        images: [B, H, W, channels], normalized.
        at: of TNT the blocks whose sentences are wanted, from 0, all of stride 16; by default the
            last of each quarter, as in the paper (section 4.5). Of PyramidTNT the stages, whose
            strides are 8, 16, 32 and 64; by default all.
        train, rngs, mutable: as of `model.apply`. PyramidTNT's BatchNorm stays frozen, also in
            training, unless `mutable=["batch_stats"]`.

    Returns:
        A list of `FeatureMap`, in the order of `at`; with `mutable` also what has changed, as
        flax does: (maps, {"batch_stats": ...}).

    Raises:
        InputError: no such block or stage; weights of images of no square, to be resampled.
    """
    pyramid = isinstance(model, PyramidTNT)
    count = len(model.depths) if pyramid else model.depth
    at = default_depths(model) if at is None else at
    unknown = [i for i in at if not 0 <= i < count]
    if unknown:
        raise InputError(f"at={list(at)}: there are {count} {'stages' if pyramid else 'blocks'}")
    if images.ndim != 4:
        raise InputError(f"images must be [B, H, W, channels], not {list(images.shape)}")
    patch, (height, width) = model.patch_size, images.shape[1:3]
    least = REDUCTION[0] if pyramid else 1
    grid = (max(-(-height // patch), least), max(-(-width // patch), least))
    padding = (grid[0] * patch - height, grid[1] * patch - width)
    images = jnp.pad(images, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0)))
    variables = {**variables, "params": with_positions(model, variables["params"], grid)}
    _, state = model.apply(variables, images, train=train, rngs=rngs, mutable=["maps", *mutable])
    found = state.pop("maps")
    if pyramid:
        maps = [found[f"stage_{i}"][0] for i in at]
        strides = [patch * 2**i for i in at]
    else:
        blocks = [x for path, _ in model.stacks() for x in found[path[0]]["sentences"][0]]
        maps = [blocks[i][:, 1:].reshape(len(images), *grid, -1) for i in at]
        strides = [patch] * len(maps)
    maps = [FeatureMap(x, stride, (height, width)) for x, stride in zip(maps, strides, strict=True)]
    return (maps, state) if mutable else maps


def default_depths(model: TNT | PyramidTNT) -> tuple[int, ...]:
    """All stages, or the last block of each quarter."""
    if isinstance(model, PyramidTNT):
        return tuple(range(len(model.depths)))
    return tuple(sorted({-(-model.depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)}))


def with_positions(model: TNT | PyramidTNT, params: Mapping[str, Any], grid: Grid) -> Any:
    """`params` with tables of positions for images of `grid` sentences."""
    sentences = params["sentence_pos"].shape[1] - isinstance(model, TNT)
    if sentences == math.prod(grid):
        return params
    side = math.isqrt(sentences)
    if side * side != sentences:
        raise InputError(
            f"these weights have {sentences} sentences, which form no square: "
            f"cannot resample their positions for {grid[0]}x{grid[1]}"
        )
    flat = dict(flax.traverse_util.flatten_dict(params))
    flat |= resampled_positions(model, params, (side, side), grid)
    return flax.traverse_util.unflatten_dict(flat)


def resampled_positions(
    model: TNT | PyramidTNT, params: Mapping[str, Any], old: Grid, new: Grid
) -> dict[tuple[str, ...], Array]:
    """The tables of positions that change between two grids of sentences, by their paths.

    Bicubic with antialiasing, as timm resamples. The class token's position stays as it is.
    Relative positions are resampled along rows and columns of both the sentences that attend and
    those attended to: four axes.
    """
    table = jnp.asarray(params["sentence_pos"])
    if isinstance(model, TNT):
        moved = resample(table[:, 1:], 1, [old], [new])
        return {("sentence_pos",): jnp.concatenate([table[:, :1], moved], axis=1)}
    changed = {("sentence_pos",): resample(table, 1, [old], [new])}
    grids = zip(stage_grids(old), stage_grids(new), REDUCTION, strict=True)
    for i, (*both, ratio) in enumerate(grids):
        before, after = ([grid, (grid[0] // ratio, grid[1] // ratio)] for grid in both)
        path = (f"stages_{i}", "relative_pos")
        table = functools.reduce(lambda tree, name: tree[name], path, params)
        changed[path] = resample(jnp.asarray(table), 2, before, after)
    return changed


def resample(table: Array, axis: int, old: list[Grid], new: list[Grid]) -> Array:
    """Resamples the axes from `axis` on, each of which is a grid, from `old` to `new`."""
    before, after = table.shape[:axis], table.shape[axis + len(old) :]
    split = table.reshape(*before, *sum(old, ()), *after)
    shape = (*before, *sum(new, ()), *after)
    resized = jax.image.resize(split, shape, "cubic", antialias=True)
    return resized.reshape(*before, *map(math.prod, new), *after)
