# SPDX-License-Identifier: Apache-2.0
"""Weights alone, in a .safetensors file: parameters by name, and in its header what they belong to.

`tnt_flax.weights.read` reads it, as it reads every other system's files.
"""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from tnt_flax.core.trees import named_leaves

HEADER = "tnt_flax"


def save_weights(path: pathlib.Path, params: Any, info: dict[str, Any]) -> None:
    """Writes `params` and `info` (JSON values: config, class names) in one atomic step."""
    arrays = {name: np.asarray(x) for name, x in named_leaves(jax.device_get(params)).items()}
    write_tensors(path, arrays, {HEADER: json.dumps(info)})


def write_tensors(
    path: pathlib.Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """Writes a .safetensors file in one atomic step; of several `metadata` the order is random."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(safetensors.numpy.save(tensors, metadata=metadata))
    os.replace(temporary, path)
