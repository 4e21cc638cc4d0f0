# SPDX-License-Identifier: Apache-2.0
"""Transformer in Transformer (TNT) in JAX: networks, pretrained weights, training."""

import importlib

__version__ = "0.2.0"

# Public name -> module. Imported on first use to keep `import tnt_flax` cheap.
_PUBLIC = {
    "PyramidTNT": "tnt_flax.models",
    "TNT": "tnt_flax.models",
    "block_outputs": "tnt_flax.models",
    "create_model": "tnt_flax.models",
    "feature_maps": "tnt_flax.models",
    "list_models": "tnt_flax.models",
    "load": "tnt_flax.weights.load",
    "load_classifier": "tnt_flax.inference.classifier",
    "load_exported": "tnt_flax.inference.stablehlo",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tnt_flax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
