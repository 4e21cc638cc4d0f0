# SPDX-License-Identifier: Apache-2.0
"""TNT in training: gradients, implementations, rematerialization, dropout, initial values."""

import functools
import itertools

import flax.errors
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import numpy_tnt
from tests.helpers.networks import (
    CAPTURED,
    SILENT_INNER,
    SILENT_OUTER,
    apply,
    build,
    captured,
    edited,
    jit,
    loss,
    value_and_gradients,
)
from tnt_flax.models import TNT, VARIANTS

# -- Gradients


@functools.cache
def reference_gradients(variant, **fields):
    return value_and_gradients(*build(**VARIANTS[variant], **fields))


PLAIN = dict(inner_impl="reference", outer_impl="reference", remat="none")


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, fields",
    [
        ("official", dict(inner_impl="cpu", outer_impl="cpu")),
        ("official", dict(remat="block")),
        ("official", dict(remat="block", unroll=True)),
        ("official", dict(inner_impl="lanes")),
        ("mindspore_pets", dict(inner_impl="cpu", outer_impl="cpu", remat="block")),
    ],
    ids=str,
)
def test_implementations_and_remat_do_not_change_the_gradients(variant, fields):
    value, gradients = reference_gradients(variant, **PLAIN)
    other_value, other_gradients = reference_gradients(variant, **(PLAIN | fields))
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    assert_near(other_gradients, gradients)


def assert_near(found, expected):
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6 * largest)


@pytest.mark.slow
def test_remat_stores_fewer_activations():
    def stored(remat):
        """Returns the bytes that the forward pass keeps for the backward pass."""
        model, params, images = build((16, 32, 48, 3), depth=12, remat=remat)
        backward = jax.eval_shape(
            lambda: jax.vjp(functools.partial(loss, model, images), params)[1]
        )
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

    assert stored("block") < 0.5 * stored("none")


@pytest.mark.slow
def test_only_the_reference_has_forward_mode_derivatives():
    model, params, images = build(inner_impl="reference", outer_impl="reference", depth=1)
    moved = jax.jvp(lambda x: model.apply({"params": params}, x), (images,), (images,))[1]
    assert jnp.isfinite(moved).all() and jnp.abs(moved).max() > 0
    fast = model.clone(outer_impl="cpu")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: fast.apply({"params": params}, x), (images,), (images,))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{}, dict(depth=1), dict(vanilla_blocks=(2,)), dict(se=True)], ids=str
)
def test_skipping_unused_tokens_of_the_last_block_changes_nothing(fields):
    """Where intermediates are captured, all tokens of the last block are computed."""
    model, params, images = build(**fields)

    def logits_and_gradients(mutable):
        def loss(params):
            found = model.apply({"params": params}, images, mutable=mutable)
            logits = found[0] if mutable else found
            return jnp.sin(logits).sum(), logits

        return jit(jax.grad(loss, has_aux=True))(params)

    gradients, logits = logits_and_gradients(False)
    all_gradients, all_logits = logits_and_gradients(CAPTURED)
    np.testing.assert_allclose(logits, all_logits, atol=2e-6)
    assert_near(gradients, all_gradients)


@pytest.mark.parametrize("se", [False, True])
def test_the_last_block_computes_the_class_token_alone(se):
    """Unless squeeze-excite reads the mean over all tokens."""
    model, params, images = build(depth=1, outer_dim=96, se=se)

    def flops(**kwargs):
        run = functools.partial(model.apply, **kwargs)
        return jax.jit(run).lower({"params": params}, images).cost_analysis()["flops"]

    ratio = flops() / flops(mutable=["maps"])
    assert ratio > 0.99 if se else ratio < 0.8


# -- Drop path and dropout

# Every update is a constant: 1 of attention, 10 of the MLP, 100 of the projection.
CONSTANT_UPDATES = {
    name: {"attention/out/bias": 1, "fc2/bias": 10}.get(name.split("/", 1)[1], 0)
    for name in SILENT_INNER | SILENT_OUTER
} | {
    "blocks_0/proj/norm2/scale": 0,
    "blocks_0/proj/norm2/bias": 100,
    "word_embed/conv/kernel": 0,
    "word_embed/conv/bias": 0,
    "word_pos": 0,
    "cls_token": 0,
    "sentence_pos": 0,
}


def decode(change, keep):
    """Splits (attention + 10 MLP) / keep into two arrays of zeros and ones."""
    code = np.rint(np.asarray(change) * keep)
    np.testing.assert_allclose(change, code / keep, atol=1e-3)
    assert set(np.unique(code)) <= {0, 1, 10, 11}
    return code % 10, code // 10


