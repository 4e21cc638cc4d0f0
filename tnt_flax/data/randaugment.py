# SPDX-License-Identifier: Apache-2.0
"""RandAugment as timm spells, draws and computes it: "rand-m9-mstd0.5-inc1".

The arguments of the operations and their pixels equal those of timm 1.0.31 bit for bit; both call
PIL. The random numbers are not timm's: each comes from the generator of the sample. Sources: timm's
`auto_augment.py` and Cubuk et al., arXiv 1909.13719.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from tnt_flax.core.errors import InputError

MAX_LEVEL = 10  # magnitudes are clipped here, unless `mmax` says otherwise
RESAMPLE = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)  # one drawn per geometric call
UNIFORM_ABOVE = 100  # a larger `mstd` means magnitudes uniform from 0 to m

# --------------------------------------------------------------------------------- the operations


def _posterize(image, bits):
    if bits < 1:  # 2.3 % of the draws at m9-mstd0.5; Pillow 13 refuses what used to be black
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def _solarize_threshold(level):
    return min(256, int(level / 10 * 256))


def _solarize_add(image, level):
    add = min(128, int(level / 10 * 110))
    table = [min(255, i + add) if i < 128 else i for i in range(256)]
    return image.point(table * len(image.getbands()))


def _enhance(enhancer, image, level):
    return enhancer(image).enhance(level / 10 * 1.8 + 0.1)


def _enhance_increasing(enhancer, image, level):
    return enhancer(image).enhance(max(0.1, 1.0 + level / 10 * 0.9))


def _desaturate(image, level):
    return ImageEnhance.Color(image).enhance(1.0 - min(1.0, 0.5 + 0.5 * (level / 10)))


def _gaussian_blur(image, level):
    return image.filter(ImageFilter.GaussianBlur(min(2.0, 0.1 + (2.0 - 0.1) * (level / 10))))


def _rotate(image, level, resample, fill):
    return image.rotate(level / 10 * 30.0, resample, fillcolor=fill)


def _affine(matrix, image, level, resample, fill):
    data = matrix(level / 10, *image.size)
    return image.transform(image.size, Image.Transform.AFFINE, data, resample, fillcolor=fill)


# Called with (image, level). An operation that takes no argument ignores the level.
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
    "Color": functools.partial(_enhance, ImageEnhance.Color),
    "Contrast": functools.partial(_enhance, ImageEnhance.Contrast),
    "Brightness": functools.partial(_enhance, ImageEnhance.Brightness),
    "Sharpness": functools.partial(_enhance, ImageEnhance.Sharpness),
    "Desaturate": _desaturate,
    "GaussianBlur": _gaussian_blur,
}
# Called likewise; the level has a random sign.
SIGNED = {
    "ColorIncreasing": functools.partial(_enhance_increasing, ImageEnhance.Color),
    "ContrastIncreasing": functools.partial(_enhance_increasing, ImageEnhance.Contrast),
    "BrightnessIncreasing": functools.partial(_enhance_increasing, ImageEnhance.Brightness),
    "SharpnessIncreasing": functools.partial(_enhance_increasing, ImageEnhance.Sharpness),
}
# Of (L, width, height), L being level / 10: from coordinates of the result to those of the image.
MATRICES = {
    "ShearX": lambda L, w, h: (1, L * 0.3, 0, 0, 1, 0),
    "ShearY": lambda L, w, h: (1, 0, 0, L * 0.3, 1, 0),
    "TranslateXRel": lambda L, w, h: (1, 0, L * 0.45 * w, 0, 1, 0),
    "TranslateYRel": lambda L, w, h: (1, 0, 0, 0, 1, L * 0.45 * h),
}
# Called with (image, level, resample, fill); the level has a random sign.
GEOMETRIC = {"Rotate": _rotate} | {
    name: functools.partial(_affine, matrix) for name, matrix in MATRICES.items()
}


def apply_op(
    image: Image.Image,
    name: str,
    level: float,
    resample: Image.Resampling,
    fill: tuple[int, int, int],
) -> Image.Image:
    """The RGB image after the operation `name`; no argument is drawn here.

    `level` is the magnitude, negative for the other direction of the operations in SIGNED and
    GEOMETRIC. Only the latter use `resample`, and `fill` for what comes from outside the image.
    """
    if name in GEOMETRIC:
        return GEOMETRIC[name](image, level, resample, fill)
    return (SIGNED if name in SIGNED else PLAIN)[name](image, level)


# ------------------------------------------------------------------------------- what can be drawn

# Without and with `inc1`. In the latter a larger magnitude never means a weaker effect.
PLAIN_OPS = (
    "AutoContrast Equalize Invert Rotate Posterize Solarize SolarizeAdd Color Contrast Brightness "
    "Sharpness ShearX ShearY TranslateXRel TranslateYRel"
).split()
INCREASING_OPS = (
    "AutoContrast Equalize Invert Rotate PosterizeIncreasing SolarizeIncreasing SolarizeAdd "
    "ColorIncreasing ContrastIncreasing BrightnessIncreasing SharpnessIncreasing ShearX ShearY "
    "TranslateXRel TranslateYRel"
).split()
# The sets that `t` names: operations, or operations and their weights.
NAMED_SETS = {
    "weights": {"Rotate": 3, "ShearX": 2, "ShearY": 2, "TranslateXRel": 1, "TranslateYRel": 1}
    | dict.fromkeys(["ColorIncreasing", "SharpnessIncreasing", "AutoContrast"], 0.25)
    | dict.fromkeys(["SolarizeIncreasing", "SolarizeAdd", "ContrastIncreasing"], 0.05)
    | dict.fromkeys(["BrightnessIncreasing", "Equalize", "PosterizeIncreasing", "Invert"], 0.05),
    "3a": ["SolarizeIncreasing", "Desaturate", "GaussianBlur"],  # DeiT III's "3-Augment"
    "3aw": {"SolarizeIncreasing": 6, "Desaturate": 6, "GaussianBlur": 6}
    | {"Rotate": 3, "ShearX": 2, "ShearY": 2}
    | dict.fromkeys(["PosterizeIncreasing", "AutoContrast", "ColorIncreasing"], 1)
    | dict.fromkeys(["SharpnessIncreasing", "ContrastIncreasing", "BrightnessIncreasing"], 1)
    | dict.fromkeys(["Equalize", "Invert"], 1),
}


class OpCall(NamedTuple):
    """One operation with what was drawn for it; the arguments of `apply_op`."""

    name: str
    level: float
    resample: Image.Resampling


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Some operations drawn at random, one after the other; use `parse` to make one.

    Of `ops`, `num_ops` are drawn, with replacement and equally likely, or, with `weights` (which
    sum to 1), without replacement. Each is then carried out with this `probability`, at a magnitude
    normal around `magnitude` (uniform below it, if `magnitude_std` is inf), clipped to
    [0, `max_magnitude`].
    """

    ops: tuple[str, ...]
    weights: tuple[float, ...] | None
    num_ops: int
    probability: float
    magnitude: float
    magnitude_std: float
    max_magnitude: float
    fill: tuple[int, int, int]

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        """The augmented RGB image, of the same size."""
        for call in self.draw(generator):
            image = apply_op(image, *call, self.fill)
        return image

    def draw(self, generator: np.random.Generator) -> list[OpCall]:
        """What to do to one image, drawn in timm's order."""
        replace = self.weights is None
        chosen = generator.choice(len(self.ops), self.num_ops, replace, self.weights)
        calls = []
        for name in (self.ops[i] for i in chosen):
            if generator.random() >= self.probability:
                continue
            level, resample = self._draw_magnitude(generator), RESAMPLE[0]
            if name not in PLAIN and generator.random() >= 0.5:
                level = -level
            if name in GEOMETRIC:
                resample = RESAMPLE[int(generator.random() < 0.5)]
            calls.append(OpCall(name, level, resample))
        return calls

    def _draw_magnitude(self, generator):
        level = self.magnitude
        if self.magnitude_std == math.inf:
            level = generator.uniform(0, level)
        elif self.magnitude_std > 0:
            level = generator.normal(level, self.magnitude_std)
        return max(0.0, min(level, self.max_magnitude))


