# SPDX-License-Identifier: Apache-2.0
"""Attention and features of a network on one image, as arrays; `tools.figures` plots them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tnt_flax.models import block_outputs
from tnt_flax.models.network import BlockLayout, Grid
from tnt_flax.training import step
from tnt_flax.training.mixup import normalize
from tnt_flax.weights.read import LoadedWeights


class Trace(NamedTuple):
    """Activations of a network on one image of H x W pixels. Lists have one entry per block.

    A block has N = rows * columns sentences. TNT prepends a class token: T = K = N + 1 tokens.
    PyramidTNT has none: its T = N sentences attend to K averages of sentences.
    """

    pixels: np.ndarray  # uint8 [H, W, 3], input of the network before normalization
    layouts: list[BlockLayout]
    has_class_token: bool
    outer_attention: list[np.ndarray]  # [heads, T, K]
    inner_attention: dict[int, np.ndarray]  # block -> [N, heads, M, M]; blocks with words only
    sentences: list[np.ndarray]  # [T, D]
    words: dict[int, np.ndarray]  # block -> [N, M, C]; blocks with words only
    probabilities: np.ndarray | None  # [classes]; None without a head

    @property
    def readout_name(self) -> str:
        """Name of the head's input, for captions."""
        return "the class token" if self.has_class_token else "the mean of the sentences"

    @property
    def grid(self) -> Grid:
        """Grid of the first block."""
        return self.layouts[0].grid

    def grid_of(self, block: int) -> Grid:
        return self.layouts[block].grid

    def enclosing_sentence(self, block: int, sentence: int) -> int:
        """Returns the sentence of a block that contains a sentence of the first block."""
        side = self.layouts[block].side
        row, column = divmod(sentence, self.grid[1])
        return row // side * self.grid_of(block)[1] + column // side

    def sentence_maps(self) -> list[np.ndarray]:
        """Returns the sentences of each block, without the class token: [rows, columns, D]."""
        own = [x[int(self.has_class_token) :] for x in self.sentences]
        return [x.reshape(*self.grid_of(i), -1) for i, x in enumerate(own)]

    def attention_maps(self) -> list[np.ndarray]:
        """Returns the attention of the head's input in each block, relative to uniform attention.

        Each is [heads, rows, columns]: of the class token to the sentences, or for PyramidTNT the
        mean over all sentences of their attention to the averaged sentences.
        """
        if self.has_class_token:
            own = [x[:, 0, 1:].reshape(-1, *self.grid) for x in self.outer_attention]
        else:
            own = [
                x.mean(axis=1).reshape(-1, *averaged_grid(self.layouts[i]))
                for i, x in enumerate(self.outer_attention)
            ]
        return [x * full.shape[-1] for x, full in zip(own, self.outer_attention, strict=True)]

    def rollout_maps(self) -> np.ndarray:
        """Returns the share of each input sentence in the head's input after each block.

        [L, rows, columns], by `rollout`. For PyramidTNT, attention to an average is spread evenly
        over its sentences, and patch merging is approximated by 2x2 averaging.
        """
        if self.has_class_token:
            return rollout(self.outer_attention)[:, 0, 1:].reshape(-1, *self.grid)
        total, before, maps = np.eye(int(np.prod(self.grid)), dtype=np.float32), self.grid, []
        for i, attention in enumerate(self.outer_attention):
            grid, _, ratio = self.layouts[i]
            if grid != before:
                total = averaging_matrix(before, 2, grid) @ total
            attended = averaging_matrix(grid, ratio, averaged_grid(self.layouts[i])) @ total
            total = after_block(attention, attended, total)
            before = grid
            maps.append(total.mean(axis=0).reshape(self.grid))
        return np.stack(maps)


def averaged_grid(layout: BlockLayout) -> Grid:
    """Returns the grid of the averages that a block attends to."""
    return layout.grid[0] // layout.reduction, layout.grid[1] // layout.reduction


def averaging_matrix(grid: Grid, side: int, squares: Grid) -> np.ndarray:
    """Returns the matrix [squares, sentences] that averages a grid in squares of `side`."""
    rows, columns = np.indices(grid) // side
    square = np.where(columns < squares[1], rows * squares[1] + columns, -1)
    members = square.ravel() == np.arange(np.prod(squares))[:, None]
    return members.astype(np.float32) / members.sum(axis=1, keepdims=True)


def trace_attention(found: LoadedWeights, images: np.ndarray) -> list[Trace]:
    """Runs the network on uint8 images [B, H, W, 3]; returns one Trace each."""
    return Tracer(found)(images)


