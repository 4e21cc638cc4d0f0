# SPDX-License-Identifier: Apache-2.0
"""What happens to a batch of pixels on the device, inside the compiled step.

The host ships uint8 (a quarter of the bytes of float32); see `tnt_flax.data` for its half.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


def normalize(
    images: UInt8[Array, "B H W 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B H W 3"]:
    """Scales pixels of 0..255 by `mean` and `std`, which are per channel and on the scale 0..1."""
    offset = np.asarray(mean, np.float32)[None, None, None] * 255
    scale = np.asarray(std, np.float32)[None, None, None] * 255
    return (images.astype(jnp.float32) - offset) / scale
