# SPDX-License-Identifier: Apache-2.0
"""Random weights without compiling an initialization."""

import jax
import jax.numpy as jnp
import numpy as np


def random_params(model, size, seed=0):
    """Returns parameters for images of `size` pixels: norm scales near 1, all others small."""
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    generator = np.random.default_rng(seed)

    def draw(path, x):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(generator.normal(mean, 0.02, x.shape).astype(np.float32))

    return jax.tree_util.tree_map_with_path(draw, shapes)
