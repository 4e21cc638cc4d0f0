# SPDX-License-Identifier: Apache-2.0
"""What a network makes of one image: everything that the pictures show, as arrays."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tnt_flax.core.errors import InputError
from tnt_flax.data.transforms import CorruptImageError, eval_transform
from tnt_flax.models import block_outputs
from tnt_flax.models.network import BlockLayout, Grid
from tnt_flax.training import step
from tnt_flax.training.mixup import normalize
from tnt_flax.weights.read import LoadedWeights


class Look(NamedTuple):
    """One image of S x S pixels, seen by a network; lists have an entry for each block.

    N sentences are the rows * columns of the block's grid. A class token goes before them, so that
    TNT has T = K = N + 1 tokens; PyramidTNT has none, and its T = N sentences attend to K averages.
    """

    pixels: np.ndarray  # uint8 [S, S, 3], as the network got them, before normalization
    layouts: list[BlockLayout]
    has_class_token: bool
    outer_attention: list[np.ndarray]  # [heads, T, K]
    inner_attention: dict[int, np.ndarray]  # block -> [N, heads, M, M]; no blocks without words
    sentences: list[np.ndarray]  # [T, D]
    words: dict[int, np.ndarray]  # block -> [N, M, C]; likewise
    probabilities: np.ndarray | None  # [classes]; None of a network without a head

    @property
    def reader(self) -> str:
        """What the head reads, in words."""
        return "the class token" if self.has_class_token else "the mean of the sentences"

    @property
    def grid(self) -> Grid:
        """Grid of the first block."""
        return self.layouts[0].grid

    def grid_of(self, block: int) -> Grid:
        return self.layouts[block].grid

    def holder(self, block: int, sentence: int) -> int:
        """The sentence of a block that the one of the first block lies in."""
        side = self.layouts[block].side
        row, column = divmod(sentence, self.grid[1])
        return row // side * self.grid_of(block)[1] + column // side

    def sentence_maps(self) -> list[np.ndarray]:
        """Of each block, without the class token: [rows, columns, D]."""
        own = [x[int(self.has_class_token) :] for x in self.sentences]
        return [x.reshape(*self.grid_of(i), -1) for i, x in enumerate(own)]

    def read_maps(self) -> list[np.ndarray]:
        """Of each block and head, the attention from what the head reads; 1: all tokens alike.

        [heads, rows, columns] of the sentences that the class token looks at, or of the averages
        that PyramidTNT's sentences look at, as their mean.
        """
        if self.has_class_token:
            own = [x[:, 0, 1:].reshape(-1, *self.grid) for x in self.outer_attention]
        else:
            own = [
                x.mean(axis=1).reshape(-1, *reduced(self.layouts[i]))
                for i, x in enumerate(self.outer_attention)
            ]
        return [x * full.shape[-1] for x, full in zip(own, self.outer_attention, strict=True)]

    def reached(self) -> np.ndarray:
        """How much of each sentence of the first block is in what the head reads, after each block.

        [L, rows, columns], by `rollout`. In PyramidTNT's, attending to an average is attending to
        all its sentences alike, and what a convolution merges is the mean of 2x2 sentences.
        """
        if self.has_class_token:
            return rollout(self.outer_attention)[:, 0, 1:].reshape(-1, *self.grid)
        total, before, maps = np.eye(int(np.prod(self.grid)), dtype=np.float32), self.grid, []
        for i, attention in enumerate(self.outer_attention):
            grid, _, ratio = self.layouts[i]
            if grid != before:
                total = means(before, 2, grid) @ total
            attended = means(grid, ratio, reduced(self.layouts[i])) @ total
            total = after(attention, attended, total)
            before = grid
            maps.append(total.mean(axis=0).reshape(self.grid))
        return np.stack(maps)


def reduced(layout: BlockLayout) -> Grid:
    """Returns the grid of the averages that a block attends to."""
    return layout.grid[0] // layout.reduction, layout.grid[1] // layout.reduction


def means(grid: Grid, side: int, squares: Grid) -> np.ndarray:
    """The matrix [squares, sentences of `grid`] that takes their means in squares of `side`."""
    rows, columns = np.indices(grid) // side
    square = np.where(columns < squares[1], rows * squares[1] + columns, -1)
    members = square.ravel() == np.arange(np.prod(squares))[:, None]
    return members.astype(np.float32) / members.sum(axis=1, keepdims=True)


def look(found: LoadedWeights, images: np.ndarray) -> list[Look]:
    """Runs the network on images uint8 [B, S, S, 3], as `prepare` gives them."""
    model, variables = found.network.model, found.variables
    mean, std = (tuple(found.preprocessing[key]) for key in ("mean", "std"))
    run = jax.jit(lambda v, x: block_outputs(model, v, normalize(x, mean, std)))
    blocks = jax.device_get(run(variables, images))
    probabilities = [None] * len(images)
    if model.num_classes:
        predict = jax.jit(step.make_predict_step(model, mean=mean, std=std))
        probabilities = np.asarray(predict(variables, images))
    read = [(i, block) for i, block in enumerate(blocks) if "inner_attention" in block]
    return [
        Look(
            image,
            model.block_layouts(found.network.grid),
            model.has_class_token,
            [block["outer_attention"][row] for block in blocks],
            {i: block["inner_attention"][row] for i, block in read},
            [block["sentences"][row] for block in blocks],
            {i: block["words"][row] for i, block in read},
            probabilities[row],
        )
        for row, image in enumerate(images)
    ]


def prepare(found: LoadedWeights, image: str | os.PathLike) -> np.ndarray:
    """An image file as the evaluation of these weights takes it, uint8 [S, S, 3].

    Raises:
        InputError: it cannot be read.
    """
    size = found.network.image_size
    try:
        encoded = pathlib.Path(image).read_bytes()
        return eval_transform(
            encoded, size=size, crop_fraction=found.preprocessing["crop_fraction"]
        )
    except OSError as error:
        raise InputError(f"cannot read the image {image}: {error.strerror or error}") from None
    except CorruptImageError as error:
        raise InputError(f"{image} is not a usable image: {error}") from None


def rollout(attention: Sequence[np.ndarray]) -> np.ndarray:
    """How much of each input token is in each token, after every block: [L, T, T], rows sum to 1.

    `attention` is [heads, T, T] of each of L blocks. Abnar and Zuidema (2020): the mean of the
    heads, half of it identity for the skip connection, multiplied through the blocks.
    """
    total = np.eye(attention[0].shape[-1], dtype=np.float32)
    totals = []
    for block in attention:
        total = after(block, total, total)
        totals.append(total)
    return np.stack(totals)


def after(attention: np.ndarray, attended: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The tokens after a block: half what the mean of the heads attends to, half what they were."""
    return (attention.mean(axis=0) @ attended + tokens) / 2


