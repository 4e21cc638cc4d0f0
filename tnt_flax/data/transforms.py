# SPDX-License-Identifier: Apache-2.0
"""Transforms from an encoded image to the uint8 pixels of one sample.

Every function is pure: the same image and generator state give the same pixels. Boxes, rounding and
filters are those of timm and torchvision, and training pixels are bit-identical to theirs.
Normalization, mixup and erasing are not here; they run on the device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from tnt_flax.core.errors import InputError
from tnt_flax.data.images import TIMM, CorruptImageError, Encoded, Policy, decode
from tnt_flax.data.randaugment import ApplyOp, Pixels, apply_op, as_image

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
INTERPOLATIONS = {  # two filters with equal odds
    "random": (BICUBIC, BILINEAR),
    "bicubic": (BICUBIC, BICUBIC),
    "bilinear": (BILINEAR, BILINEAR),
}
BLUR_RADIUS = (0.1, 2.0)  # of `three_augment`, in pixels
CROP_TRIES = 10  # before taking the central crop, as in torchvision and timm
Size = int | Sequence[int]  # pixels: of both sides, or (height, width)


def height_width(size: Size) -> tuple[int, int]:
    """Returns the height and width in pixels. Raises InputError for anything else."""
    match (size, size) if isinstance(size, int) else size:
        case int(height), int(width):
            return height, width
    raise InputError(f"image_size={size!r} is neither a number of pixels nor (height, width)")


# ------------------------------------------------------------------------------------ resampling


Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class Resampler(NamedTuple):
    """Decoding and the pixel operations of `train_transform`, as implemented by one library.

    Opened images have a `size`, (width, height). An opened image is returned unchanged by `open`.
    """

    open: Callable[[Encoded, Policy], Any]
    # (opened image, box, (height, width), filter) -> pixels of the box, resized
    crop: Callable[[Any, Box, tuple[int, int], Image.Resampling], Pixels]
    flip: Callable[[Pixels], Pixels]  # left to right
    apply_op: ApplyOp  # of RandAugment


def _crop(image, box, size, resample):
    # `resize(box=...)` would filter beyond the box: up to 7 levels of difference at its border.
    return image.crop(box).resize(size[::-1], resample)


PILLOW = Resampler(open=decode, crop=_crop, flip=ImageOps.mirror, apply_op=apply_op)


def resampler(name: str) -> Resampler:
    """Returns the resampler "pillow" (pixels of timm) or "opencv" (faster, other pixels).

    Raises InputError if OpenCV is not installed.
    """
    if name == "pillow":
        return PILLOW
    from tnt_flax.data import opencv

    return Resampler(opencv.Opened, opencv.Opened.crop, opencv.flip, opencv.apply_op)


# ------------------------------------------------------------------------------------- training


def random_crop_box(
    width: int,
    height: int,
    generator: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Samples the box (left, top, right, bottom) of `RandomResizedCrop`, in pixels.

    The area is uniform in `scale`, as a fraction of the image, and width / height is log-uniform in
    `ratio`. A box that does not fit is rejected; after ten rejections the result is the largest
    central box with an allowed ratio. Source: `get_params` in torchvision and timm. As in
    torchvision, and unlike timm, a box of zero pixels (in a tiny image) does not fit.
    """
    for _ in range(CROP_TRIES):
        area = generator.uniform(*scale) * width * height
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(generator.integers(0, height - crop_height, endpoint=True))
            left = int(generator.integers(0, width - crop_width, endpoint=True))
            return left, top, left + crop_width, top + crop_height
    # At least one pixel, even if the image has a single row or column.
    crop_width = min(width, max(1, round(height * max(ratio))))
    crop_height = min(height, max(1, round(width / min(ratio))))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def color_jitter(image: Pixels, generator: np.random.Generator, strength: float) -> Image.Image:
    """Scales brightness, contrast and saturation by random factors, in random order.

    Factors are uniform in [1 - strength, 1 + strength]. Source: torchvision's ColorJitter without
    hue, as used by timm.
    """
    image = as_image(image)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for i in generator.permutation(len(enhancers)):
        factor = generator.uniform(max(0.0, 1 - strength), 1 + strength)
        image = enhancers[i](image).enhance(factor)
    return image


def three_augment(image: Pixels, generator: np.random.Generator) -> Image.Image:
    """Returns the image in grey, solarized or blurred, with equal odds.

    Solarization inverts values from 128 on; the radius of the Gaussian blur is uniform in
    BLUR_RADIUS. Source: 3-Augment of DeiT-III (Touvron et al., arXiv 2204.07118), which a color
    jitter follows.
    """
    image = as_image(image)
    match generator.integers(3):
        case 0:
            return image.convert("L").convert("RGB")
        case 1:
            return ImageOps.solarize(image)
        case _:
            return image.filter(ImageFilter.GaussianBlur(generator.uniform(*BLUR_RADIUS)))


