# SPDX-License-Identifier: Apache-2.0
"""What happens to a batch of pixels on the device, inside the compiled step.

The host ships uint8 (a quarter of the bytes of float32); see `tnt_flax.data` for its half. Here, in
this order: mixup and cutmix on uint8 pixels, `normalize`, `erase`. All of it is as TNT was trained,
by timm 0.3.2: FastCollateMixup in its batch mode, and RandomErasing in its pixel mode.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num, UInt8

ERASE_TRIES = 10


class Mix(NamedTuple):
    """How the images of each of G groups are mixed with their partners.

    An image's partner is the one as far from the end of their group as it is from the beginning.
    """

    blend: Float[Array, "G"]  # weight of an image's own pixels outside the box: mixup
    box: Int[Array, "G 4"]  # top, bottom, left, right of the pixels that the partner gives: cutmix


def mix(
    key: Key[Array, ""],
    images: UInt8[Array, "B H W 3"],
    targets: Float[Array, "B K"],
    *,
    groups: int,
    **options: float,
) -> tuple[UInt8[Array, "B H W 3"], Float[Array, "B K"]]:
    """Mixup or cutmix with one draw (see `draw_mix`) for each of `groups` groups of images.

    They are consecutive rows of the global batch, whatever devices there are. `groups` divides B.
    """
    drawn = draw_mix(key, groups, *images.shape[1:3], **options)
    return apply_mix(images, targets, drawn)


def draw_mix(
    key: Key[Array, ""],
    groups: int,
    height: int,
    width: int,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    prob: float,
    switch_prob: float,
) -> Mix:
    """One draw for each group: with `prob` mix at all, then with `switch_prob` cutmix, not mixup.

    An alpha of 0 leaves that one out; the other then needs no switch. The weight, Beta(alpha,
    alpha), is rounded to a multiple of 2^-16: its products with pixels are exact in float32, so
    that mixed pixels are the same whether or not a compiler fuses the multiplication and the sum.
    """
    keys = jax.random.split(key, 5)
    cutmix_prob = switch_prob if mixup_alpha and cutmix_alpha else float(cutmix_alpha > 0)
    is_cutmix = jax.random.bernoulli(keys[0], cutmix_prob, (groups,))
    alpha = jnp.where(is_cutmix, cutmix_alpha, mixup_alpha)
    lam = jnp.rint(jax.random.beta(keys[1], alpha, alpha, (groups,)) * 2**16) / 2**16
    lam = jnp.where(jax.random.bernoulli(keys[2], prob, (groups,)), lam, 1.0)
    center_y = jax.random.randint(keys[3], (groups,), 0, height)
    center_x = jax.random.randint(keys[4], (groups,), 0, width)
    box = cut_box(jnp.where(is_cutmix, lam, 1.0), center_y, center_x, height, width)
    return Mix(jnp.where(is_cutmix, 1.0, lam), box)


def cut_box(
    lam: Float[Array, "G"],
    center_y: Int[Array, "G"],
    center_x: Int[Array, "G"],
    height: int,
    width: int,
) -> Int[Array, "G 4"]:
    """Top, bottom, left, right of cutmix's box: 1 - lam of the image, but for rounding and edges.

    Its sides are even, as published; timm has since made odd ones a pixel longer.
    """
    sides = []
    for center, size in ((center_y, height), (center_x, width)):
        half = (size * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
        sides += [jnp.clip(center - half, 0, size), jnp.clip(center + half, 0, size)]
    return jnp.stack(sides, axis=1)


def apply_mix(
    images: UInt8[Array, "B H W 3"], targets: Float[Array, "B K"], drawn: Mix
) -> tuple[UInt8[Array, "B H W 3"], Float[Array, "B K"]]:
    """Pixels are rounded, halves to even; targets are weighted by what stayed of the image."""
    batch, height, width, _ = images.shape
    groups = len(drawn.blend)
    group = jnp.arange(batch) // (batch // groups)  # of each image; indexing keeps draws replicated
    blend, box = drawn.blend[group], drawn.box[group]
    top, bottom, left, right = box.T
    lam = blend * (1 - (bottom - top) * (right - left) / (height * width))
    weight = jnp.where(inside(box, height, width), 0.0, blend[:, None, None])
    mixed = weigh(images, weight[..., None], groups)
    return jnp.rint(mixed).astype(jnp.uint8), weigh(targets, lam[:, None], groups)


def weigh(
    x: Num[Array, "B *rest"], weight: Float[Array, "B *ones"], groups: int
) -> Float[Array, "B *rest"]:
    """weight * x + (1 - weight) * partners of x. Groups within one device need no other's data."""
    partners = x.reshape(groups, -1, *x.shape[1:])[:, ::-1].reshape(x.shape)
    return x.astype(jnp.float32) * weight + partners.astype(jnp.float32) * (1 - weight)


