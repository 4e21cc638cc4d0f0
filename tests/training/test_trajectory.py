# SPDX-License-Identifier: Apache-2.0
"""Fifty steps of training equal timm's: mixed pixels, soft targets, AdamW, rates, average.

The ordinary test compares with a file that `make_goldens_trajectory.py` wrote; the live one
(`pytest -m oracle tests/training/test_trajectory.py`) runs timm and compares every tensor.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.goldens.scripts import trajectory as reference
from tests.helpers import timm_weights
from tnt_flax.core.trees import named_leaves
from tnt_flax.models import TNT
from tnt_flax.training import mixup
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.losses import make_loss_fn
from tnt_flax.training.step import TrainState, make_augment, make_train_step

FIXED_MIX = mixup.Mix(
    jnp.array([reference.LAM, 1.0]), jnp.array([(0, 0, 0, 0), reference.BOX], jnp.int32)
)


def train(initial, recipe="tnt_s"):
    """Losses and rates of the 50 steps, and the final state, from the weights `initial`."""
    config = importlib.import_module(f"configs.{recipe}").get_config()
    config.epochs = reference.EPOCHS
    config.optimizer.warmup_epochs = reference.WARMUP
    config.optimizer.cooldown_epochs = reference.COOLDOWN
    optimizer = Experiment(config, steps_per_epoch=reference.STEPS_PER_EPOCH).optimizer
    model = TNT(**reference.OUR_FIELDS)
    augment = make_augment(
        model.num_classes,
        label_smoothing=config.augment.label_smoothing,
        mean=config.data.mean,
        std=config.data.std,
        mix=lambda key, images, targets: mixup.apply_mix(images, targets, FIXED_MIX),
    )
    loss_fn = make_loss_fn(config.loss.name, bce_threshold=config.loss.bce_threshold)
    step = make_train_step(
        model, optimizer, augment, ema_decay=reference.EMA_DECAY, loss_fn=loss_fn
    )
    step = jax.jit(step, donate_argnums=0)
    state = TrainState.create({"params": jax.tree.map(jnp.asarray, initial)}, optimizer.tx)
    losses, rates = [], []
    with jax.default_matmul_precision("highest"):
        for images, labels in reference.batches():
            batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
            state, metrics = step(state, batch, jax.random.key(0))
            losses.append(metrics["loss"])
            rates.append(metrics["learning_rate"])
    return np.array(losses), np.array(rates), state


@pytest.fixture(scope="module")
def golden():
    with np.load(reference.GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def initial(golden):
    words = [line.split() for line in golden["shapes"]]
    shapes = {name: tuple(map(int, shape)) for name, *shape in words}
    return timm_weights.to_flax(timm_weights.random_state(shapes))


@pytest.fixture(scope="module")
def ours(initial):
    return train(initial)


@pytest.mark.slow
def test_losses_and_rates_of_every_step(ours, golden):
    losses, rates, state = ours
    assert int(state.step) == 50 == len(losses)
    np.testing.assert_allclose(rates, golden["rates"], rtol=1e-6)
    assert len(set(np.round(golden["rates"], 9))) == 8  # seven epochs, and the minimum
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-4)
    assert losses[-5:].mean() < 0.7 * losses[:5].mean()  # something was learnt


@pytest.mark.parametrize("tree", ["parameters", "average"])
def test_final_weights_and_average(tree, ours, golden, initial):
    _, _, state = ours
    tensors = named_leaves(state.params if tree == "parameters" else state.ema["params"])
    probes = [reference.probe(x) for x in tensors.values()]
    ends = np.cumsum([len(x) for x in probes])
    expected = np.split(golden[tree], ends[:-1])
    assert ends[-1] == len(golden[tree])
    starts = map(reference.probe, jax.tree.leaves(initial))
    for name, x, y, start in zip(tensors, probes, expected, starts, strict=True):
        moved = np.abs(y - start).max()
        assert moved > 5e-4, name
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-3 * moved, err_msg=name)


@pytest.mark.oracle
@pytest.mark.parametrize("recipe", reference.RECIPES)
def test_every_tensor_equals_timms(recipe, initial, golden, record_property):
    """Of the published recipe and of the others, with timm's own optimizers and losses."""
    theirs = reference.train(recipe=recipe)
    losses, rates, state = train(initial, recipe)
    np.testing.assert_allclose(rates, theirs["rates"], rtol=1e-6)
    np.testing.assert_allclose(losses, theirs["losses"], rtol=1e-3)
    starts = jax.tree.leaves(initial)
    for tree, tensors in (("parameters", state.params), ("average", state.ema["params"])):
        found, expected = named_leaves(tensors), jax.tree.leaves(theirs[tree])
        for (name, x), y, start in zip(found.items(), expected, starts, strict=True):
            distance = np.linalg.norm(x - y)
            scale = min(np.linalg.norm(y), np.linalg.norm(y - start))  # relative to the movement
            record_property(f"{tree}, {name}", distance / scale)
            assert distance < 1e-3 * scale, (tree, name)
    summary = reference.summary(theirs) if recipe == "tnt_s" else {}
    for name, x in summary.items():  # the file is what the script writes
        if name == "shapes":
            assert x.tolist() == golden[name].tolist()
        else:
            np.testing.assert_allclose(x, golden[name], rtol=1e-5, atol=1e-7)
