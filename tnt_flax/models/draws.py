# SPDX-License-Identifier: Apache-2.0
"""Random numbers that do not depend on how many devices share a batch.

What is drawn for a sequence depends on the key and on the sequence's place in the whole batch
alone. So each device draws for its own sequences, and together they draw what one would.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from tnt_flax.models.kernels.platform import manual_axes


def uniform(key: Key[Array, ""], shape: tuple[int, ...], axes: int = 0) -> Float[Array, "..."]:
    """Numbers in [0, 1) of that shape, with a stream of their own for all but the last `axes`.

    The first axis is the batch, or begins with it. Inside of `jax.shard_map` it is this device's
    part of the batch, which the manual axes split in their order.
    """
    rows = 1
    for size in shape[: len(shape) - axes]:
        rows *= size
    place = jnp.arange(rows, dtype=jnp.uint32)
    if manual_axes():
        place = place + jnp.uint32(rows) * jax.lax.axis_index(manual_axes()).astype(jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, place)
    draw = lambda key: jax.random.uniform(key, shape[len(shape) - axes :])
    return jax.vmap(draw)(keys).reshape(shape)
