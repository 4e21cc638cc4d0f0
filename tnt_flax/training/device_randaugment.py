# SPDX-License-Identifier: Apache-2.0
"""RandAugment on the device, inside the compiled step: relieves the host of a third of its work.

Operations, their arguments and their distribution are those of `data.randaugment`; the random
numbers differ. They depend on the key and the row of the global batch alone. Every operation is
evaluated for all images and one result per image is selected, so that a batch sharded over devices
needs no communication. tests/training/test_device_randaugment.py bounds the differences from
Pillow's pixels: one level, except at the outline of moved images.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from tnt_flax.data import randaugment as pillow
from tnt_flax.data.randaugment import GEOMETRIC, PLAIN, RandAugment

Images = UInt8[Array, "B H W 3"]
ROUNDING = 1e-4  # before truncation: float32 positions, where Pillow has float64


class Calls(NamedTuple):
    """One operation per image, [B], or `num_ops` after each other, [n, B]."""

    op: Int[Array, "..."]  # index in RandAugment.ops; their number stands for no operation
    level: Float[Array, "..."]  # magnitude; both signs where the operation has two directions
    bicubic: Bool[Array, "..."]  # filter of geometric operations; else bilinear


def randaugment(key: Key[Array, ""], images: Images, policy: RandAugment) -> Images:
    """Applies `policy.num_ops` randomly sampled operations to each image, one after the other."""
    step = lambda images, calls: (apply_ops(images, calls, policy), None)
    return jax.lax.scan(step, images, sample(key, len(images), policy))[0]


def sample(key: Key[Array, ""], batch: int, augment: RandAugment) -> Calls:
    """Samples `num_ops` operations for each image, distributed as in `RandAugment.sample`."""
    keys = jax.random.split(key, 5)
    shape = (batch, augment.num_ops)  # in this order, a row does not depend on the batch size
    op = jax.random.randint(keys[0], shape, 0, len(augment.ops))
    if np.isinf(augment.magnitude_std):
        level = augment.magnitude * jax.random.uniform(keys[1], shape)
    else:
        level = augment.magnitude + augment.magnitude_std * jax.random.normal(keys[1], shape)
    level = jnp.clip(level, 0, augment.max_magnitude)
    signed = jnp.array([name not in PLAIN for name in augment.ops])
    level = jnp.where(signed[op] & jax.random.bernoulli(keys[2], 0.5, shape), -level, level)
    bicubic = jax.random.bernoulli(keys[3], 0.5, shape)
    applied = jax.random.bernoulli(keys[4], augment.probability, shape)
    op = jnp.where(applied, op, len(augment.ops))
    return Calls(op.T, level.T, bicubic.T)


def apply_ops(images: Images, calls: Calls, augment: RandAugment) -> Images:
    """Applies one operation to each image; see `data.randaugment.apply_op`."""
    return jax.vmap(functools.partial(_apply_op, augment=augment))(images, calls)


def _apply_op(image, call, augment):
    """Applies an operation to one image, uint8 [H, W, 3]."""
    table = _table(image, call, augment).astype(jnp.uint8)
    result = _take(table.ravel(), image + np.arange(3)[None, None] * 256)
    for i, name in enumerate(augment.ops):
        if other := {"Color": _grey, "Sharpness": _smooth}.get(name.removesuffix("Increasing")):
            behind = other(image).astype(jnp.float32)
            blended = _truncate(behind + _factor(name, call.level) * (image - behind))
            result = jnp.where(call.op == i, blended, result)
    geometric = jnp.array([*(name in GEOMETRIC for name in augment.ops), False])
    return jnp.where(geometric[call.op], _warp(image, call, augment), result)


def _truncate(values):
    return jnp.clip(values, 0, 255).astype(jnp.uint8)


def _take(rows, index):
    return rows.at[index].get(mode="promise_in_bounds")


# ------------------------------------------------------------------------------- maps of values


def _table(image, call, augment):
    """Returns the map of values of the operation, [3, 256]; for others the identity."""
    values, level = jnp.arange(256)[None], call.level
    table = jnp.broadcast_to(values, (3, 256))
    for i, name in enumerate(augment.ops):
        increasing = name.endswith("Increasing")
        match name.removesuffix("Increasing"):
            case "AutoContrast":
                new = _autocontrast(image, values)
            case "Equalize":
                new = _equalize(image, values)
            case "Invert":
                new = 255 - values
            case "Posterize":
                bits = jnp.int32(level * 0.4)
                new = values & (255 << (8 - jnp.clip(4 - bits if increasing else bits, 0, 8)))
            case "Solarize":
                threshold = jnp.minimum(256, jnp.int32(level * 25.6))
                threshold = 256 - threshold if increasing else threshold
                new = jnp.where(values < threshold, values, 255 - values)
            case "SolarizeAdd":
                added = jnp.minimum(255, values + jnp.minimum(128, jnp.int32(level * 11)))
                new = jnp.where(values < 128, added, values)
            case "Contrast":
                grey = _grey(image)
                mean = (2 * grey.sum() + grey.size) // (2 * grey.size)  # rounded
                new = mean + _factor(name, level) * (values - mean)
            case "Brightness":
                new = _factor(name, level) * values
            case _:
                continue
        table = jnp.where(call.op == i, _truncate(new), table)
    return table


def _factor(name, level):
    """Returns `data.randaugment.enhance_factor` of an array."""
    if name.endswith("Increasing"):
        return jnp.maximum(0.1, 1 + level * 0.09)
    return level * 0.18 + 0.1


def _autocontrast(image, values):
    low, high = (f(image, (0, 1)).astype(jnp.int32)[:, None] for f in (jnp.min, jnp.max))
    stretched = 255 * (values - low) // jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched, values)


def _equalize(image, values):
    index = (image + np.arange(3)[None, None] * 256).ravel()
    count = jnp.zeros(3 * 256, jnp.int32).at[index].add(1, mode="promise_in_bounds")
    count = count.reshape(3, 256)  # pixels of each value
    last = jnp.take_along_axis(count, image.max((0, 1)).astype(jnp.int32)[:, None], axis=1)
    step = (count.sum(1, keepdims=True) - last) // 255
    below = count.cumsum(1) - count
    return jnp.where(step > 0, (step // 2 + below) // jnp.maximum(step, 1), values)


def _grey(image):
    weighted = (image * np.array([19595, 38470, 7471])[None, None]).sum(-1, keepdims=True)
    return (weighted + 0x8000) >> 16


def _smooth(image):
    height, width, _ = image.shape
    if min(height, width) < 3:
        return image
    shifted = lambda y, x: image[y : height - 2 + y, x : width - 2 + x]
    inner = sum(pillow.SMOOTH[y, x] * shifted(y, x) for y in range(3) for x in range(3))
    # Pillow leaves the outermost pixels.
    return image.at[1:-1, 1:-1].set(jnp.floor(inner + 0.5).astype(jnp.uint8))


# ------------------------------------------------------------------------- geometric operations


def _warp(image, call, augment):
    """Moves the image by its geometric operation; any pixels for other operations."""
    height, width, _ = image.shape
    matrix = jnp.zeros(6)
    for i, name in enumerate(augment.ops):
        if name in GEOMETRIC:
            new = jnp.stack(pillow.affine_matrix(name, call.level, width, height, jnp))
            matrix = jnp.where(call.op == i, new, matrix)
    a, b, c, d, e, f = matrix
    x, y = np.arange(width)[None] + 0.5, np.arange(height)[:, None] + 0.5
    x, y = a * x + b * y + c, d * x + e * y + f  # [H, W], from the corner of the image
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    (x, x_weights), (y, y_weights) = (_taps(p - 0.5, call.bicubic) for p in (x, y))
    rows, total = image.reshape(-1, 3), jnp.zeros(image.shape)
    for i in range(4):
        row = jnp.clip(y + i - 1, 0, height - 1) * width
        for j in range(4):
            pixels = _take(rows, row + jnp.clip(x + j - 1, 0, width - 1))
            total += (y_weights[i] * x_weights[j])[..., None] * pixels
    fill = np.array(augment.fill, np.uint8)[None, None]
    return jnp.where(inside[..., None], _truncate(total + ROUNDING), fill)


def _taps(position, bicubic):
    """Returns the pixel at or before a position, and the weights of the pixels -1, 0, 1 and 2."""
    whole = jnp.floor(position)
    f = position - whole
    weights = zip(pillow.cubic_weights(f), (0.0, 1 - f, f, 0.0), strict=True)
    weights = [jnp.where(bicubic, *pair) for pair in weights]
    return whole.astype(jnp.int32), weights
