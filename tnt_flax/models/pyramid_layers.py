# SPDX-License-Identifier: Apache-2.0
"""What PyramidTNT has besides transformers: its stem, and how sentences and words become fewer.

Shape letters: `tnt_flax.models.pyramid_tnt`.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_flax.models.batch_norm import BatchNorm
from tnt_flax.models.layers import LayerNorm
from tnt_flax.models.word_embedding import Images, Words, cut_patches

SIDE = 4  # words, each side of a sentence

Grid = tuple[int, int]  # rows and columns of sentences
Sentences = Float[Array, "B N D"]
Maps = Float[Array, "B h w C"]

Conv3x3 = functools.partial(
    nn.Conv,
    kernel_size=(3, 3),
    padding=((1, 1), (1, 1)),  # torch's padding=1; "SAME" would shift windows of stride 2
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
)


class ConvNormReLU(nn.Module):
    """3x3 convolution, BatchNorm and ReLU; the stem is five of them."""

    features: int
    stride: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images, *, train: bool) -> Maps:
        x = Conv3x3(self.features, strides=self.stride, dtype=self.dtype, name="conv")(x)
        return nn.relu(BatchNorm(self.dtype, name="batch_norm")(x, train=train))


class Stem(nn.Module):
    """Images (B, H, W, channels) to words (B, N, M, C) and sentences (B, N, D)."""

    outer_dim: int
    inner_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Images, *, train: bool) -> tuple[Words, Sentences]:
        conv = functools.partial(ConvNormReLU, dtype=self.dtype)
        shared = conv(2 * self.inner_dim, 2, name="shared")(images, train=train)
        words = conv(self.inner_dim, 1, name="words")(shared, train=train)
        words = cut_patches(words, SIDE)
        words = words.reshape(*words.shape[:2], SIDE * SIDE, self.inner_dim)
        x = conv(4 * self.inner_dim, 2, name="sentences_0")(shared, train=train)
        x = conv(8 * self.inner_dim, 2, name="sentences_1")(x, train=train)
        x = conv(self.outer_dim, 1, name="sentences_2")(x, train=train)
        return words, x.reshape(x.shape[0], -1, self.outer_dim)


class Merge(nn.Module):
    """Norm of tokens, then a 3x3 convolution of stride 2 over the pictures that they make up."""

    features: int
    to_pictures: Callable[[Array], Array]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "B N *words W"]
    ) -> Float[Array, "pictures rows columns C"]:
        x = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(tokens)
        conv = Conv3x3(self.features, strides=2, dtype=self.dtype, name="conv")
        return conv(self.to_pictures(x))


def tiles(words: Words, grid: Grid) -> Float[Array, "tiles rows columns C"]:
    """The words of every 2x2 sentences as one picture; zeros where a row or column is missing."""
    batch, (rows, columns), width = words.shape[0], grid, words.shape[-1]
    x = words.reshape(batch, rows, columns, SIDE, SIDE, width)
    x = jnp.pad(x, ((0, 0), (0, rows % 2), (0, columns % 2), (0, 0), (0, 0), (0, 0)))
    x = x.reshape(batch, -(-rows // 2), 2, -(-columns // 2), 2, SIDE, SIDE, width)
    x = x.transpose(0, 1, 3, 2, 5, 4, 6, 7)  # which sentence, then which word, of rows and columns
    return x.reshape(-1, 2 * SIDE, 2 * SIDE, width)


class Averages(nn.Module):
    """The means of squares of sentences, projected: (B, N, D) to (B, K, D).

    Rows and columns that fill no square are left out.
    """

    ratio: int
    grid: Grid
    dense: Callable[..., nn.Module]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Sentences) -> Float[Array, "B K D"]:
        batch, _, width = x.shape
        square = (self.ratio, self.ratio)
        x = x.reshape(batch, *self.grid, width)
        x = nn.avg_pool(x, window_shape=square, strides=square)
        x = self.dense(width, dtype=self.dtype, name="dense")(x.reshape(batch, -1, width))
        return LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x)