class Tracer:
    """`trace_attention` for several calls, compiled once per number of images.

    Args:
        found: the weights.
        variables: those of `found` on a device, where they stay between calls.
    """

    def __init__(self, found: LoadedWeights, variables: Any = None):
        self._network = found.network
        self._variables = found.variables if variables is None else variables
        model = found.network.model
        mean, std = (tuple(found.preprocessing[key]) for key in ("mean", "std"))
        self._run = jax.jit(lambda v, x: block_outputs(model, v, normalize(x, mean, std)))
        self._predict = jax.jit(step.make_predict_step(model, mean=mean, std=std))

    def __call__(self, images: np.ndarray) -> list[Trace]:
        model = self._network.model
        blocks = jax.device_get(self._run(self._variables, images))
        probabilities = [None] * len(images)
        if model.num_classes:
            probabilities = np.asarray(self._predict(self._variables, images))
        read = [(i, block) for i, block in enumerate(blocks) if "inner_attention" in block]
        return [
            Trace(
                image,
                model.block_layouts(self._network.grid),
                model.has_class_token,
                [block["outer_attention"][row] for block in blocks],
                {i: block["inner_attention"][row] for i, block in read},
                [block["sentences"][row] for block in blocks],
                {i: block["words"][row] for i, block in read},
                probabilities[row],
            )
            for row, image in enumerate(images)
        ]


def rollout(attention: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the share of each input token in each token after every block: [L, T, T].

    Attention rollout (Abnar and Zuidema, 2020): the product over blocks of the mean over heads,
    averaged with the identity for the skip connection. Rows sum to 1.

    Args:
        attention: [heads, T, T] of each of L blocks.
    """
    total = np.eye(attention[0].shape[-1], dtype=np.float32)
    totals = []
    for block in attention:
        total = after_block(block, total, total)
        totals.append(total)
    return np.stack(totals)


def after_block(attention: np.ndarray, attended: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Returns one step of `rollout`: the mean of attended tokens and the tokens themselves."""
    return (attention.mean(axis=0) @ attended + tokens) / 2


def most_attended(trace: Trace, number: int) -> list[int]:
    """Returns the sentences of the first block with the largest share in the head's input.

    A sentence of PyramidTNT's last block covers a square of them; its middle is returned.
    """
    last = len(trace.sentences) - 1
    grid, side, _ = trace.layouts[last]
    weight = averaging_matrix(trace.grid, side, grid) @ trace.rollout_maps()[-1].ravel()
    best = np.unravel_index(np.argsort(-weight, kind="stable")[:number], grid)
    rows, columns = (
        np.minimum(i * side + side // 2, n - 1) for i, n in zip(best, trace.grid, strict=True)
    )
    return (rows * trace.grid[1] + columns).tolist()


def similarity(vectors: np.ndarray) -> np.ndarray:
    """Returns cosine similarities [K, K] of the rows of [K, D] after subtracting their mean."""
    vectors = vectors - vectors.mean(axis=0)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors @ vectors.T


def principal_colors(depths: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Maps tokens [..., width] to colors [..., 3] by their first three principal components.

    Order and sign of principal components are arbitrary, so each depth is rotated to match the one
    before (orthogonal Procrustes). The token grid may shrink from one depth to the next.
    """
    colors, before = [], None
    for shape, tokens in ((x.shape[:-1], x.reshape(-1, x.shape[-1])) for x in depths):
        tokens = tokens - tokens.mean(axis=0)
        left, sizes, _ = np.linalg.svd(tokens.astype(np.float64), full_matrices=False)
        scores = np.zeros((len(tokens), 3))  # with few or narrow tokens there are fewer than three
        scores[:, : left.shape[1]] = (left * sizes)[:, :3]
        if before is not None:
            for axis, size in enumerate(shape):  # tokens at the same position
                before = before.take(np.arange(size) * before.shape[axis] // size, axis)
            first, _, second = np.linalg.svd(scores.T @ before.reshape(-1, 3))
            scores = scores @ (first @ second)
        before = scores.reshape(*shape, 3)
        low, high = np.percentile(scores, [2, 98], axis=0)
        colors.append(np.clip((before - low) / np.maximum(high - low, 1e-12), 0, 1))
    return colors


def tile(maps: np.ndarray, zoom: int = 4) -> np.ndarray:
    """Tiles maps [r, c, R, C] into one image: `zoom` pixels per value, NaN between tiles."""
    maps = maps.astype(np.float32).repeat(zoom, axis=2).repeat(zoom, axis=3)
    maps = np.pad(maps, ((0, 0), (0, 0), (0, 2), (0, 2)), constant_values=np.nan)
    rows, columns, height, width = maps.shape
    return maps.swapaxes(1, 2).reshape(rows * height, columns * width)[:-2, :-2]


def words_in_place(values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Arranges values of words [N, m * m, ...] by position: [rows * m, columns * m, ...]."""
    rows, columns = grid
    side = round(values.shape[1] ** 0.5)
    rest: tuple[Any, ...] = values.shape[2:]
    arranged = values.reshape(rows, columns, side, side, *rest).swapaxes(1, 2)
    return arranged.reshape(rows * side, columns * side, *rest)
