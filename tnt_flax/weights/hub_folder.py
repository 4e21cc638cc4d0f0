# SPDX-License-Identifier: Apache-2.0
"""A folder as timm and the Hugging Face hub want it: config.json, model.safetensors, README.md."""

import json
import pathlib
from typing import Any

from tnt_flax.core.errors import InputError
from tnt_flax.weights import identify
from tnt_flax.weights import write as targets
from tnt_flax.weights.read import Checkpoint

WEIGHTS = "model.safetensors"
# timm's published names; other sizes are one of them with other arguments.
ARCHITECTURES = ("tnt_s_patch16_224", "tnt_b_patch16_224", "tnt_s_legacy_patch16_224")


def facts(found: Checkpoint) -> dict[str, Any]:
    """What has to be known to use the weights; JSON values."""
    model, grid = found.network.model, found.network.grid
    if grid is None:
        raise InputError(f"{found.path} is not for square images: their size is not known")
    prepared = found.preprocessing
    return {
        "network": found.name or "tnt",
        "lineage": identify.lineage_of(model),
        "image_size": found.network.image_size,
        "mean": list(prepared["mean"]),
        "std": list(prepared["std"]),
        "crop_fraction": prepared["crop_fraction"],
        "num_classes": model.num_classes,
        "class_names": list(found.class_names) if found.class_names else None,
    }


def timm_arguments(target: targets.Target, found: Checkpoint) -> dict[str, Any]:
    """The arguments of timm's TNT that make this network.

    Raises:
        InputError: the images are not square.
    """
    model = target.model
    return {
        "img_size": facts(found)["image_size"],
        "patch_size": model.patch_size,
        "in_chans": found.network.channels,
        "num_classes": model.num_classes,
        "embed_dim": model.outer_dim,
        "inner_dim": model.inner_dim,
        "depth": model.depth,
        "num_heads_inner": model.inner_heads,
        "num_heads_outer": model.outer_heads,
        "mlp_ratio": model.mlp_ratio,
        "qkv_bias": model.qkv_bias,
        "first_stride": model.inner_stride,
        "legacy": model.norm_each_word,
    }


def write(folder: pathlib.Path, target: targets.Target, found: Checkpoint) -> None:
    """Writes the three files; raises what `targets.write` raises, which reads the weights back."""
    folder.mkdir()
    targets.write(folder / WEIGHTS, "timm", target, found)
    config = hub_config(target, found)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(config, target, found))


def hub_config(target: targets.Target, found: Checkpoint) -> dict[str, Any]:
    known, arguments = facts(found), timm_arguments(target, found)
    architecture = found.name if found.name in ARCHITECTURES else ARCHITECTURES[0]
    for name in ("in_chans", "num_classes"):  # they stand elsewhere in the file
        arguments.pop(name)
    size = known["image_size"]
    config = {
        "architecture": architecture,
        "num_classes": known["num_classes"],
        "num_features": target.model.outer_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [found.network.channels, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": known["crop_fraction"],
            "mean": known["mean"],
            "std": known["std"],
            "first_conv": "pixel_embed.proj",
            "classifier": "head",
        },
    }
    if known["class_names"]:
        config["label_names"] = known["class_names"]
    return config


def model_card(config: dict[str, Any], target: targets.Target, found: Checkpoint) -> str:
    """README.md: what the hub shows. The licence of the weights is for their owner to add."""
    known, model = facts(found), found.network.model
    classes = f"{known['num_classes']} classes" if known["num_classes"] else "features, no head"
    size = known["image_size"]
    notes = "".join(f"- {note}\n" for note in target.notes)
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- transformer-in-transformer
---
# {known["network"]}

Transformer in Transformer ([paper](https://arxiv.org/abs/2103.00112)), the {known["lineage"]}
network: {found.num_params:,} parameters, {model.depth} blocks, images of {size} pixels, {classes}.
Converted by tnt_flax from {found.naming} weights.
{notes}
Images are resized to {size} / {known["crop_fraction"]:.4g} pixels (bicubic), cropped at the centre,
and normalized with mean {tuple(known["mean"])} and standard deviation {tuple(known["std"])}.

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True)  # or hf-hub:OWNER/NAME
```

```python
import tnt_flax

model, variables = tnt_flax.load(
    "FOLDER/{WEIGHTS}", inner_heads={model.inner_heads}, outer_heads={model.outer_heads}
)
```
"""
