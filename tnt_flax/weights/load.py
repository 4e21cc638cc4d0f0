# SPDX-License-Identifier: Apache-2.0
"""`tnt_flax.load`: weights of any framework as a model and variables, adapted on request."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding

from tnt_flax.core.errors import InputError
from tnt_flax.models import Network
from tnt_flax.models.network import Grid
from tnt_flax.weights.read import LoadedWeights, read_checkpoint


def load(
    path: str | pathlib.Path,
    name: str | None = None,
    *,
    weights: str = "ema",
    checkpoint: str = "best",
    state: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    sharding: Sharding | Callable[[str, tuple[int, ...]], Sharding] | None = None,
    **overrides: Any,
) -> tuple[Network, dict[str, Any]]:
    """Loads weights of any framework and logs a summary.

    Args:
        path, name, weights, checkpoint, state, overrides: see `weights.read.read_checkpoint`.
        num_classes: a number other than that of the weights creates a new head; 0 removes it. With
            a number, tensors outside of the network are left out, for instance a head of layers.
        image_size: pixels, one number or (height, width); a size other than that of the weights
            resamples the positions.
        in_channels: a number other than that of the weights adapts the stem.
        sharding: sharding of all variables, or a function of a variable's name
            ("blocks_0/outer/fc1/kernel") and shape; the first device by default.

    Returns:
        (model, variables), for `model.apply(variables, images)` with normalized images
        (B, H, W, C) and logits (B, num_classes). `variables` has the collection "params", for
        PyramidTNT also "batch_stats".

    Raises:
        InputError: see `read_checkpoint`; also for a size not divisible by the patch size.
    """

    def put(parameter: str, x: Any) -> jax.Array:
        where = sharding(parameter, x.shape) if callable(sharding) else sharding
        return jax.device_put(x, where)

    found = read_checkpoint(
        path,
        name,
        weights=weights,
        checkpoint=checkpoint,
        state=state,
        other_head=num_classes is not None,
        put=put,
        **overrides,
    )
    summary = found.summary()
    model = adapt(found, num_classes, image_size, in_channels, put=put)
    found.log_notes(summary)
    return model, found.variables


def adapt(
    found: LoadedWeights,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    *,
    new_head: bool = False,
    put: Callable[[str, Any], Any] = lambda name, x: x,
) -> Network:
    """Adapts loaded weights in place and returns the model, which may have a new head.

    Args:
        found: the weights. The changes are added to its `notes`.
        num_classes, image_size, in_channels: see `load`; None keeps those of the weights.
        new_head: replace the head even if the number of classes stays.
        put: called with the name and array of every parameter that changes.
    """
    model, network, flat = found.network.model, found.network, flatten_dict(found.params)
    changes: dict[tuple[str, ...], np.ndarray] = {}
    if num_classes is not None and (new_head or num_classes != model.num_classes):
        if num_classes < 0:
            raise InputError(f"num_classes={num_classes} is negative")
        model = model.clone(num_classes=num_classes)
        flat = {path: x for path, x in flat.items() if path[0] != "head"}
        changes |= {("head", leaf): x for leaf, x in _new_head(model).items()}
        found.notes.append(f"a new head for {num_classes} classes" if num_classes else "no head")
    if image_size is not None:
        new = _grid(image_size, model.patch_size)
        if network.grid is None and math.prod(new) != network.sentences:
            raise InputError(
                f"{found.path} has {network.sentences} sentences, not a square number: "
                f"cannot resample their positions for {new[0]}x{new[1]}"
            )
        if network.grid not in (None, new):
            resampled = model.resampled_positions(found.params, network.grid, new)
            changes |= {path: np.asarray(x) for path, x in resampled.items()}
            sizes = "{}x{} to {}x{}".format(*network.grid, *new)
            found.notes.append(f"resampled the positions from {sizes}")
    if in_channels is not None and in_channels != network.channels:
        kernel = np.asarray(flat[model.stem_kernel])
        changes[model.stem_kernel] = adapt_channels(kernel, in_channels)
        found.notes.append(f"adapted the stem to {in_channels} channels")
    flat |= {path: put("/".join(path), x) for path, x in changes.items()}
    found.variables["params"] = unflatten_dict(flat)
    return model


def _grid(image_size: int | tuple[int, int], patch_size: int) -> Grid:
    """Returns (rows, columns) of the sentences."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < patch_size or height % patch_size or width % patch_size:
        raise InputError(
            f"image_size {height}x{width} is not divisible by the patch size {patch_size}"
        )
    return height // patch_size, width // patch_size


def _new_head(model: Network) -> dict[str, np.ndarray]:
    """Returns a head initialized as in the network, with a fixed key."""
    if not model.num_classes:
        return {}
    shape = (model.num_features, model.num_classes)
    head = {"kernel": np.asarray(0.02 * jax.random.normal(jax.random.key(0), shape))}
    return head | ({"bias": np.zeros(shape[1], np.float32)} if model.head_bias else {})


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Adapts a first kernel (H, W, 3, C) to images of `channels` channels, as timm does.

    For one channel, sums over the three. For more, repeats them in turn, scaled by 3 / channels.
    """
    old = kernel.shape[2]
    if channels < 1 or old != 3:
        raise InputError(f"cannot adapt a stem of {old} channels to {channels}: it must have 3")
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    repeated = np.tile(kernel, (1, 1, math.ceil(channels / old), 1))[:, :, :channels]
    return repeated * np.float32(old / channels)
