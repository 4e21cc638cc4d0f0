# SPDX-License-Identifier: Apache-2.0
"""Weights alone, in a .safetensors file: parameters by name, and in its header what they belong to.

Reading it runs no code, and every tensor is accounted for.
"""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from tnt_flax.errors import InputError
from tnt_flax.state import check_fit, flat_names

HEADER = "tnt_flax"


def save_weights(path: pathlib.Path, params: Any, info: dict[str, Any]) -> None:
    """Writes `params` and `info` (JSON values: config, class names) in one atomic step."""
    arrays = {name: np.asarray(x) for name, x in flat_names(jax.device_get(params)).items()}
    temporary = path.with_name(path.name + ".tmp")
    header = {HEADER: json.dumps(info)}  # one entry: the order of several is random
    temporary.write_bytes(safetensors.numpy.save(arrays, metadata=header))
    os.replace(temporary, path)


def load_weights(path: pathlib.Path, abstract_params: Any) -> tuple[Any, dict[str, Any]]:
    """Returns (params, info); params have exactly the names, shapes and types asked for.

    Raises:
        InputError: no such file, not a safetensors file, or one that `check_fit` refuses.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as f:
            info = json.loads((f.metadata() or {}).get(HEADER, "{}"))
            found = {name: f.get_tensor(name) for name in f.keys()}
    except FileNotFoundError as error:
        raise InputError(f"there is no weights file {path}") from error
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is not a whole weights file of ours: {error}") from error

    wanted = flat_names(abstract_params)
    check_fit(path, found, wanted)
    structure = jax.tree.structure(abstract_params)
    return jax.tree.unflatten(structure, [found[name] for name in wanted]), info
