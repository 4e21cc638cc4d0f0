# SPDX-License-Identifier: Apache-2.0
"""What every network refuses, in the same words."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from tnt_flax.core.errors import InputError


def check_images(images: Array, patch_size: int) -> None:
    """Raises InputError unless these are normalized images that `patch_size` divides."""
    if images.ndim != 4:
        raise InputError(f"images must be [B, H, W, channels], not {list(images.shape)}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images must be normalized to floats first, these are {images.dtype}")
    height, width = images.shape[1:3]
    if not height or not width or height % patch_size or width % patch_size:
        raise InputError(f"image size {height}x{width} is not divisible by patch size {patch_size}")


def check_known(model: nn.Module, **fields: tuple[str, ...]) -> None:
    """Raises InputError unless each of these fields has one of the values given for it."""
    for field, known in fields.items():
        if getattr(model, field) not in known:
            raise InputError(f"{field}={getattr(model, field)!r} is none of {known}")


def check_rates(model: nn.Module) -> None:
    """Raises InputError unless all rates of dropping are in [0, 1)."""
    for rate in ("dropout", "attention_dropout", "drop_path"):
        if not 0 <= getattr(model, rate) < 1:
            raise InputError(f"{rate}={getattr(model, rate)} is outside [0, 1)")


def positions(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    init: Callable[..., Array],
) -> Array:
    """The table of positions `name`, a parameter.

    Raises:
        InputError: the weights' table has another shape, which is that of other images.
    """
    if module.has_variable("params", name):
        found = module.get_variable("params", name).shape
        if found != shape:
            raise InputError(
                f"the weights' {name} has shape {tuple(found)}, but these images and this "
                f"patch size need {shape}: give images of the size the weights were made for"
            )
    return jnp.asarray(module.param(name, init, shape))
