# SPDX-License-Identifier: Apache-2.0
"""From an encoded image to the uint8 pixels of one sample: PIL, and a generator per sample.

Every function is pure: the same image and the same generator state give the same pixels. Boxes,
rounding and filters are timm's, which are torchvision's, in training bit for bit. Normalising,
mixing and erasing are not here; they run on the device.
"""

import io
import math
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

# Once, when this module is imported, and not in `warnings.catch_warnings()` around each call: that
# swaps the state of the whole process, and many threads decode at once. The first is Pillow's
# documented way to refuse decompression bombs; the others are remarks about metadata.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

Encoded = bytes | np.ndarray | Image.Image  # an image in any stage of decoding
CROP_TRIES = 10  # then the central crop, as in torchvision and timm


class CorruptImageError(ValueError):
    """This record is not a usable image. The message is one line, without the file's name."""


# ------------------------------------------------------------------------------------- decoding


def decode(image: Encoded) -> Image.Image:
    """An encoded file, or uint8 pixels [H, W] or [H, W, C], as a PIL image in RGB.

    What was decoded to RGB before is returned as it is.

    As timm decodes: `convert("RGB")` whatever the mode (grey is repeated, CMYK converted, alpha
    dropped, 16 bits clipped to 255), and an EXIF orientation is not applied.
    Raises CorruptImageError for anything that cannot be shown: truncated or empty data, a format
    that PIL does not read, no pixels, or more than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        if isinstance(image, Image.Image):
            return _in_rgb(image)
        if isinstance(image, np.ndarray):
            return _from_pixels(image)
        return _from_file(image)
    except (CorruptImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:  # PIL's own text is the address of a buffer
        raise CorruptImageError("not an image format that PIL reads") from None
    except Exception as reason:  # PIL's many readers raise OSError, SyntaxError, struct.error...
        raise CorruptImageError(_one_line(reason)) from None


def _from_file(encoded):
    if not encoded:
        raise CorruptImageError("the file is empty")
    image = Image.open(io.BytesIO(encoded))
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # where the user's filters say ignore
        raise CorruptImageError(f"{image.width} x {image.height} pixels are too many")
    return _in_rgb(image)


def _in_rgb(image):
    if image.mode == "RGB":  # `convert` would copy it
        image.load()
        return image
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.copy()  # it may be the user's
        del image.info["transparency"]  # dropped by convert() anyway, but with a warning
    return image.convert("RGB")


def _from_pixels(pixels):
    if pixels.dtype != np.uint8:
        raise CorruptImageError(f"pixels are {pixels.dtype}, not uint8")
    if not pixels.size:
        raise CorruptImageError(f"an array of shape {pixels.shape} has no pixels")
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(pixels).convert("RGB")


def _one_line(reason):
    return " ".join(str(reason).split()) or type(reason).__name__


# ------------------------------------------------------------------------------------- training


def random_crop_box(
    width: int,
    height: int,
    generator: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) in pixels, as `RandomResizedCrop` draws it.

    The area is uniform in `scale` (parts of the image), width / height log-uniform in `ratio`. A
    box that does not fit is drawn again; after ten tries the largest central box with an allowed
    ratio is taken. Source: torchvision's and timm's `get_params`. Like torchvision and unlike
    timm, a box rounded to no pixels (a tiny image) counts as one that does not fit.
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
    # At least one pixel, for an image of a single row or column and unusual ratios.
    crop_width = min(width, max(1, round(height * max(ratio))))
    crop_height = min(height, max(1, round(width / min(ratio))))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def random_resized_crop(
    image: Image.Image,
    generator: np.random.Generator,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Image.Image:
    """A random box of the image at `size` x `size`, by a bilinear or bicubic filter, 50:50.

    The coin is timm's 'random' train interpolation. The box is cut out before it is resized, so
    that the filter does not see beyond it: `resize(box=...)` differs by up to 7 levels there.
    """
    box = random_crop_box(*image.size, generator, scale, ratio)
    bicubic = generator.random() < 0.5
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    return image.crop(box).resize((size, size), resample)


def random_flip(
    image: Image.Image, generator: np.random.Generator, probability: float
) -> Image.Image:
    """The image, mirrored left to right with this probability."""
    if generator.random() < probability:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def color_jitter(
    image: Image.Image, generator: np.random.Generator, strength: float
) -> Image.Image:
    """Brightness, contrast and saturation, in random order, each times 1 +- `strength` at most.

    torchvision's ColorJitter without a change of hue, as timm calls it.
    """
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
    randaugment: Callable[[Image.Image, np.random.Generator], Image.Image] | None = None,
) -> np.ndarray:
    """A record's image as one augmented training sample, uint8 [size, size, 3], read-only.

    Cropped, resized, flipped, and then changed by `randaugment`, or without it by `color_jitter` of
    strength `jitter`: timm's order, and timm's choice. `flip` is a probability; the others are
    those of `random_resized_crop`. Raises CorruptImageError.
    """
    image = decode(image)
    image = random_resized_crop(image, generator, size, scale, ratio)
    image = random_flip(image, generator, flip)
    if randaugment is not None:
        image = randaugment(image, generator)
    elif jitter:
        image = color_jitter(image, generator, jitter)
    return np.asarray(image)


# ------------------------------------------------------------------------------------- evaluation


def short_side_size(image: Image.Image, short: int) -> tuple[int, int]:
    """The (width, height) at which the shorter side is `short`; the longer is rounded down.

    Raises CorruptImageError where that would need more than `PIL.Image.MAX_IMAGE_PIXELS`: a line
    of one pixel by thousands is a broken file, not a reason to run out of memory.
    """
    long = int(short * max(image.size) / min(image.size))
    if short * long > Image.MAX_IMAGE_PIXELS:
        raise CorruptImageError(f"{image.width} x {image.height} pixels are too long and thin")
    return (short, long) if image.width <= image.height else (long, short)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central `size` x `size` pixels; a shorter side is first padded with black.

    Source: torchvision's `center_crop`, whose offset `int(round(x))` rounds a half to even.
    """
    missing = [max(0, size - side) for side in image.size]
    if any(missing):
        before = [m // 2 for m in missing]
        after = [(m + 1) // 2 for m in missing]
        image = ImageOps.expand(image, (*before, *after), fill=0)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def resized_center(image: Image.Image, resized: tuple[int, int], size: int) -> Image.Image:
    """The central `size` x `size` pixels of the image at (width, height) `resized`, bicubic.

    `center_crop(image.resize(resized, BICUBIC), size)` without computing what the crop would drop.
    PIL's box is of single precision: one value in some thousand differs, by one level.
    """
    width, height = resized
    # Of an image this tall Pillow 13 filters the columns first, and so rounds differently.
    if min(resized) < size or image.height > 2 * image.width:
        return center_crop(image.resize(resized, Image.Resampling.BICUBIC), size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    x, x_end = (column * image.width / width for column in (left, left + size))
    y, y_end = (row * image.height / height for row in (top, top + size))
    # The rows of the image that the filter of a row of the crop reaches.
    reach = 2 * max(image.height / height, 1.0)
    first, last = max(0, math.floor(y - reach)), min(image.height, math.ceil(y_end + reach))
    rows = last - first
    # One pass at a time: which of them PIL would do first depends on the box.
    strip = image.crop((0, first, image.width, last))
    strip = strip.resize((size, rows), Image.Resampling.BICUBIC, (x, 0, x_end, rows))
    box = (0, y - first, size, y_end - first)
    return strip.resize((size, size), Image.Resampling.BICUBIC, box)


def eval_transform(image: Encoded, *, size: int, crop_fraction: float) -> np.ndarray:
    """A record's image as timm evaluates it, uint8 [size, size, 3], read-only.

    The shorter side goes to `floor(size / crop_fraction)` (0.9: 224 -> 248), then the centre is
    cut out. Raises CorruptImageError.
    """
    image = decode(image)
    resized = short_side_size(image, math.floor(size / crop_fraction))
    return np.asarray(resized_center(image, resized, size))
