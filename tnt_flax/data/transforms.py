# SPDX-License-Identifier: Apache-2.0
"""Transforms from an encoded image to the uint8 pixels of one sample.

Every function is pure: the same image and generator state give the same pixels. Boxes, rounding and
filters are those of timm and torchvision, and training pixels are bit-identical to theirs.
Normalization, mixup and erasing are not here; they run on the device.
"""

import io
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from tnt_flax.core.errors import one_line
from tnt_flax.data.randaugment import Pixels, Warp, as_image, warp

# Set once at import, because `warnings.catch_warnings()` in each call is not thread-safe. The error
# is Pillow's documented way to refuse decompression bombs; its UserWarnings are about metadata.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

Encoded = bytes | np.ndarray | Image.Image  # an image, decoded or not
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
CROP_TRIES = 10  # before taking the central crop, as in torchvision and timm


class CorruptImageError(ValueError):
    """An image cannot be decoded or used. The message is one line without the file's name."""


# ------------------------------------------------------------------------------------- decoding


def decode(image: Encoded) -> Image.Image:
    """Decodes an encoded file, or uint8 pixels [H, W] or [H, W, C], to a PIL image in RGB.

    A PIL image in RGB is returned unchanged. As in timm, other modes are converted by
    `convert("RGB")` (grey is repeated, alpha dropped, 16 bits clipped to 255), and the EXIF
    orientation is ignored.

    Raises CorruptImageError for truncated or empty data, a format that PIL does not read, and an
    image of no pixels or of more than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        if isinstance(image, np.ndarray):
            image = _from_pixels(image)
        elif not isinstance(image, Image.Image):
            image = _from_file(image)
        return _in_rgb(image)
    except (CorruptImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:  # PIL's message contains a memory address
        raise CorruptImageError("not an image format that PIL reads") from None
    except Exception as error:  # PIL's readers raise OSError, SyntaxError, struct.error...
        raise CorruptImageError(one_line(error)) from None


def _from_file(encoded):
    if not encoded:
        raise CorruptImageError("the file is empty")
    return Image.open(io.BytesIO(encoded))


def _in_rgb(image):
    if image.mode == "RGB":  # `convert` would copy it
        image.load()
        return image
    return image.convert("RGB")


def _from_pixels(pixels):
    if pixels.dtype != np.uint8:
        raise CorruptImageError(f"pixels are {pixels.dtype}, not uint8")
    if not pixels.size:
        raise CorruptImageError(f"an array of shape {pixels.shape} has no pixels")
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(pixels)


# ------------------------------------------------------------------------------------ resampling


class Resampler(NamedTuple):
    """The geometric operations of `train_transform`, as implemented by one library."""

    resize: Callable[[Image.Image, int, Image.Resampling], Pixels]  # to size x size
    flip: Callable[[Pixels], Pixels]  # left to right
    warp: Warp


def _resize(image, size, resample):
    return image.resize((size, size), resample)


PILLOW = Resampler(resize=_resize, flip=ImageOps.mirror, warp=warp)


def resampler(name: str) -> Resampler:
    """Returns the resampler "pillow" (pixels of timm) or "opencv" (faster, other pixels).

    Raises InputError if OpenCV is not installed.
    """
    if name == "pillow":
        return PILLOW
    from tnt_flax.data import opencv

    return Resampler(resize=opencv.resize, flip=opencv.flip, warp=opencv.warp)


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


def train_transform(
    image: Encoded,
    generator: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    jitter: float = 0.0,
    randaugment: Callable[..., Pixels] | None = None,
    resampler: Resampler = PILLOW,
) -> np.ndarray:
    """Returns one augmented training sample, uint8 [size, size, 3], possibly read-only.

    The image is cropped, resized (bilinear or bicubic with equal odds, the interpolation "random"
    of timm), flipped left to right, and augmented, in the order of timm. Random numbers do not
    depend on the resampler.

    Args:
        image, generator: the record's image, and the sample's source of random numbers.
        size: height and width of the result.
        scale, ratio: ranges of area and aspect ratio, see `random_crop_box`.
        flip: probability of the flip.
        jitter: strength of `color_jitter`, which is used if there is no `randaugment`, as in timm.
        randaugment: a `RandAugment`, called with (image, generator, resampler.warp).
        resampler: implementation of the geometric operations.

    Raises:
        CorruptImageError: the image cannot be decoded.
    """
    image = decode(image)
    box = random_crop_box(*image.size, generator, scale, ratio)
    interpolation = BICUBIC if generator.random() < 0.5 else BILINEAR
    # `resize(box=...)` would filter beyond the box: up to 7 levels of difference at its border.
    image = resampler.resize(image.crop(box), size, interpolation)
    if generator.random() < flip:
        image = resampler.flip(image)
    if randaugment is not None:
        image = randaugment(image, generator, resampler.warp)
    elif jitter:
        image = color_jitter(image, generator, jitter)
    return np.asarray(image)


# ------------------------------------------------------------------------------------- evaluation


def short_side_size(image: Image.Image, short: int) -> tuple[int, int]:
    """Returns the (width, height) with the shorter side at `short`, the longer rounded down.

    Raises CorruptImageError for more than `PIL.Image.MAX_IMAGE_PIXELS`: resizing an image of one
    pixel by thousands would exhaust the memory.
    """
    long = int(short * max(image.size) / min(image.size))
    if short * long > Image.MAX_IMAGE_PIXELS:
        raise CorruptImageError(f"{image.width} x {image.height} pixels are too long and thin")
    return (short, long) if image.width <= image.height else (long, short)


def resized_center(image: Image.Image, resized: tuple[int, int], size: int) -> Image.Image:
    """Resizes (bicubic) to `resized` = (width, height) and crops the central `size` x `size`.

    Like `image.resize(resized, BICUBIC)` and torchvision's `center_crop`, but computes only the
    cropped pixels. PIL's box has single precision, so about one value in a thousand differs, by one
    level.
    """
    width, height = resized
    left, top = round((width - size) / 2), round((height - size) / 2)
    if image.height > 2 * image.width:  # Pillow 13 filters the columns first: other roundings
        return image.resize(resized, BICUBIC).crop((left, top, left + size, top + size))
    x, x_end = (column * image.width / width for column in (left, left + size))
    y, y_end = (row * image.height / height for row in (top, top + size))
    # Rows of the image within reach of the filter.
    reach = 2 * max(image.height / height, 1.0)
    first, last = max(0, math.floor(y - reach)), min(image.height, math.ceil(y_end + reach))
    rows = last - first
    # One pass at a time, because the order in which PIL does both depends on the box.
    strip = image.crop((0, first, image.width, last))
    strip = strip.resize((size, rows), BICUBIC, (x, 0, x_end, rows))
    box = (0, y - first, size, y_end - first)
    return strip.resize((size, size), BICUBIC, box)


def eval_transform(image: Encoded, *, size: int, crop_fraction: float) -> np.ndarray:
    """Returns an evaluation sample, read-only uint8 [size, size, 3], preprocessed as in timm.

    Resizes the shorter side to `floor(size / crop_fraction)` (0.9: 224 -> 248) and crops the
    center. `crop_fraction` is at most 1. Raises CorruptImageError.
    """
    image = decode(image)
    resized = short_side_size(image, math.floor(size / crop_fraction))
    return np.asarray(resized_center(image, resized, size))
