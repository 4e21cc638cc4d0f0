# SPDX-License-Identifier: Apache-2.0
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tnt_flax.configs import default
from tnt_flax.core.trees import named_leaves
from tnt_flax.models import TNT
from tnt_flax.models.pyramid_tnt import BatchNorm
from tnt_flax.runtime import sharding
from tnt_flax.tools.hlo import Program
from tnt_flax.training import mixup
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.optimizer import Optimizer, make_optimizer
from tnt_flax.training.step import (
    Scores,
    TrainState,
    make_augment,
    make_eval_step,
    make_train_step,
    score,
    sum_scores,
    warm_up_decay,
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


def start(model=None, tx=None, ema_decay=0.9, ema_warmup=False, accumulate=1, **changes):
    model, tx = model or Linear(), tx or optax.sgd(0.5)
    options = dict(ema_decay=ema_decay, ema_warmup=ema_warmup, accumulate=accumulate)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), train=False)
    augment = make_augment(model.num_classes, **OPTIONS | changes)
    schedule = optax.constant_schedule(0.5)
    step = jax.jit(make_train_step(model, Optimizer(tx, schedule), augment, **options))
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
    images, targets = augment(batch, None, None, 0)
    logits, _ = model.apply(variables, images, train=moving, mutable=["batch_stats"])
    expected = optax.softmax_cross_entropy(logits, targets).mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    old = state.batch_stats["batch_norm"]["mean"]
    for tree in (new.batch_stats, new.ema["batch_stats"]):
        changed = tree["batch_norm"]["mean"] != old
        assert changed.all() if moving else not changed.any()


class Noisy(nn.Module):
    """Logits that depend on the key of dropout only."""

    num_classes: int = 7

    @nn.compact
    def __call__(self, images, *, train):
        scale = self.param("scale", nn.initializers.ones, ())
        key = self.make_rng("dropout") if train else jax.random.key(0)
        return scale * jax.random.normal(key, (len(images), self.num_classes))


def mirror(key, images, targets):
    """Mixing that needs the whole batch."""
    return images[::-1], 0.5 * (targets + targets[::-1])


def test_micro_batches_give_the_loss_and_the_update_of_the_whole_batch(batch):
    results = []
    for accumulate in (1, 2, 3):
        state, step = start(tx=optax.adam(0.1), accumulate=accumulate, mix=mirror)
        losses = []
        for _ in range(3):
            state, metrics = step(state, batch, jax.random.key(1))
            losses += [metrics["loss"], metrics["grad_norm"]]
        results.append((losses, state))
    for losses, state in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=1e-6)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
        jax.tree.map(close, state, results[0][1])


@pytest.mark.slow
def test_micro_batches_have_their_own_statistics_and_dropout(batch):
    state, step = start(Normed(), accumulate=2)
    new, metrics = step(state, batch, jax.random.key(1))
    images, targets = make_augment(7, **OPTIONS)(batch, None, None, 0)
    stats, losses = state.batch_stats, []
    for i in range(2):  # rows 0, 2, 4, then 1, 3, 5
        variables = {"params": state.params, "batch_stats": stats}
        logits, updated = Normed().apply(
            variables, images[i::2], train=True, mutable=["batch_stats"]
        )
        stats = updated["batch_stats"]
        losses.append(optax.softmax_cross_entropy(logits, targets[i::2]).mean())
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, new.batch_stats, stats)

    losses = {}
    same = {"image": batch["image"], "label": jnp.zeros(6, int)}
    for accumulate in (1, 2):
        state, step = start(Noisy(), accumulate=accumulate)
        losses[accumulate] = step(state, same, jax.random.key(1))[1]["loss"]
    assert losses[1] != losses[2]


