# SPDX-License-Identifier: Apache-2.0
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tnt_flax.core.trees import named_leaves
from tnt_flax.models import TNT
from tnt_flax.models.layers import BatchNorm
from tnt_flax.training import mixup
from tnt_flax.training.optimizer import Optimizer, make_optimizer
from tnt_flax.training.step import (
    Predictions,
    TrainState,
    make_augment,
    make_eval_step,
    make_train_step,
    smooth_one_hot,
    soft_target_cross_entropy,
    sum_predictions,
)

HALF = (0.5, 0.5, 0.5)
OPTIONS = dict(label_smoothing=0.1, mean=HALF, std=HALF)


class Linear(nn.Module):
    """Mean color to logits; in training, noise, to see which random numbers a step uses."""

    num_classes: int = 7

    @nn.compact
    def __call__(self, images, *, train):
        logits = nn.Dense(self.num_classes, name="head")(images.mean(axis=(1, 2)))
        noise = jax.random.normal(self.make_rng("dropout"), logits.shape) if train else 0.0
        return logits + noise


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


def test_randomness_is_a_function_of_key_and_step(batch):
    state, step = start()
    loss = lambda step_number, key: float(
        step(state.replace(step=jnp.int32(step_number)), batch, jax.random.key(key))[1]["loss"]
    )
    assert loss(3, 1) == loss(3, 1)
    assert len({loss(3, 1), loss(4, 1), loss(3, 2)}) == 3


def spied_step(**changes):
    """Returns `see(batch, step, seed) -> calls`: what the model, `mix` and `erase` are given."""
    calls = {}

    def apply(variables, images, *, train, rngs, mutable):
        calls.update(images=images, dropout=rngs["dropout"])
        return jnp.zeros((len(images), 7)) * variables["params"]["w"], {}

    def mix(key, images, targets):
        calls.update(mix=key)
        return images, targets

    def erase(key, images):
        calls.update(erase=key)
        return images

    model, tx = types.SimpleNamespace(num_classes=7, apply=apply), optax.sgd(0.5)
    augment = make_augment(7, **OPTIONS | dict(mix=mix, erase=erase) | changes)
    optimizer = Optimizer(tx, optax.constant_schedule(0.5))
    step = make_train_step(model, optimizer, augment, ema_decay=0.9)

    def see(batch, step_number, seed):
        state = TrainState.create({"params": {"w": jnp.ones(())}}, tx).replace(
            step=jnp.int32(step_number)
        )
        step(state, batch, jax.random.key(seed))
        return calls

    return see


def test_each_purpose_has_its_own_key(batch):
    see = spied_step()
    keys = lambda *numbers: [
        tuple(jax.random.key_data(see(batch, *numbers)[purpose]).tolist())
        for purpose in ("dropout", "mix", "erase")
    ]
    assert keys(3, 1) == keys(3, 1)
    assert len(set(keys(3, 1) + keys(4, 1) + keys(3, 2))) == 9


def test_images_are_mixed_then_normalized_then_erased(batch):
    """On a batch of constants: whole pixel values, normalized, except for noise that is not mixed
    or scaled."""
    values = np.array([0, 255, 7, 100, 31, 64], np.uint8)
    images = np.broadcast_to(values[:, None, None, None], (6, 32, 32, 3))
    mix = functools.partial(
        mixup.mix, groups=1, mixup_alpha=0.8, cutmix_alpha=0.0, prob=1.0, switch_prob=0.5
    )
    erase = functools.partial(mixup.erase, prob=1.0, area=(0.25, 0.3), ratio=(0.5, 2.0))
    see = spied_step(mix=jax.jit(mix), erase=jax.jit(erase))
    seen = np.asarray(see(batch | {"image": jnp.asarray(images)}, 0, 1)["images"])
    pixels = seen * np.float32(127.5) + np.float32(127.5)
    background = np.array(
        [np.bincount(np.rint(x).astype(int).ravel() % 1000).argmax() for x in pixels]
    )
    untouched = np.abs(pixels - background[:, None, None, None]) < 1e-4
    assert not np.array_equal(background, values)
    np.testing.assert_allclose(
        background + background[::-1], values.astype(int) + values[::-1], atol=1
    )
    assert 0.7 < untouched.mean() < 0.75
    noise = seen[~untouched]
    assert abs(noise.mean()) < 0.06 and noise.std() == pytest.approx(1, abs=0.05)


