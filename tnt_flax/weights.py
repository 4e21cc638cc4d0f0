# SPDX-License-Identifier: Apache-2.0
"""Weights alone, in a .safetensors file: parameters by name, and in its header what they belong to.

`tnt_flax.convert.checkpoints` reads it, as it reads every other system's files.
"""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from tnt_flax.state import flat_names

HEADER = "tnt_flax"


def save_weights(path: pathlib.Path, params: Any, info: dict[str, Any]) -> None:
    """Writes `params` and `info` (JSON values: config, class names) in one atomic step."""
    arrays = {name: np.asarray(x) for name, x in flat_names(jax.device_get(params)).items()}
    temporary = path.with_name(path.name + ".tmp")
    header = {HEADER: json.dumps(info)}  # one entry: the order of several is random
    temporary.write_bytes(safetensors.numpy.save(arrays, metadata=header))
    os.replace(temporary, path)
