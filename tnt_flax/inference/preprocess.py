# SPDX-License-Identifier: Apache-2.0
"""The evaluation preprocessing of loaded weights, for files, bytes, PIL images and arrays."""

import logging
import os
from typing import Any

import numpy as np
from PIL import Image

from tnt_flax.core.errors import InputError
from tnt_flax.data.images import (
    POLICY_KEYS,
    CorruptImageError,
    Policy,
    is_transparent,
    open_image,
    orientation_of,
    stored_policy,
)
from tnt_flax.data.transforms import eval_transform, height_width
from tnt_flax.weights.read import LoadedWeights

logger = logging.getLogger("tnt_flax")

Input = str | os.PathLike | bytes | Image.Image | np.ndarray


def check_images(found: LoadedWeights) -> None:
    """Raises InputError unless the network takes images of 3 channels and known size."""
    network = found.network
    if network.image_size is None or network.channels != 3:
        raise InputError(
            f"{found.path} takes images of {network.sentences} patches and {network.channels} "
            "channels; square images of 3 channels are needed, or a size in its header"
        )


class Preprocessor:
    """Prepares images as the evaluation of the weights does.

    Logs one warning each for the first image with an EXIF orientation and the first with
    transparent pixels, unless the policy covers them.

    Attributes:
        image_size: (height, width) in pixels.
        crop_fraction: the share of the resized image that the central crop keeps.
        policy: how images become 8-bit RGB.

    Args:
        found: the weights.
        **policy: changes to the policy that is stored with the weights; None changes nothing.

    Raises:
        InputError: the policy is wrong, or the network takes other images than RGB of known size.
    """

    def __init__(self, found: LoadedWeights, **policy: Any):
        check_images(found)
        if unknown := policy.keys() - set(POLICY_KEYS):
            raise InputError(f"{min(unknown)!r} is none of {', '.join(POLICY_KEYS)}")
        self.image_size = height_width(found.network.image_size)
        self.crop_fraction = found.preprocessing["crop_fraction"]
        self.interpolation = found.preprocessing["interpolation"]
        data = (found.info.get("config") or {}).get("data") or {}
        self.policy: Policy = stored_policy(data, **policy)
        self._warned: set[str] = set()

    def read(self, image: Input, name: str = "the image") -> np.ndarray:
        """Returns uint8 pixels [H, W, 3].

        Raises:
            InputError: the image cannot be read; `name` is what the message calls an image that is
                not a file. Its `__cause__` is the CorruptImageError, if there is one.
        """
        try:
            if isinstance(image, str | os.PathLike):
                name = os.fspath(image)
                with open(image, "rb") as file:
                    image = file.read()
            elif not isinstance(image, bytes | Image.Image | np.ndarray):
                kind = type(image).__name__
                raise InputError(
                    f"{name} is of type {kind}: give paths, PIL images or uint8 arrays"
                )
            opened = open_image(image, self.policy)
            self._warn(opened, name)
            return eval_transform(
                opened,
                size=self.image_size,
                crop_fraction=self.crop_fraction,
                interpolation=self.interpolation,
                policy=self.policy,
            )
        except CorruptImageError as error:
            raise InputError(f"{name} is not a usable image: {error}") from error
        except OSError as error:
            raise InputError(f"{name} cannot be read: {error.strerror or error}") from None

    def _warn(self, image, name):
        for key, (applies, problem) in _IGNORED.items():
            if key not in self._warned and not getattr(self.policy, key) and applies(image):
                self._warned.add(key)
                logger.warning(f"{name} {problem}; further images are not reported")


_IGNORED = {  # key of the policy: (whether an image needs it, what happens without it)
    "exif": (
        lambda image: orientation_of(image) != 1,
        "has an EXIF orientation, which is ignored as in training: exif=True (--exif) turns images "
        "upright",
    ),
    "background": (
        is_transparent,
        "has transparent pixels, whose hidden colors are used as in training: "
        "background=(255, 255, 255) (--background=255,255,255) puts white behind them",
    ),
}
