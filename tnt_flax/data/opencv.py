# SPDX-License-Identifier: Apache-2.0
"""Training's crops and geometric operations by OpenCV: faster than Pillow's, with other pixels.

The random numbers are those of `transforms.train_transform` in the same order: boxes, flips,
filters, operations and magnitudes are the same. Pixels differ by about a level on average; the
tests hold the bounds. Decoding and operations on colours remain Pillow's.
"""

import math

import numpy as np
from PIL import Image

from tnt_flax.core.errors import InputError, one_line
from tnt_flax.data import randaugment as pillow
from tnt_flax.data.transforms import Encoded, color_jitter, decode, random_crop_box

try:
    import cv2
except ImportError as error:
    raise InputError(
        f'augment.resampling="opencv": {one_line(error)}: pip install "tnt_flax[opencv]"'
    ) from None

cv2.setNumThreads(0)  # the pipeline has threads of its own
BICUBIC = Image.Resampling.BICUBIC


def resize(pixels: np.ndarray, size: int, resample: Image.Resampling) -> np.ndarray:
    """uint8 pixels [H, W, 3] at `size` x `size`, by a bilinear or bicubic filter.

    OpenCV's filters do not widen when they shrink an image, as Pillow's do, and would skip pixels.
    So what shrinks is smoothed before: beyond a scale of 2 until it has the variance of Pillow's
    bilinear filter, below by three weights (w, 1 - 2w, w) that come closest to both filters.
    """
    scales = [side / size for side in pixels.shape[1::-1]]
    if max(scales) > 2:
        x, y = (math.sqrt(max(scale**2 - 1, 1e-6) / 6) for scale in scales)  # 0 would mean another
        pixels = cv2.GaussianBlur(pixels, (0, 0), x, sigmaY=y, borderType=cv2.BORDER_REPLICATE)
    elif max(scales) > 1:
        weights = (max(scale - 1, 0) / 4 for scale in scales)
        kernels = [np.array([w, 1 - 2 * w, w]) for w in weights]
        pixels = cv2.sepFilter2D(pixels, -1, *kernels, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(pixels, (size, size), interpolation=_interpolation(resample))


def apply_op(
    pixels: np.ndarray,
    name: str,
    level: float,
    resample: Image.Resampling,
    fill: tuple[int, int, int],
) -> np.ndarray:
    """`randaugment.apply_op` on uint8 pixels [H, W, 3].

    At the outline of the moved image the fill blends in, where Pillow has a hard edge.
    """
    if name not in pillow.GEOMETRIC:
        return np.asarray(pillow.apply_op(Image.fromarray(pixels), name, level, resample, fill))
    height, width = pixels.shape[:2]
    matrix = _rotation if name == "Rotate" else pillow.MATRICES[name]
    matrix = np.reshape(matrix(level / 10, width, height), (2, 3))
    # Pillow's coordinates are 0 at the corner of the first pixel, OpenCV's at its centre.
    matrix[:, 2] += (matrix[:, 0] + matrix[:, 1] - 1) / 2
    return cv2.warpAffine(
        pixels,
        matrix,
        (width, height),
        flags=_interpolation(resample) | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fill,
    )


def _rotation(level, width, height):
    cos, sin = (f(math.radians(level * 30.0)) for f in (math.cos, math.sin))
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


def _interpolation(resample):
    return cv2.INTER_CUBIC if resample == BICUBIC else cv2.INTER_LINEAR


def train_transform(
    image: Encoded,
    generator: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    jitter: float = 0.0,
    randaugment: pillow.RandAugment | None = None,
) -> np.ndarray:
    """What `transforms.train_transform` does, faster: uint8 [size, size, 3].

    Raises CorruptImageError.
    """
    image = decode(image)
    box = random_crop_box(*image.size, generator, scale, ratio)
    resample = BICUBIC if generator.random() < 0.5 else Image.Resampling.BILINEAR
    pixels = resize(np.asarray(image.crop(box)), size, resample)
    if generator.random() < flip:
        pixels = cv2.flip(pixels, 1)
    if randaugment is not None:
        for call in randaugment.draw(generator):
            pixels = apply_op(pixels, *call, randaugment.fill)
    elif jitter:
        pixels = np.asarray(color_jitter(Image.fromarray(pixels), generator, jitter))
    return pixels
