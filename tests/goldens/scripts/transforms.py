# SPDX-License-Identifier: Apache-2.0
"""Writes goldens/data/eval_pixels.json: SHA-256 of timm's evaluation pixels.

    python tests/goldens/scripts/transforms.py                                       (needs timm)

The hashes are of uint8 pixels [size, size, 3]. "decoded" is the hash of the photograph before
resizing, so that a failing test shows whether the decoder or the resize changed.
"""

import hashlib
import io
import json
import pathlib

import numpy as np
import PIL
import timm
import torch
import torchvision
from PIL import Image

from tests.helpers.photos import all_photos

SIZES = (192, 224, 256, 384)
CROP_FRACTION = 0.9
GOLDEN = pathlib.Path(__file__).parents[1] / "data" / "eval_pixels.json"


def sha256(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def timm_pixels(image: Image.Image, size: int) -> np.ndarray:
    """Returns timm's evaluation pixels without normalization, uint8 [size, size, 3]."""
    transform = timm.data.create_transform(
        size,
        is_training=False,
        crop_pct=CROP_FRACTION,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    normalized = transform(image).numpy().transpose(1, 2, 0)
    return np.round((normalized * 0.5 + 0.5) * 255).astype(np.uint8)


def main():
    hashes = {}
    for name, encoded in all_photos().items():
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        hashes[name] = {"decoded": sha256(np.asarray(image))}
        hashes[name] |= {str(size): sha256(timm_pixels(image, size)) for size in SIZES}
    versions = {m.__name__: m.__version__ for m in (timm, torch, torchvision, PIL)}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({"made_with": versions, "sha256": hashes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
