# SPDX-License-Identifier: Apache-2.0
"""RandAugment with the config strings of timm, such as "rand-m9-mstd0.5-inc1".

Arguments and pixels of the operations are bit-identical to timm 1.0.31; both call PIL. The random
numbers are not timm's: they come from the generator of the sample. Sources: `auto_augment.py` in
timm, and Cubuk et al., arXiv 1909.13719.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from tnt_flax.core.errors import InputError

RESAMPLE = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)  # filters of geometric operations
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's filter
UNIFORM_ABOVE = 100  # with a larger `mstd` magnitudes are uniform from 0 to m

Pixels = Image.Image | np.ndarray  # an RGB image; the array is uint8 [H, W, 3]
# (image, name, level, filter, fill) -> image, see `apply_op`
ApplyOp = Callable[[Pixels, str, float, Image.Resampling, tuple[int, int, int]], Pixels]

# ------------------------------------------------------------------------------------- operations


def as_image(pixels: Pixels) -> Image.Image:
    """Returns a PIL image of the pixels."""
    return Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels


def _posterize(image, bits):
    if bits < 1:  # 2.3 % of the samples at m9-mstd0.5; Pillow 13 refuses it, older ones gave black
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def _solarize_threshold(level):
    return min(256, int(level / 10 * 256))


def _solarize_add(image, level):
    add = min(128, int(level / 10 * 110))
    table = [min(255, i + add) if i < 128 else i for i in range(256)]
    return image.point(table * len(image.getbands()))


def enhance_factor(name: str, level: float) -> float:
    """Returns the factor of the enhancer `name`: 0 degenerates the image, 1 keeps it."""
    if name.endswith("Increasing"):
        return max(0.1, 1.0 + level / 10 * 0.9)
    return level / 10 * 1.8 + 0.1


def _enhance(name, image, level):
    enhancer = getattr(ImageEnhance, name.removesuffix("Increasing"))
    return enhancer(image).enhance(enhance_factor(name, level))


_ENHANCERS = ("Color", "Contrast", "Brightness", "Sharpness")
# Called with (image, level). Operations without an argument ignore the level.
PLAIN = {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
    "Posterize": lambda image, level: _posterize(image, int(level / 10 * 4)),
    "PosterizeIncreasing": lambda image, level: _posterize(image, 4 - int(level / 10 * 4)),
    "Solarize": lambda image, level: ImageOps.solarize(image, _solarize_threshold(level)),
    "SolarizeIncreasing": lambda image, level: ImageOps.solarize(
        image, 256 - _solarize_threshold(level)
    ),
    "SolarizeAdd": _solarize_add,
} | {name: functools.partial(_enhance, name) for name in _ENHANCERS}
# Called with (image, level); the level has a random sign.
SIGNED = {
    name: functools.partial(_enhance, name) for name in (f"{name}Increasing" for name in _ENHANCERS)
}
# The level has a random sign.
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def affine_matrix(
    name: str, level: Any, width: int, height: int, xp: ModuleType = math
) -> tuple[Any, ...]:
    """Returns the matrix of one of GEOMETRIC, from coordinates of the result to those of the image.

    `xp` is math, or jax.numpy for a traced `level`.
    """
    part = level / 10
    match name:
        case "ShearX":
            return 1, part * 0.3, 0, 0, 1, 0
        case "ShearY":
            return 1, 0, 0, part * 0.3, 1, 0
        case "TranslateXRel":
            return 1, 0, part * 0.45 * width, 0, 1, 0
        case "TranslateYRel":
            return 1, 0, 0, 0, 1, part * 0.45 * height
    angle = xp.radians(part * 30.0)
    cos, sin, x, y = xp.cos(angle), xp.sin(angle), width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


def cubic_weights(f: Any) -> tuple[Any, ...]:
    """Returns the weights of the pixels at -1, 0, 1 and 2 for a position `f` in [0, 1)."""
    near = lambda t: t**3 - 2 * t**2 + 1  # with the parameter -1 of Pillow's transforms
    far = lambda t: -(t**3) + 2 * t**2 - t
    return far(f), near(f), near(1 - f), far(1 - f)


def apply_op(
    image: Pixels, name: str, level: float, resample: Image.Resampling, fill: tuple[int, int, int]
) -> Pixels:
    """Applies an operation to an RGB image with Pillow; nothing here is random.

    Args:
        image: the image.
        name: one of PLAIN, SIGNED or GEOMETRIC.
        level: the magnitude; SIGNED and GEOMETRIC take both signs.
        resample, fill: for GEOMETRIC, the filter and the color of pixels from outside the image.
    """
    image = as_image(image)
    if name == "Rotate":
        return image.rotate(level / 10 * 30.0, resample, fillcolor=fill)
    if name in GEOMETRIC:
        matrix = affine_matrix(name, level, *image.size)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)
    return (SIGNED if name in SIGNED else PLAIN)[name](image, level)


# --------------------------------------------------------------------------------------- sampling

# Without and with `inc1`, which makes the effect of every operation increase with the magnitude.
PLAIN_OPS = (
    "AutoContrast Equalize Invert Rotate Posterize Solarize SolarizeAdd Color Contrast Brightness "
    "Sharpness ShearX ShearY TranslateXRel TranslateYRel"
).split()
INCREASING_OPS = [
    f"{op}Increasing" if f"{op}Increasing" in (*PLAIN, *SIGNED) else op for op in PLAIN_OPS
]


class OpCall(NamedTuple):
    """An operation with sampled arguments, as passed to `apply_op`."""

    name: str
    level: float
    resample: Image.Resampling


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies randomly sampled operations one after the other. Created by `parse`."""

    ops: tuple[str, ...]  # to sample from, uniformly and with replacement
    num_ops: int  # per image
    probability: float  # of applying a sampled operation
    magnitude: float  # mean of the normally distributed magnitude
    magnitude_std: float  # its standard deviation; inf: uniform from 0 to `magnitude`
    max_magnitude: float  # magnitudes are clipped to [0, max_magnitude]
    fill: tuple[int, int, int]  # color of pixels from outside the image

    def __call__(
        self, image: Pixels, generator: np.random.Generator, apply_op: ApplyOp = apply_op
    ) -> Pixels:
        """Returns the augmented RGB image, of the same size."""
        for call in self.sample(generator):
            image = apply_op(image, *call, self.fill)
        return image

    def sample(self, generator: np.random.Generator) -> list[OpCall]:
        """Samples the operations for one image, in the order of timm."""
        calls = []
        # The numbers of `generator.choice`, which takes ten times as long.
        for name in (self.ops[i] for i in generator.integers(len(self.ops), size=self.num_ops)):
            if generator.random() >= self.probability:
                continue
            level, resample = self._sample_magnitude(generator), RESAMPLE[0]
            if name not in PLAIN and generator.random() >= 0.5:
                level = -level
            if name in GEOMETRIC:
                resample = RESAMPLE[int(generator.random() < 0.5)]
            calls.append(OpCall(name, level, resample))
        return calls

    def _sample_magnitude(self, generator):
        level = self.magnitude
        if self.magnitude_std == math.inf:
            level = generator.uniform(0, level)
        elif self.magnitude_std > 0:
            level = generator.normal(level, self.magnitude_std)
        return max(0.0, min(level, self.max_magnitude))


