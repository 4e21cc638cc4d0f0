# SPDX-License-Identifier: Apache-2.0
"""Decoding and augmentation of training images by OpenCV: faster than Pillow, with other pixels.

Pixels differ by about one level on average from those of Pillow; tests/data/test_opencv.py has the
bounds.
"""

import math

import numpy as np
from PIL import Image

from tnt_flax.core.errors import InputError, one_line
from tnt_flax.data import images, randaugment
from tnt_flax.data.images import Encoded, Policy
from tnt_flax.data.randaugment import GEOMETRIC, Pixels

try:
    import cv2
except ImportError as error:
    raise InputError(
        f'augment.resampling="opencv": {one_line(error)}: pip install "tnt_flax[opencv]"'
    ) from None

cv2.setNumThreads(0)  # the pipeline has its own threads

# ------------------------------------------------------------------------------------- decoding

COLOR = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
REDUCED = {  # 1 / scale -> flags; libjpeg then computes fewer frequencies of each 8x8 block
    1: COLOR,
    2: COLOR | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: COLOR | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: COLOR | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
END_OF_JPEG = b"\xff\xd9"


class Opened:
    """An image whose pixels are decoded when they are needed, at the scale that is needed.

    JPEGs are decoded by OpenCV, for large crops to a half, a quarter or an eighth of their sides.
    Other formats, and JPEGs that are damaged or need the policy, are decoded by Pillow.
    """

    def __init__(self, image: Encoded, policy: Policy):
        self._image, self._policy = images.open_image(image, policy), policy
        self._jpeg, self._decoded = None, {}  # encoded bytes; factor -> pixels
        plain = self._image.format in ("JPEG", "MPO") and self._image.mode in ("RGB", "L")
        plain = plain and isinstance(image, bytes) and not policy.exif
        # OpenCV fills a truncated file with grey, where Pillow raises an error.
        if plain and image.rstrip(b"\0").endswith(END_OF_JPEG):
            self._jpeg = np.frombuffer(image, np.uint8)
            self.size = self._image.size
        else:
            self.size = self._by_pillow().shape[1::-1]

    def crop(
        self, box: tuple[int, int, int, int], size: tuple[int, int], resample: Image.Resampling
    ) -> np.ndarray:
        """Returns the pixels of the box resized to size = (height, width); see `resize`.

        The scale of decoding depends on the box alone, so samples do not depend on each other.
        """
        left, top, right, bottom = box
        reduction = min((right - left) / size[1], (bottom - top) / size[0])
        factor = next(
            f for f in (8, 4, 2, 1) if f == 1 or (reduction >= f and self._jpeg is not None)
        )
        pixels = self._pixels(factor)
        if factor == 1:
            return resize(pixels[top:bottom, left:right], size, resample)
        return _resize_window(pixels, [edge / factor for edge in box], size, resample)

    def _pixels(self, factor):
        if factor not in self._decoded:
            try:
                pixels = cv2.imdecode(self._jpeg, REDUCED[factor])
            except cv2.error:
                pixels = None
            if pixels is None:  # damaged: Pillow decides
                self._jpeg, whole = None, self._by_pillow()
                pixels = whole[::factor, ::factor]
            self._decoded[factor] = pixels
        return self._decoded[factor]

    def _by_pillow(self):
        self._decoded[1] = np.asarray(images.decode(self._image, self._policy))
        return self._decoded[1]


# --------------------------------------------------------------------------------- resampling


def resize(pixels: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """Resizes to size = (height, width), bilinear or bicubic; returns uint8 [H, W, 3].

    Unlike Pillow, OpenCV does not widen its filters when it shrinks an image and would skip pixels,
    so shrinking smooths first: beyond a scale of 2 by a Gaussian with the variance of Pillow's
    bilinear filter, below by three weights (w, 1 - 2w, w) that approximate both filters.
    """
    scales = [pixels.shape[1] / size[1], pixels.shape[0] / size[0]]
    smooth = _smooth(pixels, scales)
    return cv2.resize(smooth, size[::-1], interpolation=_interpolation(resample))


def _smooth(pixels, scales):
    """Smooths for shrinking by `scales` in x and y."""
    if max(scales) > 2:
        x, y = (math.sqrt(max(scale**2 - 1, 1e-6) / 6) for scale in scales)  # OpenCV replaces 0
        return cv2.GaussianBlur(pixels, (0, 0), x, sigmaY=y, borderType=cv2.BORDER_REPLICATE)
    if max(scales) > 1:
        weights = (max(scale - 1, 0) / 4 for scale in scales)
        kernels = [np.array([w, 1 - 2 * w, w]) for w in weights]
        return cv2.sepFilter2D(pixels, -1, *kernels, borderType=cv2.BORDER_REPLICATE)
    return pixels


def _resize_window(pixels, window, size, resample):
    """Resizes a window whose edges (left, top, right, bottom) need not be whole pixels."""
    left, top, right, bottom = window
    x, y = math.floor(left), math.floor(top)
    scales = (right - left) / size[1], (bottom - top) / size[0]
    smooth = _smooth(pixels[y : math.ceil(bottom), x : math.ceil(right)], scales)
    offsets = [o + (s - 1) / 2 for o, s in zip((left - x, top - y), scales, strict=True)]
    matrix = np.array([[scales[0], 0, offsets[0]], [0, scales[1], offsets[1]]])
    flags = _interpolation(resample) | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(smooth, matrix, size[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)


def flip(image: Pixels) -> np.ndarray:
    """Mirrors left to right."""
    return cv2.flip(np.asarray(image), 1)


def _interpolation(resample):
    return cv2.INTER_CUBIC if resample == Image.Resampling.BICUBIC else cv2.INTER_LINEAR


# -------------------------------------------------------------------------------- RandAugment


def apply_op(
    image: Pixels, name: str, level: float, resample: Image.Resampling, fill: tuple[int, int, int]
) -> np.ndarray:
    """Applies an operation of RandAugment, see `randaugment.apply_op`; returns uint8 [H, W, 3].

    Color operations that map values are those of Pillow; Color, Contrast and Sharpness differ by
    one level. Where an image was moved, the fill blends in at its outline, where Pillow has a hard
    edge.
    """
    pixels = np.asarray(image)
    if name in GEOMETRIC:
        return _warp(pixels, name, level, resample, fill)
    table = _table(pixels, name, level)
    return _blend(pixels, name, level) if table is None else cv2.LUT(pixels, table)


# The values of a grey ramp: Pillow's result for it is the table of a map of values.
RAMP = Image.fromarray(np.arange(256, dtype=np.uint8)[None])


def _table(pixels, name, level):
    """Returns a table of values, [1, 256] or one per channel [1, 256, 3]; None for other kinds."""
    if name in ("AutoContrast", "Equalize"):
        count = lambda channel: cv2.calcHist([pixels], [channel], None, [256], [0, 256]).ravel()
        return np.stack([_STRETCH[name](count(i).astype(int)) for i in range(3)], axis=-1)[None]
    factor = randaugment.enhance_factor(name, level)
    if name.startswith("Contrast"):
        mean = int(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).mean() + 0.5)
        blended = mean + factor * (np.arange(256) - mean)
        return np.clip(blended, 0, 255).astype(np.uint8)[None]
    if name.startswith(("Color", "Sharpness")):
        return None
    return np.asarray(randaugment.apply_op(RAMP, name, level, Image.Resampling.BILINEAR, (0, 0, 0)))


def _autocontrast(histogram):
    low, *_, high = np.flatnonzero(histogram)[[0, 0, -1]]
    scale = 255 / (high - low) if high > low else 1.0
    values = np.arange(256) * scale - (low * scale if high > low else 0)
    return np.clip(values.astype(int), 0, 255).astype(np.uint8)


def _equalize(histogram):
    filled = histogram[histogram > 0]
    step = (filled.sum() - filled[-1]) // 255 if len(filled) > 1 else 0
    if not step:
        return np.arange(256, dtype=np.uint8)
    below = np.cumsum(histogram) - histogram
    return np.minimum((step // 2 + below) // step, 255).astype(np.uint8)


_STRETCH = {"AutoContrast": _autocontrast, "Equalize": _equalize}


def _blend(pixels, name, level):
    """Applies Color or Sharpness: moves away from a grey or a smooth image, or towards it."""
    if name.startswith("Color"):
        other = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    else:
        other = pixels.copy()  # Pillow leaves the outermost pixels
        other[1:-1, 1:-1] = cv2.filter2D(pixels, -1, randaugment.SMOOTH)[1:-1, 1:-1]
    factor = randaugment.enhance_factor(name, level)
    return cv2.addWeighted(other, 1 - factor, pixels, factor, 0)


def _warp(pixels, name, level, resample, fill):
    height, width = pixels.shape[:2]
    matrix = np.reshape(randaugment.affine_matrix(name, level, width, height), (2, 3))
    if name.startswith("Translate"):
        return _translate(pixels, matrix[:, 2], resample, fill)
    # The origin of Pillow's coordinates is the corner of the first pixel, OpenCV's is its center.
    matrix[:, 2] += (matrix[:, 0] + matrix[:, 1] - 1) / 2
    options = dict(borderMode=cv2.BORDER_CONSTANT, borderValue=fill)
    flags = _interpolation(resample) | cv2.WARP_INVERSE_MAP
    if resample != Image.Resampling.BICUBIC:  # four channels take half the time of three
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA)
        moved = cv2.warpAffine(pixels, matrix, (width, height), flags=flags, **options)
        return cv2.cvtColor(moved, cv2.COLOR_RGBA2RGB)
    return cv2.warpAffine(pixels, matrix, (width, height), flags=flags, **options)


def _translate(pixels, shift, resample, fill):
    """Translates along one axis, as Pillow up to rounding: a filter and a copy.

    `shift` is (x, y) from the coordinates of the result to those of the image.
    """
    axis = int(shift[0] != 0)
    size, shift = pixels.shape[axis], float(shift[0] or shift[1])
    whole = math.floor(shift)
    f = shift - whole
    cubic = resample == Image.Resampling.BICUBIC
    kernel = np.float32(randaugment.cubic_weights(f) if cubic else (0, 1 - f, f, 0))
    border = (0, 0, 1, 1) if axis else (1, 1, 0, 0)
    padded = cv2.copyMakeBorder(pixels, *border, cv2.BORDER_REPLICATE)
    kernel, anchor = (kernel[None], (1, 0)) if axis else (kernel[:, None], (0, 1))
    filtered = cv2.filter2D(padded, -1, kernel, anchor=anchor, borderType=cv2.BORDER_REPLICATE)
    moved = np.full_like(pixels, fill) if len(set(fill)) > 1 else np.full_like(pixels, fill[0])
    # Pillow fills pixels whose centers come from outside of the image.
    first = min(size, max(0, math.ceil(-0.5 - shift)))
    last = max(first, min(size, math.ceil(size - 0.5 - shift)))
    to, source = slice(first, last), slice(first + whole + 1, last + whole + 1)
    if axis:
        moved[:, to] = filtered[:, source]
    else:
        moved[to] = filtered[source]
    return moved
