# SPDX-License-Identifier: Apache-2.0
"""The parts of TNT alone: stem, projection of words to sentences, block."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import numpy_tnt
from tests.helpers.networks import SILENT_INNER, SILENT_OUTER, build, edited, jit, normal
from tnt_flax.models import VARIANTS, block_outputs
from tnt_flax.models.layers import TransformerBlock
from tnt_flax.models.tnt_blocks import TNTBlock, WordEmbedding, WordsToSentences

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
    "conv_first, changed", [(False, {0}), (True, {0, 1, 3, 4})], ids=["official", "legacy"]
)
def test_only_legacy_windows_cross_patch_borders(conv_first, changed):
    """Pixel (15, 15) is the lower right corner of the first of 2 x 3 patches."""
    embed = WordEmbedding(4, conv_first=conv_first)
    images = normal(1, 32, 48, 3)
    variables = jit(embed.init)(jax.random.key(0), images)
    before = jit(embed.apply)(variables, images)
    after = jit(embed.apply)(variables, images.at[0, 15, 15].add(1.0))
    differs = np.asarray((before != after).any(axis=(2, 3)))[0]
    assert set(np.flatnonzero(differs)) == changed


def test_word_positions_are_added_by_word_and_channel():
    model, params, images = build(depth=1)
    params = edited(params, SILENT_INNER | {"word_embed/conv/kernel": 0, "conv/bias": 0})
    params["word_pos"] = np.arange(16 * 8, dtype=np.float32).reshape(1, 16, 8)
    (block,) = jit(functools.partial(block_outputs, model))({"params": params}, images)
    expected = np.broadcast_to(params["word_pos"][:, None], (2, 6, 16, 8))
    np.testing.assert_array_equal(block["words"], expected)


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


@pytest.mark.parametrize("norm_each_word", [False, True])
def test_words_are_flattened_word_after_word(norm_each_word):
    """Word m alone has a large channel c, so that m * C + c is the largest of the sentence."""
    words = jnp.eye(16 * 8).reshape(1, 128, 16, 8)
    project = WordsToSentences(128, norm_each_word=norm_each_word, norm_out=False)
    params = jit(project.init)(jax.random.key(0), words)["params"]
    params["dense"]["kernel"] = jnp.eye(128)
    out = jit(project.apply)({"params": params}, words)
    np.testing.assert_array_equal(out[0].argmax(axis=-1), np.arange(128))


def test_words_are_added_to_their_sentence_and_not_to_the_class_token():
    words, sentences = normal(2, 6, 16, 8), normal(2, 7, 24, seed=1)
    block = TNTBlock(TransformerBlock(2), WordsToSentences(24), TransformerBlock(3))
    shapes = jax.eval_shape(
        lambda: block.init(jax.random.key(0), words, sentences, None, train=False)
    )
    params = edited(numpy_tnt.random_params(shapes["params"]), SILENT_OUTER)
    step = jit(functools.partial(block.apply, drop_path_rate=None, train=False))
    new_words, new = step({"params": params}, words, sentences)
    np.testing.assert_array_equal(new[:, 0], sentences[:, 0])
    update = WordsToSentences(24).apply({"params": params["proj"]}, new_words)
    np.testing.assert_allclose(new[:, 1:] - sentences[:, 1:], update, atol=1e-5)


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


def test_sentences_add_up_the_projections_of_updated_words():
    model, params, images = build()
    params = edited(params, SILENT_OUTER)
    blocks = jit(functools.partial(block_outputs, model))({"params": params}, images)
    for i, (before, after) in enumerate(itertools.pairwise(blocks), start=1):
        proj = jax.tree.map(lambda x, i=i: x[i], params["blocks_0"]["proj"])
        update = WordsToSentences(24).apply({"params": proj}, after["words"])
        assert np.abs(after["words"] - before["words"]).max() > 0.1
        change = after["sentences"] - before["sentences"]
        np.testing.assert_allclose(change[:, 1:], update, atol=2e-5)
        np.testing.assert_array_equal(change[:, 0], 0)


# -- Initial values


@pytest.mark.parametrize("channels, bound", [(3, 0.0824786), (1, 0.1428571)])
def test_the_stems_convolution_starts_with_torchs_default(channels, bound):
    embed = WordEmbedding(1024)
    conv = jit(embed.init)(jax.random.key(0), jnp.zeros((1, 16, 16, channels)))["params"]["conv"]
    for x in (conv["kernel"], conv["bias"]):  # uniform in +-bound
        assert 0.98 * bound < x.max() <= bound
        assert -bound <= x.min() < -0.98 * bound
        assert abs(x.std() / (bound / 3**0.5) - 1) < 0.08
        assert abs(x.mean()) < 0.1 * bound
