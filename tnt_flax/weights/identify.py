# SPDX-License-Identifier: Apache-2.0
"""Identifies the network of a set of tensors: its variant, sizes and published name."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tnt_flax.core.errors import InputError
from tnt_flax.models import MODELS, NETWORKS, TNT, Network, PyramidTNT, class_of, create_model
from tnt_flax.weights.names import place_of

# The variants that each framework's code can compute.
VARIANTS_OF = {
    "tnt_flax": tuple(TNT.variants),
    "huawei": ("official",),
    "timm": ("official", "legacy"),
    "mmpretrain": ("legacy",),
    "mindspore": ("mindspore",),
    "mindspore_pets": ("mindspore_pets",),
    "huawei_pyramid": ("pyramid",),
}

# Fields of TNT that do not change the function it computes at inference.
FREE_FIELDS = {"dtype", "remat", "unroll", "inner_impl", "outer_impl", "parent", "name"}
FREE_FIELDS |= {"dropout", "attention_dropout", "drop_path", "uniform_drop_path"}
# Preprocessing of each variant's published weights, from the evaluation code of its framework: mean
# and standard deviation per channel of images in [0, 1], and the size of the central crop relative
# to the resized image. All others are as "official".
_HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
PREPROCESSING = {
    "official": _HALF | dict(crop_fraction=0.9),
    "mindspore": dict(
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_fraction=224 / 256
    ),
    "mindspore_pets": _HALF | dict(crop_fraction=1.0),
}


def function_fields(model: Network) -> dict[str, Any]:
    """Returns the fields that determine the function of the model."""
    names = (field.name for field in dataclasses.fields(model))
    return {name: getattr(model, name) for name in names if name not in FREE_FIELDS}


# Architecture fields that few file formats store.
UNSTORED_FIELDS = ("outer_heads", "inner_heads", "patch_size")


def unstored_fields(model: Network) -> dict[str, Any]:
    """Returns the architecture fields that cannot be inferred from foreign checkpoints."""
    return {k: x for k, x in function_fields(model).items() if k in UNSTORED_FIELDS}


@dataclasses.dataclass(frozen=True)
class SizedNetwork:
    """A network with the number of sentences (N) and of image channels of its weights."""

    model: Network
    sentences: int
    channels: int
    stored_size: Sequence[int] | int | None = None  # pixels, as the header of our files has it

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the sentences: those stored, else of a square; None if unknown."""
        match self.stored_size:
            case int(height), int(width):
                grid = height // self.model.patch_size, width // self.model.patch_size
                if math.prod(grid) == self.sentences:
                    return grid
        side = math.isqrt(self.sentences)
        return (side, side) if side * side == self.sentences else None

    @property
    def image_size(self) -> int | tuple[int, int] | None:
        """Pixels of the images: one number if they are square, else (height, width) or None."""
        if self.grid is None:
            return None
        height, width = (side * self.model.patch_size for side in self.grid)
        return height if height == width else (height, width)

    def abstract_variables(self) -> dict[str, Any]:
        """Returns shapes and dtypes of the variables, by collection.

        Raises:
            InputError: the grid of the sentences is unknown, and the network needs several rows.
        """
        side, grid = self.model.patch_size, self.grid or (1, self.sentences)
        if self.grid is None and self.model.min_grid > 1:
            raise InputError(f"{self.sentences} sentences form no square")
        shape = (1, side * grid[0], side * grid[1], self.channels)
        return _abstract_variables(self.model, shape)


