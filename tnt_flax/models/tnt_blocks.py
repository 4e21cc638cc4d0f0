# SPDX-License-Identifier: Apache-2.0
"""The parts of TNT: stem, projection of words to sentences, block.

Letters in shapes are those of `tnt_flax.models.tnt`.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_flax.models.kernels.mixed_precision import add, matmul
from tnt_flax.models.layers import Bias, Dense, LayerNorm, MatmulFn
from tnt_flax.models.network import Images

Words = Float[Array, "B N M C"]
Sentences = Float[Array, "B T D"]  # T is N + 1, with the class token first, or N without one

WORD_KERNEL = (7, 7)  # windows of neighboring words overlap
WORD_PADDING = ((3, 3), (3, 3))  # torch's padding=3; "SAME" would shift every window


class WordEmbedding(nn.Module):
    """Maps images (B, H, W, channels) to words (B, N, M, C)."""

    inner_dim: int
    patch_size: int = 16
    stride: int = 4
    conv_first: bool = False
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Images) -> Words:
        init = torch_conv_init(images.shape[-1] * WORD_KERNEL[0] * WORD_KERNEL[1])
        common = dict(use_bias=self.use_bias, dtype=self.dtype, name="conv")
        if not self.conv_first:  # each patch separately, padded with zeros
            conv = PatchConv(self.inner_dim, self.stride, init, **common)
            return conv(cut_patches(images, self.patch_size))
        conv = nn.Conv(  # over the whole image: windows cross the borders of patches
            self.inner_dim,
            WORD_KERNEL,
            strides=self.stride,
            padding=WORD_PADDING,
            kernel_init=init,
            bias_init=init,
            **common,
        )
        words = cut_patches(conv(images), self.patch_size // self.stride)
        return words.reshape(*words.shape[:2], words.shape[2] * words.shape[3], self.inner_dim)


class PatchConv(nn.Module):
    """Convolves each patch separately, zero-padded: (B, N, size, size, channels) to (B, N, M, C).

    Has the parameters of nn.Conv. Computed as one matrix product with the kernel unfolded over a
    patch, several times faster than the convolution of thousands of small images.
    """

    features: int
    stride: int
    init: Callable[..., Array]
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, patches: Float[Array, "B N size size channels"]) -> Words:
        batch, sentences, size, _, channels = patches.shape
        kernel = self.param("kernel", self.init, (*WORD_KERNEL, channels, self.features))
        kernel = unfold_kernel(jnp.asarray(kernel), size, self.stride)
        num_words = kernel.shape[1]
        x = patches.reshape(batch * sentences, size * size * channels).astype(self.dtype)
        x = matmul(x, kernel.reshape(x.shape[1], num_words * self.features))
        x = x.reshape(batch, sentences, num_words, self.features)
        if not self.use_bias:
            return x
        bias = self.param("bias", self.init, (self.features,))
        return add(x, jnp.asarray(bias))


def unfold_kernel(kernel: Float[Array, "7 7 channels C"], size: int, stride: int) -> Array:
    """Returns the weights from pixels to words, (size * size * channels, M, C).

    For the word whose window starts at (y, x), `lax.pad` puts the 7x7 kernel at (y, x) of a
    size x size patch. A negative amount crops what crosses the patch's border.
    """
    before = WORD_PADDING[0][0]
    starts = [i * stride - before for i in range(-(-size // stride))]
    # (low, high, interior) of `lax.pad`.
    around = {start: (start, size - start - WORD_KERNEL[0], 0) for start in starts}
    keep = (0, 0, 0)  # channels and features are not padded
    windows = [
        jax.lax.pad(kernel, jnp.zeros((), kernel.dtype), [around[y], around[x], keep, keep])
        for y in starts
        for x in starts
    ]
    return jnp.stack(windows, axis=3).reshape(-1, len(windows), kernel.shape[-1])


def torch_conv_init(fan_in: int) -> Callable[..., Array]:
    """Returns torch's initializer of Conv2d, U(+-fan_in**-.5), as in the official code."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


def cut_patches(x: Array, size: int) -> Array:
    """Cuts (B, H, W, c) into (B, N, size, size, c), patches in raster order."""
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size
    x = x.reshape(batch, rows, size, columns, size, channels)
    return x.swapaxes(2, 3).reshape(batch, rows * columns, size, size, channels)


class WordsToSentences(nn.Module):
    """Projects the M words of every sentence to one vector: (B, N, M, C) to (B, N, D)."""

    outer_dim: int
    norm_each_word: bool = False  # LayerNorm over C; otherwise over M * C
    use_bias: bool = False
    norm_out: bool = True
    norm_eps: float = 1e-5
    dtype: DTypeLike = jnp.float32
    norm_layer: Callable[..., nn.Module] = LayerNorm
    matmul_fn: MatmulFn = matmul

    @nn.compact
    def __call__(self, words: Words) -> Float[Array, "B N D"]:
        norm = functools.partial(self.norm_layer, epsilon=self.norm_eps, dtype=self.dtype)
        dense = functools.partial(Dense, dtype=self.dtype, matmul_fn=self.matmul_fn)
        batch, sentences, num_words, width = words.shape
        flat = (batch, sentences, num_words * width)  # word 0's channels, word 1's, ...
        if self.norm_each_word:
            x = norm(name="norm1")(words).reshape(flat)
        else:
            x = norm(name="norm1")(words.reshape(flat))
        x = dense(self.outer_dim, use_bias=self.use_bias, name="dense")(x)
        return norm(name="norm2")(x) if self.norm_out else x


class TNTBlock(nn.Module):
    """Attends within sentences, adds words to their sentences, attends across sentences.

    Without `inner`, a plain transformer block that leaves the words alone (paper, Table 5). Sows
    words in the collection "intermediates" and sentences in "maps". They are two collections
    because capturing "intermediates" needs the reference implementation of both transformers.

    Args of the call:
        words: (B, N, M, C), or in the layout that `inner` and `proj` read.
        sentences: with or without a class token.
        drop_path_rate: rate of all updates of both transformers; None disables drop path.
        bias: [1, heads, T, K], added to the logits of the outer attention. K is T, or less if
            `outer` reduces the tokens that are attended to.
        num_queries: Q, the number of leading tokens that `outer` returns; None is all T.
        train: enables dropout.
    """

    inner: nn.Module | None  # a TransformerBlock, or another implementation
    proj: nn.Module  # a WordsToSentences, or another implementation
    outer: nn.Module  # a TransformerBlock

    @nn.compact
    def __call__(
        self,
        words: Array,
        sentences: Sentences,
        drop_path_rate: Float[Array, ""] | None,
        bias: Bias | None = None,
        *,
        num_queries: int | None = None,
        train: bool,
    ) -> tuple[Array, Float[Array, "B Q D"]]:
        if self.inner:
            words = self.inner(words, drop_path_rate, train=train)
            update = self.proj(words)
            if update.shape == sentences.shape:  # no class token, or `proj` returned all T tokens
                sentences = sentences + update
            else:  # Token 0 is the class token; "gpu" may pad by one token. Neither has words.
                sentences = sentences.at[:, 1 : 1 + update.shape[1]].add(update)
        sentences = self.outer(
            sentences, drop_path_rate, num_queries=num_queries, bias=bias, train=train
        )
        self.sow("intermediates", "words", words)
        self.sow("maps", "sentences", sentences)
        return words, sentences
