# SPDX-License-Identifier: Apache-2.0
"""The published networks by name, and the function that builds them."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from tnt_flax.core.errors import InputError, did_you_mean
from tnt_flax.models.features import FeatureMap, block_outputs, feature_maps
from tnt_flax.models.network import Network
from tnt_flax.models.pyramid_tnt import PyramidTNT
from tnt_flax.models.tnt import TNT, VARIANTS

__all__ = [
    "MODELS",
    "FeatureMap",
    "TNT",
    "Network",
    "PyramidTNT",
    "VARIANTS",
    "block_outputs",
    "create_model",
    "feature_maps",
    "list_models",
]

# Classes by the first part of their names in MODELS.
NETWORKS: dict[str, type] = {"tnt": TNT, "ptnt": PyramidTNT}

# Sizes: paper, Table 1. TNT-Ti has 2 inner heads, not 4.
_TI = dict(outer_dim=192, inner_dim=12, outer_heads=3, inner_heads=2)
_S = dict(outer_dim=384, inner_dim=24, outer_heads=6, inner_heads=4)
_B = dict(outer_dim=640, inner_dim=40, outer_heads=10, inner_heads=4)

MODELS: dict[str, dict[str, Any]] = {
    "tnt_ti_patch16_224": _TI,
    "tnt_s_patch16_224": _S,
    "tnt_b_patch16_224": _B,
    "tnt_s_legacy_patch16_224": _S | VARIANTS["legacy"],
    "tnt_b_legacy_patch16_224": _B | VARIANTS["legacy"],
    "tnt_s_mindspore_patch16_224": _S | VARIANTS["mindspore"],
    "tnt_b_mindspore_patch16_224": _B | VARIANTS["mindspore"],
    "tnt_b_mindspore_pets_patch16_384": _B | VARIANTS["mindspore_pets"] | dict(num_classes=37),
    # PyramidTNT as in the authors' code. A sentence is 8x8 pixels, in spite of the names.
    "ptnt_ti_patch16_192": dict(
        outer_dim=80, inner_dim=5, outer_heads=2, inner_heads=1, depths=(2, 6, 3, 2)
    ),
    "ptnt_s_patch16_256": dict(
        outer_dim=128, inner_dim=8, outer_heads=4, inner_heads=2, depths=(2, 8, 4, 2)
    ),
    "ptnt_m_patch16_256": dict(
        outer_dim=192, inner_dim=12, outer_heads=4, inner_heads=2, depths=(2, 8, 6, 2)
    ),
    "ptnt_b_patch16_256": dict(
        outer_dim=256, inner_dim=16, outer_heads=4, inner_heads=2, depths=(2, 10, 6, 2)
    ),
}


def list_models() -> list[str]:
    """Returns the names that `create_model` accepts, sorted."""
    return sorted(MODELS)


def class_of(name: str) -> type:
    """Returns the class of the network that has this name in MODELS."""
    return NETWORKS[name.partition("_")[0]]


def create_model(name: str, **overrides: Any) -> Network:
    """Builds a published network.

    Args:
        name: one of `list_models()`.
        **overrides: fields of the network's class, `TNT` or `PyramidTNT`. `dtype` may be a name
            such as "bfloat16".

    Raises:
        InputError: the name or a field is unknown; the message suggests the nearest one.
    """
    if name not in MODELS:
        guess = did_you_mean(name, MODELS)
        raise InputError(f"unknown model {name!r}{guess}; known: {list_models()}")
    network = class_of(name)
    known = {field.name for field in dataclasses.fields(network)} - {"parent", "name"}
    for field in overrides:
        if field not in known:
            guess = did_you_mean(field, known)
            raise InputError(f"{network.__name__} has no field {field!r}{guess}")
    fields = MODELS[name] | overrides
    try:
        fields["dtype"] = jnp.dtype(fields.get("dtype", "float32"))
    except TypeError as error:
        raise InputError(
            f"dtype={fields['dtype']!r} is not a valid type: use 'float32' or 'bfloat16'"
        ) from error
    for field in ("vanilla_blocks", "depths"):
        if field in fields:
            fields[field] = tuple(fields[field])
    return network(**fields)
