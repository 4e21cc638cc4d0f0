# SPDX-License-Identifier: Apache-2.0
"""From pixels to visual words: the first layer of TNT. Shape letters: `tnt_flax.models.tnt`."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Images = Float[Array, "B H W channels"]
Words = Float[Array, "B N M C"]

KERNEL = (7, 7)  # the window of a word overlaps its neighbours'
PADDING = ((3, 3), (3, 3))  # torch's padding=3; "SAME" would shift every window by two pixels


def torch_conv_init(fan_in: int) -> Callable[..., Array]:
    """torch's default for Conv2d, which the official code leaves in place: U(+-fan_in**-.5)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


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
        conv = nn.Conv(
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
        if self.conv_first:  # over the whole image, so that words see across patch borders
            words = cut_patches(conv(images), self.patch_size // self.stride)
        else:  # every patch alone, with zeros around it
            patches = cut_patches(images, self.patch_size)
            batch, sentences = patches.shape[:2]
            words = conv(patches.reshape(batch * sentences, *patches.shape[2:]))
            words = words.reshape(batch, sentences, *words.shape[1:])
        return words.reshape(*words.shape[:2], words.shape[2] * words.shape[3], self.inner_dim)


def cut_patches(x: Array, size: int) -> Array:
    """(B, H, W, c) to (B, N, size, size, c), patches in raster order."""
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size
    x = x.reshape(batch, rows, size, columns, size, channels)
    return x.swapaxes(2, 3).reshape(batch, rows * columns, size, size, channels)
