# SPDX-License-Identifier: Apache-2.0
"""What a network's weights expect of their images, and the names of their classes.

Read from the header of our own files, from the `config.json` that timm, transformers and the
Hugging Face hub keep beside the weights, and from the dictionaries that trainers save.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from tnt_flax.core.errors import InputError, one_line

# Files that timm and transformers keep beside weights.
DESCRIPTIONS = ("config.json", "preprocessor_config.json")
PREPROCESSING_KEYS = ("mean", "std", "crop_fraction", "interpolation")  # keys of `config.data`
# Field of our networks -> argument of timm's TNT.
TIMM_ARGUMENTS = {
    "patch_size": "patch_size",
    "outer_dim": "embed_dim",
    "inner_dim": "inner_dim",
    "depth": "depth",
    "inner_heads": "num_heads_inner",
    "outer_heads": "num_heads_outer",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "inner_stride": "first_stride",
    "norm_each_word": "legacy",
}
# Keys of class names: lists of names, {index: name} or {name: index}.
CLASS_NAMES = (
    "class_names classes CLASSES label_names labels class_to_idx idx_to_class id2label label2id"
).split()
# Dictionaries inside a checkpoint that may have such keys: mmpretrain's, Lightning's.
PLACES = ("meta", "dataset_meta", "hyper_parameters", "hparams", "config")
RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers, in transformers' files
INTERPOLATIONS = ("bicubic", "bilinear")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Preprocessing of the images, and class names."""

    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    crop_fraction: float  # of the resized image that the central crop keeps
    interpolation: str = "bicubic"
    class_names: tuple[str, ...] | None = None

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The fields of PREPROCESSING_KEYS."""
        return {key: getattr(self, key) for key in PREPROCESSING_KEYS}


@dataclasses.dataclass(frozen=True)
class Description:
    """What a header or a `config.json` states. Everything in it may be missing."""

    source: str = ""  # for messages
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the network
    image_size: tuple[int, int] | None = None  # (height, width) in pixels
    notes: tuple[str, ...] = ()

    def inputs(self, defaults: Mapping[str, Any], num_classes: int, notes: list[str]) -> Inputs:
        """Returns `defaults` with what is stated, and adds to `notes` what does not apply.

        Raises:
            InputError: a value that no images can be preprocessed with.
        """
        names, stated = self.class_names, dict(self.preprocessing)
        if names is not None and num_classes and len(names) != num_classes:
            notes.append(
                f"warning: ignored the {len(names)} class names of {self.source}: the head has "
                f"{num_classes} classes"
            )
            names = None
        notes += self.notes
        if stated.get("interpolation") not in (None, *INTERPOLATIONS):
            notes.append(
                f"warning: interpolation={stated.pop('interpolation')!r} there, bicubic here"
            )
        stated = {key: x for key, x in stated.items() if x is not None}
        try:
            return _checked(Inputs(**{**defaults, **stated}, class_names=names))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{self.source} has an invalid preprocessing ({error}): correct mean, std, crop "
                "and interpolation, or remove them"
            ) from error


def _checked(inputs: Inputs) -> Inputs:
    mean, std = (tuple(map(float, x)) for x in (inputs.mean, inputs.std))
    crop_fraction = float(inputs.crop_fraction)
    valid = all(map(math.isfinite, mean + std)) and all(x > 0 for x in std)
    if not valid or len(mean) != len(std):
        raise ValueError(f"mean={mean}, std={std}")
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"a crop of {crop_fraction} of the image")
    return dataclasses.replace(inputs, mean=mean, std=std, crop_fraction=crop_fraction)


def from_header(source: str, info: Mapping[str, Any]) -> Description:
    """Describes the inputs by the header of our own files, or the info of a checkpoint."""
    data = (info.get("config") or {}).get("data") or {}
    names = info.get("class_names")
    return Description(
        source=source,
        preprocessing={key: data.get(key) for key in PREPROCESSING_KEYS},
        class_names=None if names is None else tuple(names),
    )


def from_folder(folder: pathlib.Path) -> Description | None:
    """Reads the files of DESCRIPTIONS in a folder; returns None if they state nothing.

    Raises:
        InputError: one of them is not JSON.
    """
    config_file, processor_file = (folder / name for name in DESCRIPTIONS)
    config, processor = _read_json(config_file), _read_json(processor_file)
    timm = _table(config, "pretrained_cfg") or _table(processor, "pretrained_cfg")
    if not timm and "architecture" in config:
        timm = config  # as timm wrote it until 2023
    names = class_names_in(config) or class_names_in(timm) or class_names_in(processor)
    arguments = _table(config, "model_args")
    preprocessing, notes = _from_timm(timm) if timm else _from_transformers(config | processor)
    if not (names or arguments or any(preprocessing.values())):
        return None
    return Description(
        source=str(config_file if config else processor_file),
        preprocessing=preprocessing,
        class_names=names,
        fields={
            ours: arguments[theirs]
            for ours, theirs in TIMM_ARGUMENTS.items()
            if isinstance(arguments.get(theirs), int | float)
        },
        image_size=_image_size(timm.get("input_size")),
        notes=tuple(notes),
    )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {one_line(error)}: repair or remove it") from error
    return content if isinstance(content, dict) else {}


def _image_size(size: Any) -> tuple[int, int] | None:
    """Returns (height, width) of timm's [channels, height, width]."""
    match size:
        case [int(), int(height), int(width)]:
            return height, width
    return None