# -------------------------------------------------------------------------------------- the string

# Section -> type, least and largest value.
_SECTIONS = {
    "m": (int, 0, math.inf),
    "n": (int, 1, math.inf),
    "p": (float, 0, 1),
    "mstd": (float, 0, math.inf),
    "mmax": (int, 1, math.inf),
    "inc": (int, 0, 1),
}


def parse(config: str, mean: Sequence[float]) -> RandAugment:
    """What timm makes of a string such as "rand-m9-mstd0.5-inc1".

    "rand", then in any order, each with its default: m10 the magnitude; mstd0 its standard
    deviation (above 100: uniform from 0 to m); mmax10 its upper bound; n2 operations per image;
    p0.5 the probability of each; inc0 or inc1 the list of operations; or a named set: tweights
    (weighted), t3a, t3aw (weighted). `mean`, per channel on the scale 0..1, is the colour of what
    comes from outside the image.

    What timm ignores is refused: sections without a number, unknown sets, repeated sections.
    `inc0` is the plain list, as in timm today. In timm 0.3.2, which trained the published TNT, it
    meant inc1. Raises InputError.
    """
    problem = f"augment.randaugment={config!r}: "
    kind, *sections = config.split("-")
    if kind != "rand":
        raise InputError(problem + f'{kind!r} is not known, the string begins with "rand-"')
    values = {}
    for section in sections:
        key, text = re.fullmatch(r"(t|\D*)(.*)", section, re.DOTALL).groups()
        if key in values:
            raise InputError(problem + f"{key!r} is there twice")
        values[key] = _value(problem, section, key, text)
    ops = values.get("t", INCREASING_OPS if values.get("inc") else PLAIN_OPS)
    weights = None
    num_ops = values.get("n", 2)
    if isinstance(ops, dict):
        if num_ops > len(ops):
            raise InputError(problem + f"n{num_ops} is more than the {len(ops)} operations")
        weights = tuple(weight / sum(ops.values()) for weight in ops.values())
    std = values.get("mstd", 0)
    return RandAugment(
        ops=tuple(ops),
        weights=weights,
        num_ops=num_ops,
        probability=values.get("p", 0.5),
        magnitude=values.get("m", 10),
        magnitude_std=math.inf if std > UNIFORM_ABOVE else std,
        max_magnitude=values.get("mmax", MAX_LEVEL),
        fill=tuple(min(255, round(255 * channel)) for channel in mean),
    )


def _value(problem, section, key, text):
    if key == "t":
        if text not in NAMED_SETS:
            raise InputError(
                problem + f"no set {text!r}, did you mean {_nearest(text, NAMED_SETS)}?"
            )
        return NAMED_SETS[text]
    if key not in _SECTIONS:
        guess = _nearest(key, [*_SECTIONS, "t"])
        raise InputError(problem + f"no section {section!r}, did you mean {guess}")
    kind, least, largest = _SECTIONS[key]
    if not re.fullmatch("[0-9]+" if kind is int else r"[0-9]+(\.[0-9]*)?", text):
        what = "a whole number" if kind is int else "a number"
        raise InputError(problem + f"{key!r} takes {what}, not {text!r}")
    value = kind(text)
    if not least <= value <= largest:
        raise InputError(problem + f"{section!r} is out of range: {key} is {least} to {largest}")
    return value


def _nearest(word, known):
    guess = difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]
    return f"{guess!r}? ({', '.join(known)})"