def train_transform(
    image: Encoded,
    generators: Sequence[np.random.Generator],
    *,
    size: Size,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    interpolation: str = "random",
    three_augments: bool = False,
    jitter: float = 0.0,
    randaugment: Callable[..., Pixels] | None = None,
    resampler: Resampler = PILLOW,
    policy: Policy = TIMM,
) -> list[np.ndarray]:
    """Returns one augmented training sample per generator, uint8 [H, W, 3], possibly read-only.

    The image is decoded once. For each sample it is cropped, resized, flipped left to right, and
    augmented, in the order of timm. Random numbers do not depend on the resampler.

    Args:
        image, generators: the record's image, and each sample's source of random numbers.
        size: height and width of the result.
        scale, ratio: ranges of area and aspect ratio, see `random_crop_box`.
        flip: probability of the flip.
        interpolation: of INTERPOLATIONS, the filter of the resizing; "random" is that of timm.
        three_augments: apply `three_augment`.
        jitter: strength of `color_jitter`, which is used if there is no `randaugment`, as in timm.
        randaugment: a `RandAugment`, called with (image, generator, resampler.apply_op).
        resampler: implementation of decoding and of the pixel operations.
        policy: how the image becomes RGB.

    Raises:
        CorruptImageError: the image cannot be decoded.
    """
    opened, size, samples = resampler.open(image, policy), height_width(size), []
    for generator in generators:
        box = random_crop_box(*opened.size, generator, scale, ratio)
        resample = INTERPOLATIONS[interpolation][int(generator.random() >= 0.5)]
        sample = resampler.crop(opened, box, size, resample)
        if generator.random() < flip:
            sample = resampler.flip(sample)
        if three_augments:
            sample = three_augment(sample, generator)
        if randaugment is not None:
            sample = randaugment(sample, generator, resampler.apply_op)
        elif jitter:
            sample = color_jitter(sample, generator, jitter)
        samples.append(np.asarray(sample))
    return samples


# ------------------------------------------------------------------------------------- evaluation


def resized_size(
    image_size: tuple[int, int], target: tuple[int, int], policy: Policy = TIMM
) -> tuple[int, int]:
    """Returns the (width, height) of an image resized to cover `target` = (height, width).

    Keeps the aspect ratio. For a square target the shorter side fits and the longer one is rounded
    down (torchvision's Resize); else both are rounded (timm's ResizeKeepRatio).

    Raises CorruptImageError for more pixels than the policy's limit: resizing an image of one pixel
    by thousands would exhaust the memory.
    """
    width, height = image_size
    if target[0] == target[1]:
        short, long = target[0], int(target[0] * max(image_size) / min(image_size))
        resized = (short, long) if width <= height else (long, short)
    else:
        ratio = min(height / target[0], width / target[1])
        resized = round(width / ratio), round(height / ratio)
    if resized[0] * resized[1] > policy.pixel_limit:
        raise CorruptImageError(f"{width} x {height} pixels are too long and thin")
    return resized


def resized_center(
    image: Image.Image,
    resized: tuple[int, int],
    size: tuple[int, int],
    filter: Image.Resampling = BICUBIC,
) -> Image.Image:
    """Resizes to `resized` = (width, height) and crops the center `size` = (H, W).

    Like `image.resize(resized, filter)` and torchvision's `center_crop`, but computes only the
    cropped pixels. PIL's box has single precision, so about one value in a thousand differs, by one
    level.
    """
    width, height = resized
    rows, columns = size
    left, top = round((width - columns) / 2), round((height - rows) / 2)
    if image.height > 2 * image.width:  # Pillow 13 filters the columns first: other roundings
        return image.resize(resized, filter).crop((left, top, left + columns, top + rows))
    x, x_end = (column * image.width / width for column in (left, left + columns))
    y, y_end = (row * image.height / height for row in (top, top + rows))
    # Rows of the image within reach of the filter.
    reach = 2 * max(image.height / height, 1.0)
    first, last = max(0, math.floor(y - reach)), min(image.height, math.ceil(y_end + reach))
    # One pass at a time, because the order in which PIL does both depends on the box.
    strip = image.crop((0, first, image.width, last))
    strip = strip.resize((columns, last - first), filter, (x, 0, x_end, last - first))
    box = (0, y - first, columns, y_end - first)
    return strip.resize((columns, rows), filter, box)


def eval_transform(
    image: Encoded,
    *,
    size: Size,
    crop_fraction: float,
    interpolation: str = "bicubic",
    policy: Policy = TIMM,
) -> np.ndarray:
    """Returns an evaluation sample, read-only uint8 [H, W, 3], preprocessed as in timm.

    Resizes the shorter side to `floor(size / crop_fraction)` (0.9: 224 -> 248) and crops the
    center; for (height, width) that differ, resizes to cover both sides' fractions. `crop_fraction`
    is at most 1, `interpolation` "bicubic" or "bilinear". Raises CorruptImageError.
    """
    image, size = decode(image, policy), height_width(size)
    covered = tuple(math.floor(side / crop_fraction) for side in size)
    resized = resized_size(image.size, covered, policy)
    return np.asarray(resized_center(image, resized, size, INTERPOLATIONS[interpolation][0]))