@pytest.mark.slow
def test_micro_batches_on_a_mesh_sum_gradients_in_turn_and_exchange_nothing_else(smoke_config):
    """Mixing crosses micro-batches; the loss and the update are those of the whole batch."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (48, 32, 32, 3), np.uint8)
    batch = {"image": images, "label": random.integers(0, 10, 48, np.int32)}
    changes = dict(augment__mixup_alpha=0.8, augment__mix_groups=3, ema__warmup=True)
    changes |= dict(model__outer_dim=16, model__outer_heads=2, mesh__fsdp=2)
    metrics, exchanged = [], []
    for accumulate in (3, 1):
        config = smoke_config(**changes, accumulate=accumulate)
        experiment = Experiment(config, num_classes=10, steps_per_epoch=29)
        state, key = experiment.new_state(), experiment.keys.steps
        inputs = sharding.to_global(batch, experiment.mesh)
        step = experiment.train_step.lower(state, inputs, key).compile()
        metrics.append([])
        for _ in range(3):
            state, found = step(state, inputs, key)
            metrics[-1] += [found["loss"], found["grad_norm"]]
        collectives = Program(step.as_text()).collectives()
        exchanged.append({x for x in collectives if (x.kind, x.dtype) != ("all-reduce", "f32")})
    np.testing.assert_allclose(*metrics, rtol=2e-6)
    assert exchanged[0] == exchanged[1]


@pytest.mark.slow
def test_the_published_recipe_exchanges_gradients_and_nothing_else():
    """On eight devices: one sum for each block and one for the other weights and the metrics."""
    config = default.get_config()
    config.batch_size, config.data.image_size = 64, 32
    small = dict(depth=3, outer_dim=24, inner_dim=4, outer_heads=2, inner_heads=2)
    config.model.update(dtype="float32", **small)
    experiment = Experiment(config, num_classes=10, steps_per_epoch=29)
    step = experiment.train_step.lower(*experiment.step_shapes).compile()
    (exchanged,) = Program(step.as_text()).collectives()
    assert (exchanged.kind, exchanged.dtype, exchanged.executed) == ("all-reduce", "f32", 3)
    params = sum(x.size for x in jax.tree.leaves(experiment.state_shapes.params))
    # The stem is a product of a sentence's 16 * 16 * 3 pixels with 16 words; its kernel is 7 x 7.
    stem = small["inner_dim"] * (16 * 16 * 3 * 16 - 7 * 7 * 3)
    assert exchanged.bytes == 4 * (params + stem + 1)  # 1 is the loss


def test_the_decay_of_the_ema_warms_up(batch):
    state, step = start(ema_decay=0.4, ema_warmup=True)
    ema = state.params["head"]["kernel"]
    for decay in (0, 1 - 2 ** (-2 / 3), 0.4, 0.4):  # the third would be 0.519
        state, _ = step(state, batch, jax.random.key(1))
        ema = decay * ema + (1 - decay) * state.params["head"]["kernel"]
        np.testing.assert_allclose(state.ema["params"]["head"]["kernel"], ema, rtol=1e-5, atol=1e-7)


@pytest.mark.oracle
def test_the_decay_of_every_step_is_timms():
    import torch
    from timm.utils import ModelEmaV3

    theirs = ModelEmaV3(torch.nn.Linear(1, 1), decay=0.9997, use_warmup=True)
    steps = np.unique(np.geomspace(1, 10**6, 200).astype(int))
    expected = [theirs.get_decay(int(step)) for step in steps]  # the first update is step 1
    found = warm_up_decay(0.9997, jnp.asarray(steps - 1))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


def test_mixing_ends_after_its_last_step(batch):
    augment = make_augment(7, **OPTIONS, mix=mirror, mix_steps=3)
    plain = make_augment(7, **OPTIONS)(batch, None, None, 0)
    mixed = make_augment(7, **OPTIONS, mix=mirror)(batch, None, None, 0)
    for step, expected in ((2, mixed), (3, plain)):
        found = jax.jit(augment)(batch, None, None, step)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


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
    images, _ = make_augment(7, **OPTIONS, mix=mix, erase=erase)(batch, None, None, 0)
    expected = (batch["image"] // 2).astype(jnp.float32) / 127.5 - 1 + 10
    np.testing.assert_allclose(images, expected, rtol=1e-6)


@pytest.mark.slow
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


@pytest.mark.slow
def test_mixed_targets_are_smoothed_once():
    sampled = mixup.Mix(jnp.array([0.25, 0.5]), jnp.zeros((2, 4), jnp.int32))
    options = OPTIONS | dict(mix=lambda key, *args: mixup.apply_mix(*args, sampled))
    batch = {"image": jnp.zeros((4, 1, 1, 3), jnp.uint8), "label": jnp.array([3, 0, 5, 5])}
    _, targets = make_augment(1000, **options)(batch, None, None, 0)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-5)
    on, off = 0.9001, 0.0001  # reference values at 1000 classes and smoothing 0.1
    np.testing.assert_allclose(targets[0, 3], 0.25 * on + 0.75 * off, rtol=1e-5)
    np.testing.assert_allclose(targets[0, 0], 0.75 * on + 0.25 * off, rtol=1e-5)
    np.testing.assert_allclose(targets[1, 3], 0.75 * on + 0.25 * off, rtol=1e-5)
    np.testing.assert_allclose(targets[:, 4], off, rtol=1e-5)
    np.testing.assert_allclose(targets[2:, 5], on, rtol=1e-5)  # partners of the same class
