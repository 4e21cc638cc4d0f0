# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np

from tnt_flax.augment import normalize


def test_normalize_as_published():
    pixels = np.array([0, 127, 128, 255], np.uint8).repeat(3).reshape(1, 2, 2, 3)
    out = normalize(jnp.asarray(pixels), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, ((pixels.astype(np.float32)) - 127.5) / 127.5)


def test_normalize_per_channel():
    out = normalize(jnp.full((1, 1, 1, 3), 255, jnp.uint8), (0.0, 0.5, 0.25), (1.0, 0.5, 0.25))
    np.testing.assert_allclose(out[0, 0, 0], [1, 1, 3], rtol=1e-6)
