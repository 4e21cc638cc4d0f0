# SPDX-License-Identifier: Apache-2.0
"""Weights files of small random networks, and a photograph."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.photos import jpeg
from tnt_flax.data.transforms import height_width
from tnt_flax.models import create_model
from tnt_flax.weights import write
from tnt_flax.weights.names import join_collections

SMALL = dict(outer_dim=24, inner_dim=4, outer_heads=2, inner_heads=2, depth=3, num_classes=10)
PYRAMID = SMALL | dict(outer_dim=8, inner_dim=2, inner_heads=1, depths=(1, 1, 1, 1))
del PYRAMID["depth"]


def save(
    folder: pathlib.Path,
    name: str = "tnt_s_patch16_224",
    size: int | tuple[int, int] = 48,
    *,
    class_names: list[str] | None = None,
    data: dict | None = None,
    **fields,
) -> pathlib.Path:
    """Writes weights with a std of 0.3, so that attention is not uniform; returns the path.

    Args:
        folder: gets the file small.safetensors.
        name: network.
        size: of its images, in pixels, or (height, width).
        class_names: by default "class 0", ...; [] stores none.
        data: changes to the stored preprocessing.
        **fields: of the network.
    """
    small = PYRAMID if name.startswith("ptnt_") else SMALL
    model = create_model(name, **(small | fields))
    images = jax.ShapeDtypeStruct((1, *height_width(size), 3), jnp.float32)
    shapes = join_collections(jax.eval_shape(model.init, jax.random.key(0), images))
    random = np.random.default_rng(0)

    def random_leaf(path, x):
        values = random.normal(0, 0.3, x.shape)
        values = 1 + np.abs(values) if path[-1].key == "var" else values
        return values.astype(x.dtype)

    stored = {"name": name} | {k: getattr(model, k) for k in small} | fields
    stored.pop("num_classes")
    preprocessing = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_fraction": 1.0} | (data or {})
    info = {"config": {"model": stored, "data": {"image_size": size} | preprocessing}}
    if class_names is None:
        class_names = [f"class {i}" for i in range(model.num_classes)]
    if class_names:
        info["class_names"] = class_names
    path = folder / "small.safetensors"
    write.save_weights(path, jax.tree_util.tree_map_with_path(random_leaf, shapes), info)
    return path


def photo(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "china.jpg"
    path.write_bytes(jpeg("china"))
    return path