@functools.lru_cache(maxsize=4)  # tracing takes longer than reading a small file
def _abstract_variables(model: Network, shape: tuple[int, ...]) -> dict[str, Any]:
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def identify(
    path: Any,
    naming: str,
    shapes: Mapping[str, tuple[int, ...]],
    name: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> SizedNetwork:
    """Identifies a network by the shapes of its tensors.

    Files lack the numbers of heads: they come from `name`, `overrides` or a published network.

    Args:
        path: the file, for error messages.
        naming: the naming of its tensors, one of `names.NAMINGS`.
        shapes: shape of each tensor by our per-block name.
        name: published name that the network must have.
        overrides: further fields of the model.

    Raises:
        InputError: a tensor that every TNT has is missing, the heads are not known, or the network
            is not the one called `name`.
    """
    overrides = dict(overrides or {})
    pyramid = naming == "huawei_pyramid" or "/".join(PyramidTNT.stem_kernel) in shapes
    network = PyramidTNT if pyramid else TNT
    first_block = "stages_0/blocks/0" if pyramid else "blocks/0"
    try:
        if pyramid:
            fields = _pyramid_fields(shapes)
        else:
            fields = _tnt_fields(path, naming, shapes, overrides.get("patch_size", 16))
        fields["mlp_ratio"] = shapes[f"{first_block}/outer/fc1/kernel"][-1] / fields["outer_dim"]
    except KeyError as error:
        place = place_of(naming, error.args[0])
        missing = place.name if place else error.args[0]
        raise InputError(f"{path} is not a complete {naming} TNT: {missing} is missing") from error
    fields["num_classes"] = shapes["head/kernel"][-1] if "head/kernel" in shapes else 0
    fields["se"] = f"{first_block}/outer/se/fc1/kernel" in shapes
    fields["layer_scale"] = f"{first_block}/outer/layer_scale1" in shapes
    fields |= _heads(path, fields, name, overrides, network)
    return _sized(path, create_model(network.base_name, **(fields | overrides)), shapes, name)


def _tnt_fields(path: Any, naming: str, shapes: Mapping, patch_size: int) -> dict[str, Any]:
    depth = _count(shapes, "blocks/")
    inner = [i for i in range(depth) if f"blocks/{i}/inner/norm1/scale" in shapes]
    fields = dict(
        outer_dim=shapes["cls_token"][-1],
        inner_dim=shapes["word_embed/conv/kernel"][-1],
        depth=depth,
        vanilla_blocks=tuple(sorted(set(range(depth)) - set(inner))),
        qkv_bias="blocks/0/outer/attention/query/bias" in shapes,
        patch_size=patch_size,
        inner_stride=_stride(path, shapes["word_pos"][-2], patch_size),
    )
    return fields | variant_fields(_variant(naming, shapes, inner))


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Returns the sizes of a TNT that its tensors determine alone; empty if they are missing."""
    if "sentence_pos" not in shapes or "word_pos" not in shapes:
        return {}
    found = {"outer_dim": shapes["sentence_pos"][-1], "inner_dim": shapes["word_pos"][-1]}
    return found | {"depth": _count(shapes, "blocks/")}


def _pyramid_fields(shapes: Mapping) -> dict[str, Any]:
    return dict(
        outer_dim=shapes["sentence_pos"][-1],
        inner_dim=shapes["word_pos"][-1],
        outer_heads=shapes["stages_0/relative_pos"][1],
        depths=tuple(_count(shapes, f"stages_{i}/blocks/") for i in range(4)),
    )


def _count(shapes: Mapping, prefix: str) -> int:
    """Returns the number of blocks whose names begin with `prefix`."""
    numbers = (int(n.removeprefix(prefix).split("/")[0]) for n in shapes if n.startswith(prefix))
    return 1 + max(numbers, default=-1)


def from_config(
    path: Any,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    name: str | None,
    overrides: Mapping[str, Any],
) -> SizedNetwork:
    """Returns the network of a config of ours, with open sizes taken from the tensors.

    Args:
        path: the file or folder, for error messages.
        config: as stored with the weights; its "model" has the name and the fields.
        shapes: shape of each tensor by our per-block name.
        name: published name that the network must have.
        overrides: fields that do not change the function, or have the stored value.

    Raises:
        InputError: the tensors are of another network, or `name` or `overrides` disagree.
    """
    fields = {k: v for k, v in config["model"].items() if v is not None and k not in FREE_FIELDS}
    fields["num_classes"] = shapes["head/kernel"][1] if "head/kernel" in shapes else 0
    stored = create_model(config["model"]["name"], **fields)
    model = create_model(config["model"]["name"], **(fields | dict(overrides)))
    check_same(path, stored, model, "what was asked for")
    blocks = len({m[0] for m in map(re.compile(r"(stages_\d/)?blocks/\d+/").match, shapes) if m})
    if model.depth != blocks:
        raise InputError(f"{path} describes {model.depth} blocks, but holds {blocks}")
    if "/".join(model.stem_kernel) not in shapes:
        raise InputError(f"{path} describes a {type(model).__name__}, but has no tensors of one")
    size = (config.get("data") or {}).get("image_size")
    return _sized(path, model, shapes, name, size)


def _sized(
    path: Any, model: Network, shapes: Mapping, name: str | None, size: Any = None
) -> SizedNetwork:
    """Checks that `model` is the network called `name`, and reads its input sizes."""
    if name is not None:
        check_same(path, model, create_model(name, num_classes=model.num_classes), name)
    sentences = shapes["sentence_pos"][-2] - model.has_class_token
    return SizedNetwork(model, sentences, shapes["/".join(model.stem_kernel)][-2], size)


def name_of(model: Network) -> str | None:
    """Returns the published name of a network with the sizes and variant of `model`, if any."""
    for name in MODELS:
        if not differences(model, create_model(name, num_classes=model.num_classes)):
            return name
    return None


def variant_fields(variant: str) -> dict[str, Any]:
    """Returns all fields in which variants differ, with qkv_bias only where it is fixed."""
    (network,) = (network for network in NETWORKS.values() if variant in network.variants)
    fields = {field for variant in network.variants.values() for field in variant} - {"qkv_bias"}
    defaults = {field: network.__dataclass_fields__[field].default for field in sorted(fields)}
    return defaults | network.variants[variant]


def variant_of(model: Network) -> str:
    """Returns the published variant of a model, or "other" for a mixture."""
    for variant in model.variants:
        if all(getattr(model, f) == value for f, value in variant_fields(variant).items()):
            return variant
    return "other"


def differences(a: Network, b: Network) -> dict[str, tuple[Any, Any]]:
    """Returns the fields that make two models different functions, with both values."""
    if type(a) is not type(b):
        return {"network": (type(a).__name__, type(b).__name__)}
    ours, theirs = function_fields(a), function_fields(b)
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


def check_same(path: Any, found: Network, wanted: Network, wanted_name: str) -> None:
    """Raises InputError with the differences unless both compute the same function."""
    changed = differences(found, wanted)
    if changed:
        listed = "; ".join(f"{name}: {a} -> {b}" for name, (a, b) in changed.items())
        raise InputError(
            f"{path} is {name_of(found) or 'another network'}, not {wanted_name} ({listed})"
        )


def _variant(naming: str, shapes: Mapping[str, Any], inner: Sequence[int]) -> str:
    """Returns the variant, by tensors that only it has. All tensors are checked later."""
    if len(VARIANTS_OF[naming]) == 1:
        return VARIANTS_OF[naming][0]
    if naming == "tnt_flax" and "proj/norm2/scale" not in shapes:
        return "mindspore_pets"
    if naming == "tnt_flax" and "word_embed/conv/bias" not in shapes:
        return "mindspore"
    has_norm = not inner or f"blocks/{inner[0]}/proj/norm2/scale" in shapes
    return "official" if has_norm else "legacy"


def _stride(path: Any, words: int, patch_size: int) -> int:
    side = math.isqrt(words)
    stride = math.ceil(patch_size / max(side, 1))
    if side * side != words or math.ceil(patch_size / stride) != side:
        raise InputError(
            f"{path} has {words} words per sentence, which no stride gives in patches of "
            f"{patch_size} pixels: set patch_size="
        )
    return stride


def _heads(
    path: Any, fields: Mapping, name: str | None, overrides: Mapping, network: type
) -> dict[str, int]:
    """Returns missing numbers of heads, from the published network of the same widths."""
    keys = [key for key in ("inner_heads", "outer_heads") if key not in fields]
    outer, inner = fields["outer_dim"], fields["inner_dim"]
    for known in [name] if name else MODELS:
        model = MODELS[known]
        if class_of(known) is network and (model["outer_dim"], model["inner_dim"]) == (
            outer,
            inner,
        ):
            return {key: model[key] for key in keys}
    if missing := [f"{key}=" for key in keys if key not in overrides]:
        raise InputError(
            f"{path} has sentences of width {outer} and words of width {inner}, not a published "
            f"size, and no file stores the heads: set {' and '.join(missing)}"
        )
    return {}
