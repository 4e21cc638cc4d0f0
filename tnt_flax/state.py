# SPDX-License-Identifier: Apache-2.0
"""Everything that a training step changes, and nothing else."""

import hashlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax


@flax.struct.dataclass
class TrainState:
    """Arrays only, so that a checkpoint of it is a complete run."""

    step: jax.Array  # updates applied so far
    params: Any
    opt_state: optax.OptState
    ema: Any  # exponential moving average of params

    @classmethod
    def create(cls, params, tx: optax.GradientTransformation) -> "TrainState":
        """Step 0. The average starts at the initial weights and has no warm-up, as published."""
        ema = jax.tree.map(jnp.copy, params)  # its own buffers: the step donates both
        return cls(jnp.zeros((), jnp.int32), params, tx.init(params), ema)


def flat_names(tree) -> dict[str, Any]:
    """{"blocks_0/inner/fc1/kernel": leaf, ...} in sorted order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def fingerprint(params) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters: equal only if they all are."""
    digest = hashlib.sha256()
    for name, leaf in flat_names(params).items():
        array = np.asarray(jax.device_get(leaf))
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
