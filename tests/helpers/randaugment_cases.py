# SPDX-License-Identifier: Apache-2.0
"""The operations, magnitudes and photographs of goldens/data/randaugment.json."""

import hashlib

from PIL import Image

from tests.helpers.photos import all_photos
from tnt_flax.data.images import decode
from tnt_flax.data.randaugment import GEOMETRIC, PLAIN, RESAMPLE, SIGNED

FILL = (128, 128, 128)
NO_ARGUMENT = {"AutoContrast", "Equalize", "Invert"}
LEVELS = (0.0, 2.4, 5.0, 7.4, 9.0, 9.62, 10.0, 18.0, 23.0)  # above 10 with an `mmax`
NAMES = (*PLAIN, *SIGNED, *GEOMETRIC)
BOXES = {  # parts of the photographs: square, upright, smaller, grey
    "china": (200, 100, 424, 324),
    "flower": (250, 20, 400, 220),
    "small": (0, 0, 101, 77),
    "grey": (300, 150, 420, 250),
}


def photographs() -> dict[str, Image.Image]:
    encoded = all_photos()
    return {name: decode(encoded[name]).crop(box) for name, box in BOXES.items()}


def cases(name: str) -> list[tuple[float, Image.Resampling]]:
    """Returns the (level, filter) pairs to test `name` with; levels may be negative."""
    if name in NO_ARGUMENT:
        return [(5.0, RESAMPLE[0])]
    levels = LEVELS if name in PLAIN else (*LEVELS, *(-level for level in LEVELS[1:]))
    return [
        (level, resample)
        for level in levels
        for resample in (RESAMPLE if name in GEOMETRIC else RESAMPLE[:1])
    ]


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()[:12]
