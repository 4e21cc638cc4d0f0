# SPDX-License-Identifier: Apache-2.0
"""The image opener of training, evaluation, inference and the tools, with its policy.

Everything that Pillow decodes becomes an RGB image. `Policy` selects what is ambiguous: the EXIF
orientation, transparency, 16 bits and floats, and the size limit. Its defaults give timm's pixels.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import io
import logging
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from tnt_flax.core.errors import InputError, listed, one_line

logger = logging.getLogger("tnt_flax")

# Set once at import, because `warnings.catch_warnings()` in each call is not thread-safe. The error
# is Pillow's documented way to refuse decompression bombs; its UserWarnings are about metadata.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

Encoded = bytes | np.ndarray | Image.Image  # an image, decoded or not
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
CLIP, MINMAX = "clip", "minmax"  # values of Policy.deep_pixels


class CorruptImageError(ValueError):
    """An image cannot be decoded or used. The message is one line without the file's name."""


class EmptyFileError(CorruptImageError):
    """The file has no bytes, or the array no pixels."""


class HugeImageError(CorruptImageError):
    """The image has more pixels than the policy's limit."""


class UnknownFormatError(CorruptImageError):
    """The data is in no image format that Pillow reads."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """How images become 8-bit RGB. The defaults are those of timm and torchvision.

    Raises InputError for an invalid value.
    """

    exif: bool = False  # turn images upright by their EXIF orientation
    # Color behind transparent pixels, RGB from 0 to 255; empty: alpha is dropped.
    background: tuple[int, ...] = ()
    # Grey and float images of more than 8 bits: "clip" to 0..255, "minmax" (each image's smallest
    # and largest value become 0 and 255), or (low, high), the values that become 0 and 255.
    deep_pixels: str | tuple[float, float] = CLIP
    # Larger images are refused; 0 is no limit, -1 is PIL.Image.MAX_IMAGE_PIXELS. A larger value
    # also raises Pillow's limit, which is one for the process.
    max_pixels: int = -1

    def __post_init__(self):
        color, deep = self.background, self.deep_pixels
        if len(color) not in (0, 3) or not all(value in range(256) for value in color):
            raise InputError(
                f"background={color!r} is not a color: give three numbers from 0 to 255"
            )
        is_range = isinstance(deep, tuple) and len(deep) == 2 and deep[0] < deep[1]
        if deep not in (CLIP, MINMAX) and not is_range:
            raise InputError(
                f'deep_pixels={deep!r} is neither "{CLIP}" nor "{MINMAX}" nor (low, high)'
            )
        if self.max_pixels < -1:
            raise InputError(f"max_pixels={self.max_pixels} is less than -1")

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Policy":
        """Returns the policy of a `config.data`."""
        return cls(**{key: data[key] for key in POLICY_KEYS})

    @property
    def pixel_limit(self) -> float:
        """The largest number of pixels, which may be infinite."""
        if self.max_pixels < 0:
            return Image.MAX_IMAGE_PIXELS or float("inf")
        return self.max_pixels or float("inf")

    def check_size(self, pixels: float) -> None:
        """Raises HugeImageError for an image of too many pixels."""
        if pixels > self.pixel_limit:
            raise HugeImageError(
                f"{pixels:,} pixels are more than the limit of {self.pixel_limit:,}: raise it by "
                "data.max_pixels, --max-pixels or max_pixels= (0 is no limit)"
            )


TIMM = Policy()
POLICY_KEYS = tuple(field.name for field in dataclasses.fields(Policy))  # in config.data


def stored_policy(data: Mapping[str, Any], **overrides: Any) -> Policy:
    """Returns the policy of a stored `config.data`, which may lack its keys and has no tuples.

    Overrides that are None change nothing.
    """
    values = {key: data[key] for key in POLICY_KEYS if key in data}
    values |= {key: value for key, value in overrides.items() if value is not None}
    return Policy(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# ------------------------------------------------------------------------------------- decoding


def decode(image: Encoded, policy: Policy = TIMM) -> Image.Image:
    """Decodes an encoded file, or pixels [H, W] or [H, W, C], to a PIL image in RGB.

    A PIL image in RGB is returned unchanged. Grey is repeated and other modes are converted by
    `convert("RGB")`, after what `policy` says.

    Raises CorruptImageError for truncated or empty data, a format that PIL does not read, and an
    image of no pixels or of more than the policy's limit.
    """
    with _as_corrupt():
        return _in_rgb(_open(image, policy), policy)


def open_image(image: Encoded, policy: Policy = TIMM) -> Image.Image:
    """Returns a PIL image in its own mode, whose pixels may still be undecoded.

    Raises CorruptImageError as `decode` does, except for damage that only decoding finds.
    """
    with _as_corrupt():
        return _open(image, policy)


@contextlib.contextmanager
def _as_corrupt():
    try:
        yield
    except (CorruptImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:  # PIL's message contains a memory address
        raise UnknownFormatError("not an image format that PIL reads") from None
    except Exception as error:  # PIL's readers raise OSError, SyntaxError, struct.error...
        raise CorruptImageError(one_line(error)) from None


def _open(image, policy):
    if isinstance(image, np.ndarray):
        return _from_pixels(image, policy)
    if isinstance(image, Image.Image):
        return image
    if not image:
        raise EmptyFileError("the file is empty")
    limit = Image.MAX_IMAGE_PIXELS
    if policy.max_pixels >= 0 and limit is not None and policy.pixel_limit > limit:
        Image.MAX_IMAGE_PIXELS = policy.max_pixels or None
    # The common case, without asking the plugins of all other formats.
    formats = ("JPEG",) if image.startswith(b"\xff\xd8\xff") else None
    try:
        opened = Image.open(io.BytesIO(image), formats=formats)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        policy.check_size(int(re.search(r"\d+", str(error))[0]))
        raise
    policy.check_size(opened.width * opened.height)
    if opened.format == "EPS":
        raise CorruptImageError("an EPS file: Pillow would run Ghostscript, so convert it first")
    return opened


def _from_pixels(pixels, policy):
    if not pixels.size:
        raise EmptyFileError(f"an array of shape {pixels.shape} has no pixels")
    if pixels.dtype != np.uint8:
        if policy.deep_pixels == CLIP or pixels.dtype.kind not in "uif":
            raise CorruptImageError(
                f"pixels are {pixels.dtype}, not uint8: convert them, or set deep_pixels"
            )
        pixels = _to_uint8(pixels, policy.deep_pixels)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(pixels)


def _in_rgb(image, policy):
    if policy.exif:
        image = _upright(image)
    if image.mode == "RGB" and not (policy.background and image.has_transparency_data):
        image.load()  # `convert` would copy it
        return image
    if _is_deep(image):
        values = np.asarray(image)
        if policy.deep_pixels != CLIP:
            image = Image.fromarray(_to_uint8(values, policy.deep_pixels))
        else:
            if values.max() > 255 or (image.mode == "F" and 0 <= values.min() <= values.max() <= 1):
                _warn_once(CLIPPED)
            if image.mode == "I;16B":  # which Pillow does not convert to RGB
                image = image.convert("I")
    if policy.background and image.has_transparency_data:
        image = image.convert("RGBA")
        behind = Image.new("RGBA", image.size, (*policy.background, 255))
        image = Image.alpha_composite(behind, image)
    return image.convert("RGB")


def _is_deep(image):
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def _to_uint8(pixels, deep):
    """Maps a range of values, or that of the image, to 0..255; NaNs become 0."""
    pixels = np.nan_to_num(pixels.astype(np.float64))  # exact for 32-bit integers
    low, high = (pixels.min(), pixels.max()) if deep == MINMAX else deep
    scaled = (pixels - low) * (255 / ((high - low) or 1.0))  # a constant image is black
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


CLIPPED = (
    "grey images of 16 bits or floats are clipped to 0..255, as in timm, so nearly all of their "
    "pixels are white or black: set deep_pixels (a key of config.data, an option of predict) to "
    '"minmax" or to (low, high), the values that become black and white'
)


@functools.cache
def _warn_once(message):
    """Warns once per process: an image in a data set is seldom the only one of its kind."""
    logger.warning(message)


# ----------------------------------------------------------------------------------- inspection


def orientation_of(image: Image.Image) -> int:
    """Returns the EXIF orientation of an opened image, 1 (upright) to 8; 1 if it is damaged."""
    # Pillow rotates TIFFs itself. In a PNG the tag may follow the pixels: load only if it exists.
    if image.format == "TIFF" or "exif" not in image.info and image.format == "JPEG":
        return 1
    with contextlib.suppress(Exception):  # Pillow's EXIF reader raises various types
        found = image.getexif().get(ORIENTATION, 1)
        return found if found in range(1, 9) else 1
    return 1


def is_transparent(image: Image.Image) -> bool:
    """True if a pixel of an opened image is not opaque; False for a damaged image."""
    if not image.has_transparency_data:
        return False
    with contextlib.suppress(Exception):  # what `decode` reports
        return image.convert("RGBA").getchannel("A").getextrema()[0] < 255
    return False


def _upright(image):
    turned = orientation_of(image)
    return image if turned == 1 else image.transpose(_TURNS[turned])


_TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
), start=2))  # fmt: skip


def unusual(image: Image.Image) -> dict[str, str]:
    """Returns what is special about an opened image, kind -> detail; see `check_data.MEANING`."""
    found = {}
    # A 16-bit color PNG has the mode RGB; only its tiles show the layout in the file.
    layout = f"{image.mode} {[tile[3] for tile in getattr(image, 'tile', ())]}"
    if _is_deep(image) or ";16" in layout:
        found["16-bit"] = f"mode {image.mode}"
    if image.mode == "CMYK":
        found["cmyk"] = f"a {image.format}"
    if image.mode in ("P", "PA"):
        found["palette"] = f"a {image.format}"
    if image.has_transparency_data:
        found["alpha"] = f"mode {image.mode}"
    if image.mode in ("1", "L", "LA") or _is_deep(image):
        found["grey"] = f"mode {image.mode}"
    if getattr(image, "is_animated", False):
        found["animated"] = f"{image.n_frames} frames"
    if (turned := orientation_of(image)) != 1:
        found["rotated"] = f"orientation {turned}"
    return found


# -------------------------------------------------------------------------------- files by name

# Formats that Pillow registers without decoding them, or that run Ghostscript.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Returns the suffixes of all formats that this Pillow decodes, in lower case with a dot.

    Includes HEIC with pillow-heif installed.
    """
    if importlib.util.find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(
        suffix for suffix, kind in known if kind in Image.OPEN and kind not in _NOT_DECODED
    )


def is_image(name: str) -> bool:
    """True for an image suffix; False for hidden files (macOS adds a "._NAME" to every NAME)."""
    base = os.path.basename(name)
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in image_suffixes()


def count_suffixes(names: Iterable[str]) -> str:
    """Returns how many files there are of each suffix, such as "3 .txt, 1 .heic"; hidden ones not.

    Adds what reads HEIC.
    """
    bases = (os.path.basename(name) for name in names)
    suffixes = (os.path.splitext(b)[1].lower() for b in bases if not b.startswith("."))
    counts = collections.Counter(suffix or "without suffix" for suffix in suffixes)
    heic = counts.keys() & {".heic", ".heif", ".hif"}
    hint = " (HEIC: pip install pillow-heif)" if heic else ""
    return listed([f"{count:,} {suffix}" for suffix, count in counts.most_common()]) + hint


def log_left_out(names: Iterable[str], where: str) -> None:
    """Warns of files that are not images by their suffix."""
    if kinds := count_suffixes(names):
        logger.warning(f"left out of {where}, not images that Pillow decodes: {kinds}")
