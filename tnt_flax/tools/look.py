# SPDX-License-Identifier: Apache-2.0
"""What a network makes of one image: everything that the pictures show, as arrays."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tnt_flax import steps
from tnt_flax.augment import normalize
from tnt_flax.convert.checkpoints import Checkpoint
from tnt_flax.data.transforms import CorruptImageError, eval_transform
from tnt_flax.errors import InputError
from tnt_flax.models import block_outputs


class Look(NamedTuple):
    """One image of S x S pixels, seen by a network of L blocks; N = rows * columns sentences."""

    pixels: np.ndarray  # uint8 [S, S, 3], as the network got them, before normalization
    grid: tuple[int, int]  # (rows, columns) of the sentences
    outer_attention: np.ndarray  # [L, heads, N + 1, N + 1], class token first
    inner_attention: dict[int, np.ndarray]  # block -> [N, heads, M, M]; no blocks without words
    sentences: np.ndarray  # [L, N + 1, D]
    words: dict[int, np.ndarray]  # block -> [N, M, C]; likewise
    probabilities: np.ndarray | None  # [classes]; None of a network without a head


def look(found: Checkpoint, images: np.ndarray) -> list[Look]:
    """Runs the network on images uint8 [B, S, S, 3], as `prepare` gives them."""
    model, variables = found.network.model, {"params": found.params}
    mean, std = (tuple(found.preprocessing[key]) for key in ("mean", "std"))
    run = jax.jit(lambda v, x: block_outputs(model, v, normalize(x, mean, std)))
    blocks = jax.device_get(run(variables, images))
    probabilities = [None] * len(images)
    if model.num_classes:
        predict = jax.jit(steps.make_predict_step(model, mean=mean, std=std))
        probabilities = np.asarray(predict(found.params, images))
    read = [(i, block) for i, block in enumerate(blocks) if "inner_attention" in block]
    return [
        Look(
            image,
            found.network.grid,
            np.stack([block["outer_attention"][row] for block in blocks]),
            {i: block["inner_attention"][row] for i, block in read},
            np.stack([block["sentences"][row] for block in blocks]),
            {i: block["words"][row] for i, block in read},
            probabilities[row],
        )
        for row, image in enumerate(images)
    ]


def prepare(found: Checkpoint, image: str | os.PathLike) -> np.ndarray:
    """An image file as the evaluation of these weights takes it, uint8 [S, S, 3].

    Raises:
        InputError: it cannot be read.
    """
    size = found.network.grid[0] * found.network.model.patch_size
    try:
        encoded = pathlib.Path(image).read_bytes()
        return eval_transform(
            encoded, size=size, crop_fraction=found.preprocessing["crop_fraction"]
        )
    except OSError as error:
        raise InputError(f"cannot read the image {image}: {error.strerror or error}") from None
    except CorruptImageError as error:
        raise InputError(f"{image} is not a usable image: {error}") from None


def rollout(attention: np.ndarray) -> np.ndarray:
    """How much of each input token is in each token, after every block: [L, T, T], rows sum to 1.

    `attention` is [L, heads, T, T]. Abnar and Zuidema (2020): the mean of the heads, half of it
    identity for the skip connection, multiplied through the blocks.
    """
    total = np.eye(attention.shape[-1], dtype=np.float32)
    totals = []
    for block in attention.mean(axis=1):
        total = (block + np.eye(len(block), dtype=np.float32)) / 2 @ total
        totals.append(total)
    return np.stack(totals)


def most_read(seen: Look, number: int) -> list[int]:
    """The sentences of which most is in the class token at the end, most first."""
    weight = rollout(seen.outer_attention)[-1, 0, 1:]
    return np.argsort(-weight, kind="stable")[:number].tolist()


def similarity(vectors: np.ndarray) -> np.ndarray:
    """Cosines between the rows of [K, D], about their mean, which all of them share: [K, K]."""
    vectors = vectors - vectors.mean(axis=0)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors @ vectors.T


def principal_colors(depths: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The three principal components of tokens [K, width] as colours [K, 3], at each depth.

    Components have neither order nor sign that would hold from one depth to the next, so each depth
    is turned to look like the one before (orthogonal Procrustes).
    """
    colors, before = [], None
    for tokens in depths:
        tokens = tokens - tokens.mean(axis=0)
        left, sizes, _ = np.linalg.svd(tokens.astype(np.float64), full_matrices=False)
        scores = np.zeros((len(tokens), 3))  # narrow words, few sentences: fewer than three
        scores[:, : left.shape[1]] = (left * sizes)[:, :3]
        if before is not None:
            first, _, second = np.linalg.svd(scores.T @ before)
            scores = scores @ (first @ second)
        before = scores
        low, high = np.percentile(scores, [2, 98], axis=0)
        colors.append(np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1))
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