def most_read(seen: Look, number: int) -> list[int]:
    """The sentences of the first block of which most reaches the head, most first.

    PyramidTNT attends to squares of them as one: the middle of each sentence of the last block.
    """
    last = len(seen.sentences) - 1
    grid, side, _ = seen.layouts[last]
    weight = means(seen.grid, side, grid) @ seen.reached()[-1].ravel()
    best = np.unravel_index(np.argsort(-weight, kind="stable")[:number], grid)
    rows, columns = (
        np.minimum(i * side + side // 2, n - 1) for i, n in zip(best, seen.grid, strict=True)
    )
    return (rows * seen.grid[1] + columns).tolist()


def similarity(vectors: np.ndarray) -> np.ndarray:
    """Cosines between the rows of [K, D], about their mean, which all of them share: [K, K]."""
    vectors = vectors - vectors.mean(axis=0)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors @ vectors.T


def principal_colors(depths: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The three principal components of tokens [..., width] as colours [..., 3], at each depth.

    Components have neither order nor sign that would hold from one depth to the next, so each depth
    is turned to look like the one before (orthogonal Procrustes). From one depth to the next,
    tokens that make up a picture may become fewer.
    """
    colors, before = [], None
    for shape, tokens in ((x.shape[:-1], x.reshape(-1, x.shape[-1])) for x in depths):
        tokens = tokens - tokens.mean(axis=0)
        left, sizes, _ = np.linalg.svd(tokens.astype(np.float64), full_matrices=False)
        scores = np.zeros((len(tokens), 3))  # narrow words, few sentences: fewer than three
        scores[:, : left.shape[1]] = (left * sizes)[:, :3]
        if before is not None:
            for axis, size in enumerate(shape):  # those in the same places
                before = before.take(np.arange(size) * before.shape[axis] // size, axis)
            first, _, second = np.linalg.svd(scores.T @ before.reshape(-1, 3))
            scores = scores @ (first @ second)
        before = scores.reshape(*shape, 3)
        low, high = np.percentile(scores, [2, 98], axis=0)
        colors.append(np.clip((before - low) / np.maximum(high - low, 1e-12), 0, 1))
    return colors


def mosaic(maps: np.ndarray, zoom: int = 4) -> np.ndarray:
    """Maps [r, c, R, C] as one picture, each in its place: `zoom` pixels a value, NaN between."""
    maps = maps.astype(np.float32).repeat(zoom, axis=2).repeat(zoom, axis=3)
    maps = np.pad(maps, ((0, 0), (0, 0), (0, 2), (0, 2)), constant_values=np.nan)
    rows, columns, height, width = maps.shape
    return maps.swapaxes(1, 2).reshape(rows * height, columns * width)[:-2, :-2]


def words_in_place(values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Of every word, [N, m * m, ...], as a picture: [rows * m, columns * m, ...]."""
    rows, columns = grid
    side = round(values.shape[1] ** 0.5)
    rest: tuple[Any, ...] = values.shape[2:]
    picture = values.reshape(rows, columns, side, side, *rest).swapaxes(1, 2)
    return picture.reshape(rows * side, columns * side, *rest)
