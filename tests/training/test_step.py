# SPDX-License-Identifier: Apache-2.0
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tnt_flax.core.trees import named_leaves
from tnt_flax.models import TNT
from tnt_flax.models.pyramid_tnt import BatchNorm
from tnt_flax.training import mixup
from tnt_flax.training.optimizer import Optimizer, make_optimizer
from tnt_flax.training.step import (
    Scores,
    TrainState,
    make_augment,
    make_eval_step,
    make_train_step,
    score,
    sum_scores,
)

HALF = (0.5, 0.5, 0.5)
OPTIONS = dict(label_smoothing=0.1, mean=HALF, std=HALF)


class Linear(nn.Module):
    """Mean color to logits."""

    num_classes: int = 7

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(self.num_classes, name="head")(images.mean(axis=(1, 2)))


@pytest.fixture
def batch():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
    return {"image": jnp.asarray(images), "label": jnp.arange(6)}


def start(model=None, tx=None, ema_decay=0.9, **changes):
    model, tx = model or Linear(), tx or optax.sgd(0.5)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), train=False)
    augment = make_augment(model.num_classes, **OPTIONS | changes)
    schedule = optax.constant_schedule(0.5)
    step = jax.jit(make_train_step(model, Optimizer(tx, schedule), augment, ema_decay=ema_decay))
    return TrainState.create(variables, tx), step


def test_one_step_updates_weights_ema_and_count(batch):
    state, step = start()
    new, metrics = step(state, batch, jax.random.key(1))
    assert int(new.step) == 1
    assert metrics["learning_rate"] == 0.5
    old_kernel, kernel = state.params["head"]["kernel"], new.params["head"]["kernel"]
    assert not np.array_equal(old_kernel, kernel)
    np.testing.assert_allclose(
        new.ema["params"]["head"]["kernel"], 0.9 * old_kernel + 0.1 * kernel, rtol=1e-5, atol=1e-7
    )
    moved = jax.tree.map(lambda a, b: a - b, new.params, state.params)
    np.testing.assert_allclose(optax.tree.norm(moved), 0.5 * metrics["grad_norm"], rtol=1e-4)


class Normed(nn.Module):
    """As Linear, behind a BatchNorm."""

    num_classes: int = 7

    @nn.compact
    def __call__(self, images, *, train):
        colors = BatchNorm(name="batch_norm")(images, train=train).mean(axis=(1, 2))
        return nn.Dense(self.num_classes, name="head")(colors)


@pytest.mark.parametrize("freeze, moving", [("", True), ("scale", True), ("^(?!head/)", False)])
def test_frozen_statistics_normalize_as_in_evaluation(batch, freeze, moving):
    model, tx = Normed(), optax.sgd(0.5)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), train=False)
    variables["batch_stats"]["batch_norm"]["mean"] += 0.3
    state = TrainState.create(variables, tx)
    augment = make_augment(7, **OPTIONS)
    schedule = optax.constant_schedule(0.5)
    step = make_train_step(model, Optimizer(tx, schedule, freeze), augment, ema_decay=0.9)
    new, metrics = jax.jit(step)(state, batch, jax.random.key(1))
    images, targets = augment(batch, None, None)
    logits, _ = model.apply(variables, images, train=moving, mutable=["batch_stats"])
    expected = optax.softmax_cross_entropy(logits, targets).mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    old = state.batch_stats["batch_norm"]["mean"]
    for tree in (new.batch_stats, new.ema["batch_stats"]):
        changed = tree["batch_norm"]["mean"] != old
        assert changed.all() if moving else not changed.any()


def test_an_ema_without_decay_copies_the_weights(batch):
    state, step = start(ema_decay=0.0)
    new, _ = step(state, batch, jax.random.key(1))
    np.testing.assert_array_equal(new.ema["params"]["head"]["kernel"], new.params["head"]["kernel"])


def test_each_purpose_has_its_own_key(batch):
    keys = []

    def see(key):
        keys.append(tuple(jax.random.key_data(key).tolist()))

    def apply(variables, images, *, train, rngs, mutable):
        see(rngs["dropout"])
        return jnp.zeros((len(images), 7)) * variables["params"]["w"], {}

    mix = lambda key, images, targets: see(key) or (images, targets)
    erase = lambda key, images: see(key) or images
    model, tx = types.SimpleNamespace(num_classes=7, apply=apply), optax.sgd(0.5)
    augment = make_augment(7, **OPTIONS, mix=mix, erase=erase)
    optimizer = Optimizer(tx, optax.constant_schedule(0.5))
    step = make_train_step(model, optimizer, augment, ema_decay=0.9)
    state = TrainState.create({"params": {"w": jnp.ones(())}}, tx)
    for step_number, seed in ((3, 1), (4, 1), (3, 2), (3, 1)):
        step(state.replace(step=jnp.int32(step_number)), batch, jax.random.key(seed))
    assert len(set(keys[:9])) == 9 and keys[9:] == keys[:3]


