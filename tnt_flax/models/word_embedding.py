# SPDX-License-Identifier: Apache-2.0
"""From pixels to visual words: the first layer of TNT. Shape letters: `tnt_flax.models.tnt`."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_flax.models.kernels.mixed_precision import add, matmul

Images = Float[Array, "B H W channels"]
Words = Float[Array, "B N M C"]

KERNEL = (7, 7)  # the window of a word overlaps its neighbours'
PADDING = ((3, 3), (3, 3))  # torch's padding=3; "SAME" would shift every window by two pixels


def torch_conv_init(fan_in: int) -> Callable[..., Array]:
    """torch's default for Conv2d, which the official code leaves in place: U(+-fan_in**-.5)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


class PatchConv(nn.Module):
    """nn.Conv of every patch alone, zeros around it: (B, N, size, size, channels) to (B, N, M, C).

    Computed as one product with the kernel unfolded over a patch, several times faster than the
    convolution of thousands of small images; its parameters are those of nn.Conv.
    """

    features: int
    stride: int
    use_bias: bool
    init: Callable[..., Array]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, patches: Float[Array, "B N size size channels"]) -> Words:
        batch, sentences, size, _, channels = patches.shape
        kernel = self.param("kernel", self.init, (*KERNEL, channels, self.features))
        kernel = unfold(jnp.asarray(kernel), size, self.stride)
        num_words = kernel.shape[1]
        x = patches.reshape(batch * sentences, size * size * channels).astype(self.dtype)
        x = matmul(x, kernel.reshape(x.shape[1], num_words * self.features))
        x = x.reshape(batch, sentences, num_words, self.features)
        if not self.use_bias:
            return x
        bias = self.param("bias", self.init, (self.features,))
        return add(x, jnp.asarray(bias))


def unfold(kernel: Float[Array, "7 7 channels C"], size: int, stride: int) -> Array:
    """What every pixel of a patch adds to every word: (size * size * channels, M, C)."""
    (before, _), _ = PADDING
    starts = [i * stride - before for i in range(-(-size // stride))]
    around = {start: (start, size - start - KERNEL[0], 0) for start in starts}  # less than 0 cuts
    zero, rest = jnp.zeros((), kernel.dtype), [(0, 0, 0)] * 2
    windows = [
        jax.lax.pad(kernel, zero, [around[y], around[x], *rest]) for y in starts for x in starts
    ]
    return jnp.stack(windows, axis=3).reshape(-1, len(windows), kernel.shape[-1])


class WordEmbedding(nn.Module):
    """Reads the visual words of every patch: images (B, H, W, channels) to words (B, N, M, C)."""

    inner_dim: int
    patch_size: int = 16
    stride: int = 4
    conv_first: bool = False
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Images) -> Words:
        init = torch_conv_init(images.shape[-1] * KERNEL[0] * KERNEL[1])
        if not self.conv_first:  # every patch alone, with zeros around it
            conv = PatchConv(
                self.inner_dim, self.stride, self.use_bias, init, self.dtype, name="conv"
            )
            return conv(cut_patches(images, self.patch_size))
        conv = nn.Conv(  # over the whole image, so that words see across patch borders
            self.inner_dim,
            KERNEL,
            (self.stride, self.stride),
            PADDING,
            use_bias=self.use_bias,
            kernel_init=init,
            bias_init=init,
            dtype=self.dtype,
            name="conv",
        )
        words = cut_patches(conv(images), self.patch_size // self.stride)
        return words.reshape(*words.shape[:2], words.shape[2] * words.shape[3], self.inner_dim)


def cut_patches(x: Array, size: int) -> Array:
    """(B, H, W, c) to (B, N, size, size, c), patches in raster order."""
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size
    x = x.reshape(batch, rows, size, columns, size, channels)
    return x.swapaxes(2, 3).reshape(batch, rows * columns, size, size, channels)
