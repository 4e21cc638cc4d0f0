# SPDX-License-Identifier: Apache-2.0
"""The parts of TNT alone: stem, projection of words to sentences, block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.networks import SILENT_OUTER, build, edited, jit, normal
from tnt_flax.models import VARIANTS, block_outputs
from tnt_flax.models.tnt_blocks import WordEmbedding

# -- The stem


@pytest.mark.parametrize("conv_first", [False, True])
def test_windows_begin_three_pixels_before_their_word(conv_first):
    """With all impulses of one patch: image p is 1 at pixel p and 0 elsewhere."""
    impulses = jnp.eye(256).reshape(256, 16, 16, 1)
    kernel = normal(7, 7, 1, 2)
    embed = WordEmbedding(2, conv_first=conv_first, use_bias=False)
    words = embed.apply({"params": {"conv": {"kernel": kernel}}}, impulses)
    expected = np.zeros((16, 16, 4, 4, 2), np.float32)
    for y, x, row, column in np.ndindex(16, 16, 4, 4):
        dy, dx = y - (4 * row - 3), x - (4 * column - 3)
        if 0 <= dy < 7 and 0 <= dx < 7:
            expected[y, x, row, column] = kernel[dy, dx, 0]
    np.testing.assert_allclose(words.reshape(expected.shape), expected, atol=1e-6)


@pytest.mark.parametrize(
    "variant, block_norm, block_dense, block_norm2, stem_dense, stem_norm2",
    [
        ("official", (3, 128), {"kernel"}, True, {"kernel", "bias"}, True),
        ("legacy", (3, 8), {"kernel", "bias"}, False, {"kernel", "bias"}, True),
        ("mindspore", (3, 128), {"kernel"}, True, {"kernel"}, True),
        ("mindspore_pets", (3, 128), {"kernel", "bias"}, False, {"kernel", "bias"}, False),
    ],
)
def test_parameters_of_the_projections(
    variant, block_norm, block_dense, block_norm2, stem_dense, stem_norm2
):
    params = build(**VARIANTS[variant])[1]
    block, stem = params["blocks_0"]["proj"], params["proj"]
    assert block["norm1"]["scale"].shape == block_norm
    assert (block["dense"].keys(), "norm2" in block) == (block_dense, block_norm2)
    assert stem["norm1"]["scale"].shape == (128,)  # over all words in every variant
    assert (stem["dense"].keys(), "norm2" in stem) == (stem_dense, stem_norm2)


# -- From words to sentences


@pytest.mark.slow
def test_a_patch_reaches_only_its_sentence_before_the_outer_attention():
    """By the nonzero entries of the Jacobian of sentence n with respect to patch k."""
    model, params, images = build((1, 32, 48, 3), depth=1)
    params = edited(params, SILENT_OUTER)
    direction = normal(24, seed=2)  # a sum over the channels would vanish after a LayerNorm

    def sentences(images):
        return block_outputs(model, {"params": params}, images)[0]["sentences"][0] @ direction

    jacobian = np.abs(jit(jax.jacrev(sentences))(images)).reshape(7, 2, 16, 3, 16, 3)
    per_patch = jacobian.max(axis=(2, 4, 5)).reshape(7, 6)
    expected = np.concatenate([np.zeros((1, 6), bool), np.eye(6, dtype=bool)])
    np.testing.assert_array_equal(per_patch > 0, expected)
    assert (jacobian.max(axis=(0, 5)) > 0).all()  # every pixel of every patch is read


# -- Initial values


@pytest.mark.slow
@pytest.mark.parametrize("channels, bound", [(3, 0.0824786), (1, 0.1428571)])
def test_the_stems_convolution_starts_with_torchs_default(channels, bound):
    embed = WordEmbedding(1024)
    conv = jit(embed.init)(jax.random.key(0), jnp.zeros((1, 16, 16, channels)))["params"]["conv"]
    for x in (conv["kernel"], conv["bias"]):  # uniform in +-bound
        assert 0.98 * bound < x.max() <= bound
        assert -bound <= x.min() < -0.98 * bound
        assert abs(x.std() / (bound / 3**0.5) - 1) < 0.08
        assert abs(x.mean()) < 0.1 * bound