# ----------------------------------------------------------------------------------- config string

# Section: (default, least value, largest value); the default's type is that of the section
_SECTIONS = {
    "m": (10, 0, math.inf),
    "n": (2, 1, math.inf),
    "p": (0.5, 0, 1),
    "mstd": (0.0, 0, math.inf),
    "mmax": (10, 1, math.inf),
    "inc": (0, 0, 1),
}


def parse(config: str, mean: Sequence[float]) -> RandAugment:
    """Parses a config string of timm, such as "rand-m9-mstd0.5-inc1".

    The string is "rand" followed by sections in any order, here with their defaults: `m10` the
    magnitude; `mstd0` its standard deviation (above 100: uniform from 0 to m); `mmax10` its upper
    bound; `n2` operations per image; `p0.5` the probability of each; `inc0` or `inc1` the list of
    operations.

    Sections that timm silently ignores are refused, and its named sets (`t3a`, ...) are not
    supported. `inc0` is the plain list, as in current timm; in timm 0.3.2, which trained the
    published TNT, it meant `inc1`.

    `mean`, per channel in 0..1, is the color of pixels from outside the image.
    Raises InputError for an invalid string.
    """
    problem = f"augment.randaugment={config!r}: "
    kind, *sections = config.split("-")
    if kind != "rand":
        raise InputError(problem + f'{kind!r} is not known: the string must begin with "rand-"')
    values = {}
    for section in sections:
        found = re.fullmatch(rf"({'|'.join(_SECTIONS)})([0-9]+(?:\.[0-9]*)?)", section)
        if not found:
            known = ", ".join(_SECTIONS)
            raise InputError(problem + f"{section!r} is not a number after one of {known}")
        key, text = found.groups()
        if key in values:
            raise InputError(problem + f"{key!r} occurs twice")
        default, least, largest = _SECTIONS[key]
        whole = isinstance(default, int)
        value = float(text)
        if not least <= value <= largest or (whole and not text.isdigit()):
            what = "a whole number" if whole else "a number"
            problem += f"{section!r} is out of range: {key} is {what} from {least} to {largest}"
            raise InputError(problem)
        values[key] = int(value) if whole else value
    values = {key: default for key, (default, _, _) in _SECTIONS.items()} | values
    return RandAugment(
        ops=tuple(INCREASING_OPS if values["inc"] else PLAIN_OPS),
        num_ops=values["n"],
        probability=values["p"],
        magnitude=values["m"],
        magnitude_std=math.inf if values["mstd"] > UNIFORM_ABOVE else values["mstd"],
        max_magnitude=values["mmax"],
        fill=tuple(min(255, round(255 * channel)) for channel in mean),
    )
