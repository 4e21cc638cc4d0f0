# SPDX-License-Identifier: Apache-2.0
"""Writes goldens/data/randaugment.json: hashes of photographs after timm's operations.

    python tests/goldens/scripts/randaugment.py                                      (needs timm)

"sha256" has, for each photograph and operation, the first 12 digits of the SHA-256 of the pixels in
the order of `randaugment_cases.cases`. Posterizing to 0 bits fails in timm with Pillow 13; the hash
is that of black, the result with older versions. "sets" has the operations that timm samples from.
"""

import json
import pathlib
import random

import PIL
import timm
from PIL import Image, ImageOps
from timm.data import auto_augment

from tests.helpers.randaugment_cases import FILL, NAMES, cases, digest, photographs

GOLDEN = pathlib.Path(__file__).parents[1] / "data" / "randaugment.json"


def timm_posterize(image, bits_to_keep, **_):
    """Posterizes like timm with Pillow before 13."""
    if bits_to_keep >= 8:
        return image
    if bits_to_keep < 1:
        return Image.new("RGB", image.size)
    return ImageOps.posterize(image, bits_to_keep)


def timm_op(image: Image.Image, name: str, level: float, resample) -> Image.Image:
    """Applies timm's operation at this magnitude; a negative level flips its sign."""
    hparams = dict(img_mean=FILL, interpolation=resample, magnitude_max=100)
    op = auto_augment.AugmentOp(name, prob=1.0, magnitude=abs(level), hparams=hparams)
    if name.startswith("Posterize"):
        op.aug_fn = timm_posterize
    original, random.random = random.random, lambda: float(level < 0)  # > 0.5 negates
    try:
        return op(image)
    finally:
        random.random = original


def main():
    hashes = {
        photo: {
            name: " ".join(digest(timm_op(image, name, *case)) for case in cases(name))
            for name in NAMES
        }
        for photo, image in photographs().items()
    }
    choices = auto_augment.rand_augment_choices
    sets = {"inc0": choices("", increasing=False), "inc1": choices("", increasing=True)}
    versions = {m.__name__: m.__version__ for m in (timm, PIL)}
    golden = {"made_with": versions, "sets": sets, "sha256": hashes}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