def dropped_updates(model, params, images, key):
    """Returns the masks of the inner updates (B, N) and the outer ones (B,) of every block."""
    run = functools.partial(model.apply, train=True, mutable=CAPTURED)
    _, state = jit(run)({"params": params}, images, rngs={"dropout": key})
    words = jnp.diff(captured(state)["words"], axis=0, prepend=0)
    sentences = np.array(jnp.diff(captured(state)["sentences"], axis=0, prepend=0))
    masks = []
    for i, rate in enumerate(np.linspace(0, model.drop_path, model.depth)):
        word_change, sentence_change = np.asarray(words[i]), sentences[i]
        sentence_change[:, 1:] -= 100  # the projection is never dropped
        np.testing.assert_array_equal(word_change, word_change[:, :, :1, :1] + 0 * word_change)
        np.testing.assert_allclose(
            sentence_change, sentence_change[:, :1, :1] + 0 * sentence_change, atol=1e-3
        )
        inner = decode(word_change[:, :, 0, 0], 1 - rate)
        outer = decode(sentence_change[:, 0, 0], 1 - rate)
        masks.append((*inner, *outer))
    return masks


def test_drop_path_has_independent_masks_per_sequence_and_branch():
    model, params, images = build((64, 32, 48, 3), drop_path=0.5)
    params = edited(params, CONSTANT_UPDATES)
    params["proj"] = edited(params["proj"], {"norm2/scale": 0, "norm2/bias": 0})
    masks = jax.tree.map(np.asarray, dropped_updates(model, params, images, jax.random.key(1)))

    assert all((mask == 1).all() for mask in masks[0])  # block 0 drops nothing
    for i, keep in ((1, 0.75), (2, 0.5)):
        for mask in masks[i]:
            assert abs(mask.mean() - keep) < 4 * (keep * (1 - keep) / mask.size) ** 0.5
        for mask in masks[i][:2]:
            assert (mask != mask[:, :1]).any()  # one sample per sentence, not per image
    # The masks of all branches and blocks differ, and agree by chance only.
    for mask, other in itertools.combinations([mask for block in masks[1:] for mask in block], 2):
        one, two = np.broadcast_arrays(*(x.reshape(64, -1) for x in (mask, other)))
        assert (one != two).any(axis=0).all()
    for mask, other in itertools.combinations([m for block in masks[1:] for m in block[:2]], 2):
        assert abs(np.corrcoef(mask.ravel(), other.ravel())[0, 1]) < 0.25  # 384 samples: 5 sigma


@functools.cache
def official_logits():
    return apply(*build())


@pytest.mark.parametrize(
    "rate",
    [
        "drop_path",
        pytest.param("dropout", marks=pytest.mark.slow),
        pytest.param("attention_dropout", marks=pytest.mark.slow),
    ],
)
def test_training_mode_is_random_and_evaluation_is_not(rate):
    model, params, images = build(**{rate: 0.5})
    variables = {"params": params}
    np.testing.assert_array_equal(apply(model, params, images), official_logits())
    train = jit(lambda key: model.apply(variables, images, train=True, rngs={"dropout": key}))
    one, same, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-2
    assert np.abs(one - official_logits()).max() > 1e-2
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        model.apply(variables, images, train=True)


def test_training_mode_without_rates_needs_no_rng():
    logits = apply(*build(), train=True)
    np.testing.assert_allclose(logits, official_logits(), atol=1e-6)


@pytest.mark.slow
def test_dropout_of_positions_applies_to_sentences_alone():
    model, params, images = build((8, 32, 48, 3), depth=1, dropout=0.5)
    params = edited(params, SILENT_INNER | SILENT_OUTER | {"blocks_0/proj/norm2/scale": 0})
    params = edited(params, {"blocks_0/proj/norm2/bias": 0})

    run = functools.partial(model.apply, train=True, mutable=CAPTURED)
    rngs = {"dropout": jax.random.key(0)}
    trained = captured(jit(run)({"params": params}, images, rngs=rngs)[1])
    _, trace = numpy_tnt.tnt(model, params, images)
    words, sentences = (np.stack([image[0][i] for image in trace]) for i in (0, 1))
    np.testing.assert_allclose(trained["words"][0], words, atol=1e-5)
    ratio = np.asarray(trained["sentences"][0] / sentences)
    np.testing.assert_allclose(ratio, 2 * np.rint(ratio / 2), atol=0.02)
    assert 0.45 < np.mean(ratio > 1) < 0.55
    assert 0 < np.mean(ratio[:, 0] > 1) < 1  # the class token's too


# -- Initial values


@pytest.mark.slow
def test_initial_values_are_the_published_distributions():
    model = TNT(outer_dim=192, inner_dim=24, outer_heads=3, inner_heads=4, depth=2)
    params = jit(model.init)(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    for name in ("sentence_pos", "word_pos", "cls_token"):
        x = params[name]
        assert abs(x.std() - 0.02) < 0.02 * 4 / (2 * x.size) ** 0.5, name
    assert abs(params["sentence_pos"]).max() > 0.07  # not cut at 2 sigma
    for kernel in (params["head"], params["proj"]["dense"], params["blocks_0"]["proj"]["dense"]):
        assert abs(kernel["kernel"].std() - 0.02) < 2e-4  # 73,728 samples or more: 4 sigma
        assert 0.075 < abs(kernel["kernel"]).max() < 0.14
    np.testing.assert_array_equal(params["head"]["bias"], 0)
    np.testing.assert_array_equal(params["proj"]["dense"]["bias"], 0)
    query = params["blocks_0"]["outer"]["attention"]["query"]["kernel"]
    assert (query[0] != query[1]).mean() > 0.99  # every block of a group has its own