def normalize(
    images: UInt8[Array, "B H W 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B H W 3"]:
    """Scales pixels of 0..255 by `mean` and `std`, which are per channel and on the scale 0..1."""
    offset = np.asarray(mean, np.float32)[None, None, None] * 255
    scale = np.asarray(std, np.float32)[None, None, None] * 255
    return (images.astype(jnp.float32) - offset) / scale


def erase(
    key: Key[Array, ""],
    images: Float[Array, "B H W 3"],
    *,
    prob: float,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> Float[Array, "B H W 3"]:
    """Random erasing: one box in a share `prob` of the normalized images becomes N(0, 1) noise."""
    box_key, noise_key = jax.random.split(key)
    batch, height, width, _ = images.shape
    boxes = draw_boxes(box_key, batch, height, width, prob=prob, area=area, ratio=ratio)
    noise = jax.random.normal(noise_key, images.shape)
    return jnp.where(inside(boxes, height, width)[..., None], noise, images)


def draw_boxes(
    key: Key[Array, ""],
    batch: int,
    height: int,
    width: int,
    *,
    prob: float,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> Int[Array, "{batch} 4"]:
    """Top, bottom, left, right of the box to erase in each image, in 1 - `prob` of them empty.

    `area` bounds the share of the image, `ratio` height / width, of which the logarithm is uniform.
    """
    keys = jax.random.split(key, 5)
    tries = (batch, ERASE_TRIES)
    areas = jax.random.uniform(keys[0], tries, minval=area[0], maxval=area[1])
    low, high = map(math.log, ratio)
    ratios = jnp.exp(jax.random.uniform(keys[1], tries, minval=low, maxval=high))
    erased = jax.random.bernoulli(keys[2], prob, (1, batch))
    h, w = jnp.where(erased, first_fit(areas, ratios, height, width), 0)
    top = jax.random.randint(keys[3], (batch,), 0, height - h + 1)
    left = jax.random.randint(keys[4], (batch,), 0, width - w + 1)
    return jnp.stack([top, top + h, left, left + w], axis=1)


def first_fit(
    areas: Float[Array, "B T"], ratios: Float[Array, "B T"], height: int, width: int
) -> Int[Array, "2 B"]:
    """Height and width of the first of T boxes that is smaller than the image, or 0 and 0."""
    pixels = areas * (height * width)
    h, w = jnp.rint(jnp.sqrt(pixels * ratios)), jnp.rint(jnp.sqrt(pixels / ratios))
    fits = (h < height) & (w < width)
    first = fits & (jnp.cumsum(fits, axis=1) == 1)
    return jnp.sum(jnp.stack([h, w]), axis=2, where=first[None]).astype(jnp.int32)


def inside(boxes: Int[Array, "N 4"], height: int, width: int) -> Bool[Array, "N {height} {width}"]:
    """True from top to before bottom and from left to before right, for each box."""
    top, bottom, left, right = boxes.T[..., None]
    y, x = jnp.arange(height)[None], jnp.arange(width)[None]
    rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)
    return rows[:, :, None] & columns[:, None, :]