def _table(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _from_timm(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    keys = dict(mean="mean", std="std", crop_fraction="crop_pct", interpolation="interpolation")
    mode = config.get("crop_mode") or "center"
    notes = [f"warning: crop_mode={mode!r} there, a central crop here"] if mode != "center" else []
    return {ours: config.get(theirs) for ours, theirs in keys.items()}, notes


def _from_transformers(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    size, crop = (_side(config.get(key)) for key in ("size", "crop_size"))
    resample = config.get("resample")
    crop_fraction, notes = config.get("crop_pct"), []
    if crop_fraction is None and size:
        is_cropped = crop and config.get("do_center_crop", True)
        crop_fraction = min(crop / size, 1.0) if is_cropped else 1.0
        if not is_cropped and "height" in _table(config, "size"):
            notes = ["warning: images are squeezed into a square there, cropped here"]
    return {
        "mean": config.get("image_mean"),
        "std": config.get("image_std"),
        "crop_fraction": crop_fraction,
        "interpolation": RESAMPLING.get(resample) if isinstance(resample, int) else resample,
    }, notes


def _side(size: Any) -> int | None:
    """Returns the pixels of a size in transformers' files: a number, or a dictionary."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int) and size > 0 else None


def class_names_in(content: Any, depth: int = 2) -> tuple[str, ...] | None:
    """Returns the class names that a dictionary states, under a usual key or in a usual place."""
    if not isinstance(content, dict) or depth < 0:
        return None
    for key in CLASS_NAMES:
        if names := _as_names(content.get(key)):
            return names
    nested = (class_names_in(content.get(place), depth - 1) for place in PLACES)
    return next(filter(None, nested), None)


def _as_names(value: Any) -> tuple[str, ...] | None:
    """Returns names by index, from a list, {index: name} or {name: index}; None for others."""
    if isinstance(value, dict):
        pairs = value.items()
        if all(type(x) is int for x in value.values()):
            pairs = ((index, name) for name, index in pairs)
        try:
            by_index = {int(index): name for index, name in pairs}
        except (TypeError, ValueError):
            return None
        value = [by_index.get(index) for index in range(len(by_index))]
    if not isinstance(value, list | tuple) or not all(type(x) is str for x in value):
        return None
    default = [f"LABEL_{i}" for i in range(len(value))]  # transformers' placeholders
    if not value or list(value) == default or len(set(value)) < len(value):
        return None
    return tuple(value)
