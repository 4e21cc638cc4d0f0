# SPDX-License-Identifier: Apache-2.0
"""Real photographs for the tests: the two JPEG files in scikit-learn (640 x 427)."""

import io
import pathlib

import numpy as np
import sklearn.datasets
from PIL import Image


def jpeg(name: str) -> bytes:
    """Returns the file "china" or "flower" of scikit-learn's `load_sample_images`."""
    folder = pathlib.Path(sklearn.datasets.__file__).parent / "images"
    return (folder / f"{name}.jpg").read_bytes()


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    """Returns the file of an image; `options` are those of Pillow's `save`."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(pixels: np.ndarray) -> bytes:
    """Returns a (lossless) PNG file of the pixels."""
    return encoded(Image.fromarray(pixels))


def all_photos() -> dict[str, bytes]:
    """Returns images that reach every branch of a resize: portrait, small, thin, grey, ..."""
    china = np.asarray(Image.open(io.BytesIO(jpeg("china"))))
    return {
        "china": jpeg("china"),
        "flower": jpeg("flower"),
        "portrait": png(china[:, 100:401]),
        "small": png(china[50:127, 30:131]),
        "thin": png(china[200:211, :]),
        "grey": png(china[..., 0]),
        "square": png(china[:400, :400]),
    }