def test_bfloat16_leaves_the_training_state_in_float32():
    model = TNT(24, 8, 2, 2, depth=2, num_classes=7, drop_path=0.1, dtype="bfloat16")
    images = jnp.zeros((4, 16, 16, 3), jnp.uint8)
    params = jax.eval_shape(model.init, jax.random.key(0), images.astype(jnp.float32))["params"]
    gradients = {}

    def spy(updates, params=None):
        gradients.update(named_leaves(updates))
        return updates

    adamw = make_optimizer(
        lambda step: 1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.05, clip_norm=0.0
    )
    tx = optax.chain(optax.stateless(spy), adamw.tx)
    augment = make_augment(model.num_classes, **OPTIONS)
    step = make_train_step(model, Optimizer(tx, adamw.schedule), augment, ema_decay=0.9)
    state = jax.eval_shape(lambda p: TrainState.create({"params": p}, tx), params)
    batch = {"image": images, "label": jnp.arange(4)}
    traced = jax.make_jaxpr(step, return_shape=True)
    jaxpr, (new, metrics) = traced(state, batch, jax.random.key(0))
    assert "bf16" in str(jaxpr)
    assert {x.dtype for x in jax.tree.leaves([new.params, new.ema])} == {jnp.dtype("float32")}
    moments = [optax.tree.get(new.opt_state, name) for name in ("mu", "nu")]
    assert {x.dtype for x in jax.tree.leaves(moments)} == {jnp.dtype("float32")}
    assert gradients.keys() == named_leaves(params).keys()
    assert {x.dtype for x in gradients.values()} == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == jnp.float32
    assert jax.tree.structure(new) == jax.tree.structure(state)


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


def test_a_nan_reaches_the_sums_unless_its_row_is_padding():
    right, values = jnp.array([True, True]), jnp.array([0.5, jnp.nan])
    found = Predictions(right, right, loss=values, confidence=values)
    sums = lambda *mask: sum_predictions(found, jnp.array([1, 2]), jnp.array(mask), 7)
    assert all(np.isfinite(x).all() for x in sums(True, False).values())
    assert sums(True, False)["images"] == 1 and sums(True, False)["loss"] == 0.5
    assert np.isnan(sums(True, True)["loss"])


def test_top5_is_always_right_with_fewer_than_five_classes(batch):
    params = {"head": {"kernel": jnp.zeros((3, 2)), "bias": jnp.array([1.0, 0.0])}}
    step = make_eval_step(Linear(num_classes=2), mean=HALF, std=HALF)
    labels = jnp.array([0, 0, 1, 1, 1, 0])
    sums = step({"params": params}, batch | {"label": labels, "mask": jnp.ones(6, bool)})
    assert (sums["top1"], sums["top5"]) == (3, 6)


def test_label_smoothing_of_the_targets():
    targets = smooth_one_hot(jnp.array([3, 0]), 1000, 0.1)
    assert targets.shape == (2, 1000)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(targets[0, 3], 0.9001, rtol=1e-6)  # reference value at 1000 classes
    np.testing.assert_allclose(targets[0, 4], 0.0001, rtol=1e-6)


def test_mixed_targets_are_smoothed_once():
    labels = jnp.array([3, 0, 5, 5])
    images = jnp.zeros((4, 1, 1, 3), jnp.uint8)
    drawn = mixup.Mix(jnp.array([0.25, 0.5]), jnp.zeros((2, 4), jnp.int32))
    _, targets = mixup.apply_mix(images, smooth_one_hot(labels, 1000, 0.1), drawn)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-5)
    on, off = 0.9001, 0.0001
    np.testing.assert_allclose(targets[0, 3], 0.25 * on + 0.75 * off, rtol=1e-5)
    np.testing.assert_allclose(targets[0, 0], 0.75 * on + 0.25 * off, rtol=1e-5)
    np.testing.assert_allclose(targets[1, 3], 0.75 * on + 0.25 * off, rtol=1e-5)
    np.testing.assert_allclose(targets[:, 4], off, rtol=1e-5)
    np.testing.assert_allclose(targets[2:, 5], on, rtol=1e-5)  # partners of the same class


def test_soft_target_cross_entropy_of_three_classes():
    logits = jnp.array([[1.0, 2.0, 4.0]])
    targets = jnp.array([[0.2, 0.3, 0.5]])
    log_sum = np.log(np.exp(1) + np.exp(2) + np.exp(4))
    expected = -(0.2 * (1 - log_sum) + 0.3 * (2 - log_sum) + 0.5 * (4 - log_sum))
    np.testing.assert_allclose(soft_target_cross_entropy(logits, targets), [expected], rtol=1e-6)
