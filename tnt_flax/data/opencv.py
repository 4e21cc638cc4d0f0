# SPDX-License-Identifier: Apache-2.0
"""Geometric operations of training by OpenCV: faster than Pillow, with slightly other pixels.

Pixels differ by about one level on average from those of Pillow; tests/data/test_opencv.py has the
bounds.
"""

import math

import numpy as np
from PIL import Image

from tnt_flax.core.errors import InputError, one_line
from tnt_flax.data.images import Encoded, Policy, decode
from tnt_flax.data.randaugment import MATRICES, Pixels

try:
    import cv2
except ImportError as error:
    raise InputError(
        f'augment.resampling="opencv": {one_line(error)}: pip install "tnt_flax[opencv]"'
    ) from None

cv2.setNumThreads(0)  # the pipeline has its own threads


def open_image(image: Encoded, policy: Policy) -> Image.Image:
    """Decodes an image to RGB, see `images.decode`."""
    return decode(image, policy)


def crop(
    image: Image.Image,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    resample: Image.Resampling,
) -> np.ndarray:
    """Crops and resizes an opened image; returns uint8 [H, W, 3] with (H, W) = size."""
    return resize(np.asarray(image.crop(box)), size, resample)


def resize(pixels: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """Resizes to size = (height, width), bilinear or bicubic; returns uint8 [H, W, 3].

    Unlike Pillow, OpenCV does not widen its filters when it shrinks an image and would skip pixels,
    so shrinking smooths first: beyond a scale of 2 by a Gaussian with the variance of Pillow's
    bilinear filter, below by three weights (w, 1 - 2w, w) that approximate both filters.
    """
    width_height = size[::-1]
    scales = [side / to for side, to in zip(pixels.shape[1::-1], width_height, strict=True)]
    if max(scales) > 2:
        x, y = (math.sqrt(max(scale**2 - 1, 1e-6) / 6) for scale in scales)  # OpenCV replaces 0
        pixels = cv2.GaussianBlur(pixels, (0, 0), x, sigmaY=y, borderType=cv2.BORDER_REPLICATE)
    elif max(scales) > 1:
        weights = (max(scale - 1, 0) / 4 for scale in scales)
        kernels = [np.array([w, 1 - 2 * w, w]) for w in weights]
        pixels = cv2.sepFilter2D(pixels, -1, *kernels, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(pixels, width_height, interpolation=_interpolation(resample))


def flip(image: Pixels) -> np.ndarray:
    """Mirrors left to right."""
    return cv2.flip(np.asarray(image), 1)


def warp(
    image: Pixels, name: str, level: float, resample: Image.Resampling, fill: tuple[int, int, int]
) -> np.ndarray:
    """Applies a geometric operation, see `randaugment.warp`; returns uint8 [H, W, 3].

    The fill blends in at the outline of the moved image, where Pillow has a hard edge.
    """
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    matrix = _rotation if name == "Rotate" else MATRICES[name]
    matrix = np.reshape(matrix(level / 10, width, height), (2, 3))
    # The origin of Pillow's coordinates is the corner of the first pixel, OpenCV's is its center.
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
    return cv2.INTER_CUBIC if resample == Image.Resampling.BICUBIC else cv2.INTER_LINEAR