def test_images_are_mixed_then_normalized_then_erased(batch):
    mix = lambda key, images, targets: (images // 2, targets)  # of uint8
    erase = lambda key, images: images + 10
    images, _ = make_augment(7, **OPTIONS, mix=mix, erase=erase)(batch, None, None)
    expected = (batch["image"] // 2).astype(jnp.float32) / 127.5 - 1 + 10
    np.testing.assert_allclose(images, expected, rtol=1e-6)


def test_bfloat16_leaves_the_training_state_in_float32():
    model = TNT(24, 8, 2, 2, depth=2, num_classes=7, drop_path=0.1, dtype="bfloat16")
    images = jnp.zeros((4, 16, 16, 3), jnp.uint8)
    optimizer = make_optimizer(
        lambda step: 1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.05, clip_norm=0.0
    )
    augment = make_augment(model.num_classes, **OPTIONS)
    step = make_train_step(model, optimizer, augment, ema_decay=0.9)
    init = lambda key: TrainState.create(model.init(key, images.astype(jnp.float32)), optimizer.tx)
    state = jax.eval_shape(init, jax.random.key(0))
    batch = {"image": images, "label": jnp.arange(4)}
    traced = jax.make_jaxpr(step, return_shape=True)
    jaxpr, (new, metrics) = traced(state, batch, jax.random.key(0))
    assert "bf16" in str(jaxpr)
    assert {x.dtype.name for x in jax.tree.leaves(new)} == {"float32", "int32"}
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].dtype == jnp.float32


def test_flags_tell_where_a_nan_began(batch):
    state, step = start()
    _, metrics = step(state, batch, jax.random.key(1))
    assert metrics["finite"].all()
    bad = {"head": {"kernel": state.params["head"]["kernel"], "bias": jnp.full(7, jnp.inf)}}
    _, metrics = step(state.replace(params=bad), batch, jax.random.key(1))
    assert not np.isfinite(metrics["loss"])
    assert list(named_leaves(state.params)) == ["head/bias", "head/kernel"]
    bias_gradient, kernel_gradient, bias, kernel = metrics["finite"]
    assert not (bias_gradient or kernel_gradient or bias)
    assert kernel


def test_evaluation_sums_over_the_mask_only(batch):
    model = Linear()
    params = {"head": {"kernel": jnp.zeros((3, 7)), "bias": jnp.arange(7.0)}}  # ranks 6, 5, 4, ...
    step = jax.jit(make_eval_step(model, mean=HALF, std=HALF))
    labels = jnp.array([6, 5, 2, 1, 0, 6])
    mask = jnp.array([True, True, True, True, False, False])
    sums = step({"params": params}, batch | {"label": labels, "mask": mask})
    losses = -jax.nn.log_softmax(jnp.arange(7.0))[labels]
    assert sums["images"] == 4
    assert sums["top1"] == 1  # label 6; the other 6 is padding
    assert sums["top5"] == 3  # labels 6, 5, 2
    np.testing.assert_allclose(sums["loss"], losses[:4].sum(), rtol=1e-6)


def test_top5_is_always_right_with_fewer_than_five_classes():
    labels = jnp.array([0, 0, 1])
    found = score(jnp.tile(jnp.array([1.0, 0.0]), (3, 1)), labels[:, None])
    assert found.top1.tolist() == [True, True, False] and found.top5.all()


def test_a_nan_reaches_the_sums_unless_its_row_is_padding():
    right, values = jnp.array([True, True]), jnp.array([0.5, jnp.nan])
    found = Scores(right, right, loss=values, confidence=values)
    sums = lambda *mask: sum_scores(found, jnp.array([1, 2]), jnp.array(mask), 7)
    assert all(np.isfinite(x).all() for x in sums(True, False).values())
    assert sums(True, False)["images"] == 1 and sums(True, False)["loss"] == 0.5
    assert np.isnan(sums(True, True)["loss"])


def test_mixed_targets_are_smoothed_once():
    sampled = mixup.Mix(jnp.array([0.25, 0.5]), jnp.zeros((2, 4), jnp.int32))
    options = OPTIONS | dict(mix=lambda key, *args: mixup.apply_mix(*args, sampled))
    batch = {"image": jnp.zeros((4, 1, 1, 3), jnp.uint8), "label": jnp.array([3, 0, 5, 5])}
    _, targets = make_augment(1000, **options)(batch, None, None)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-5)
    on, off = 0.9001, 0.0001  # reference values at 1000 classes and smoothing 0.1
    np.testing.assert_allclose(targets[0, 3], 0.25 * on + 0.75 * off, rtol=1e-5)
    np.testing.assert_allclose(targets[0, 0], 0.75 * on + 0.25 * off, rtol=1e-5)
    np.testing.assert_allclose(targets[1, 3], 0.75 * on + 0.25 * off, rtol=1e-5)
    np.testing.assert_allclose(targets[:, 4], off, rtol=1e-5)
    np.testing.assert_allclose(targets[2:, 5], on, rtol=1e-5)  # partners of the same class
