# SPDX-License-Identifier: Apache-2.0
"""Augmentation on the device, inside the compiled step: mixup and cutmix, `normalize`, `erase`.

The host sends uint8 pixels, a quarter of the bytes of float32; `tnt_flax.data` augments them first.
Source: timm 0.3.2, with which TNT was trained: FastCollateMixup in batch mode and RandomErasing in
pixel mode.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num, UInt8

ERASE_TRIES = 10


class Mix(NamedTuple):
    """Mixing weights and boxes of G groups of images.

    The partner of image i in a group of n images is image n - 1 - i.
    """

    blend: Float[Array, "G"]  # weight of the image's own pixels outside the box: mixup
    box: Int[Array, "G 4"]  # top, bottom, left, right of the partner's pixels: cutmix


def functions(options: Any) -> dict[str, Callable[..., Any] | None]:
    """Returns the arguments `mix` and `erase` of `step.make_augment`.

    `options` is `config.augment`, without its type: predictions need no ml_collections.
    """
    mixes = options.mixup_alpha or options.cutmix_alpha
    mix_images = functools.partial(
        mix,
        groups=options.mix_groups,
        mixup_alpha=options.mixup_alpha,
        cutmix_alpha=options.cutmix_alpha,
        prob=options.mix_prob,
        switch_prob=options.mix_switch_prob,
    )
    prob, area, ratio = options.erase_prob, options.erase_area, options.erase_ratio
    erase_boxes = functools.partial(erase, prob=prob, area=area, ratio=ratio)
    return {"mix": mix_images if mixes else None, "erase": erase_boxes if prob else None}


def mix(
    key: Key[Array, ""],
    images: UInt8[Array, "B H W 3"],
    targets: Float[Array, "B K"],
    *,
    groups: int,
    **options: float,
) -> tuple[UInt8[Array, "B H W 3"], Float[Array, "B K"]]:
    """Applies mixup or cutmix, with one sample of `sample_mix` for each of `groups` groups.

    A group is B / groups consecutive rows of the global batch, on any number of devices;
    `groups` must divide B.
    """
    sampled = sample_mix(key, groups, *images.shape[1:3], **options)
    return apply_mix(images, targets, sampled)


def sample_mix(
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
    """Samples for each group: mixed with `prob`, then by cutmix with `switch_prob`, else mixup.

    An alpha of 0 disables that method, and `switch_prob` has no effect. The weight, Beta(alpha,
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
    """Returns top, bottom, left, right of a box with the fraction 1 - lam of the image's area.

    Sides are rounded down to even numbers, as published (later timm versions keep odd ones), and
    the box is clipped at the edges of the image.
    """
    sides = []
    for center, size in ((center_y, height), (center_x, width)):
        half = (size * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
        sides += [jnp.clip(center - half, 0, size), jnp.clip(center + half, 0, size)]
    return jnp.stack(sides, axis=1)


def apply_mix(
    images: UInt8[Array, "B H W 3"], targets: Float[Array, "B K"], sampled: Mix
) -> tuple[UInt8[Array, "B H W 3"], Float[Array, "B K"]]:
    """Mixes images with their partners, and targets by the share of own pixels.

    Pixels are rounded, halves to even.
    """
    batch, height, width, _ = images.shape
    groups = len(sampled.blend)
    group = jnp.arange(batch) // (batch // groups)  # of each image
    # Indexing keeps the samples replicated.
    blend, box = sampled.blend[group], sampled.box[group]
    top, bottom, left, right = box.T
    lam = blend * (1 - (bottom - top) * (right - left) / (height * width))
    weight = jnp.where(inside(box, height, width), 0.0, blend[:, None, None])
    mixed = weigh(images, weight[..., None], groups)
    return jnp.rint(mixed).astype(jnp.uint8), weigh(targets, lam[:, None], groups)


def weigh(
    x: Num[Array, "B *rest"], weight: Float[Array, "B *ones"], groups: int
) -> Float[Array, "B *rest"]:
    """Returns weight * x + (1 - weight) * partners of x.

    Groups within one device need no data of other devices.
    """
    partners = x.reshape(groups, -1, *x.shape[1:])[:, ::-1].reshape(x.shape)
    return x.astype(jnp.float32) * weight + partners.astype(jnp.float32) * (1 - weight)


def normalize(
    images: UInt8[Array, "B H W 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B H W 3"]:
    """Normalizes pixels 0..255 by `mean` and `std`, per channel, for pixels scaled to [0, 1]."""
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
    """Replaces one box in a fraction `prob` of the normalized images by N(0, 1) noise."""
    box_key, noise_key = jax.random.split(key)
    batch, height, width, _ = images.shape
    boxes = sample_boxes(box_key, batch, height, width, prob=prob, area=area, ratio=ratio)
    noise = jax.random.normal(noise_key, images.shape)
    return jnp.where(inside(boxes, height, width)[..., None], noise, images)


def sample_boxes(
    key: Key[Array, ""],
    batch: int,
    height: int,
    width: int,
    *,
    prob: float,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> Int[Array, "{batch} 4"]:
    """Samples top, bottom, left, right of the box to erase in each image; empty with 1 - `prob`.

    `area` is the range of the box's area as a fraction of the image, uniform. `ratio` is that of
    height / width, uniform in its logarithm.
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
    """Returns height and width of the first of T boxes that is smaller than the image, or zeros."""
    pixels = areas * (height * width)
    h, w = jnp.rint(jnp.sqrt(pixels * ratios)), jnp.rint(jnp.sqrt(pixels / ratios))
    fits = (h < height) & (w < width)
    first = fits & (jnp.cumsum(fits, axis=1) == 1)
    return jnp.sum(jnp.stack([h, w]), axis=2, where=first[None]).astype(jnp.int32)


def inside(boxes: Int[Array, "N 4"], height: int, width: int) -> Bool[Array, "N {height} {width}"]:
    """Returns True for the pixels of each box; bottom and right are exclusive."""
    top, bottom, left, right = boxes.T[..., None]
    y, x = jnp.arange(height)[None], jnp.arange(width)[None]
    rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)
    return rows[:, :, None] & columns[:, None, :]
