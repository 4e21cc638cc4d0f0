# SPDX-License-Identifier: Apache-2.0
"""The functions that get compiled, pure and not yet jitted: training, evaluation, prediction.

The trainer, the tests and every tool jit these same ones.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from tnt_flax.augment import normalize
from tnt_flax.losses import smooth_one_hot, soft_target_cross_entropy
from tnt_flax.state import TrainState, merged, split

Batch = dict[str, jax.Array]


def all_finite(tree: Any) -> jax.Array:
    """One flag per leaf, in the order of `jax.tree.leaves`: is every element finite?"""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])


def average(new: Any, old: Any, decay: float) -> Any:
    """The exponential moving average; what is counted in whole numbers is not averaged."""
    mean = optax.incremental_update(new, old, 1 - decay)
    return jax.tree.map(lambda x, y: y if jnp.issubdtype(y.dtype, jnp.integer) else x, mean, new)


def step_keys(key: jax.Array, step: jax.Array | int) -> jax.Array:
    """The keys of one step of a run: of dropout, mixing and erasing."""
    return jax.random.split(jax.random.fold_in(key, step), 3)


def make_prepare(
    num_classes: int,
    *,
    label_smoothing: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mix: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    erase: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Callable[[Batch, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns `prepare(batch, mix_key, erase_key) -> (images, targets)`, what the network gets.

    `batch` holds `image` uint8 [B, H, W, 3] and `label` int32 [B]. `mix(key, images, targets)` gets
    the pixels and the smoothed targets, `erase(key, images)` the normalized images.
    """

    def prepare(batch, mix_key, erase_key):
        images = batch["image"]
        targets = smooth_one_hot(batch["label"], num_classes, label_smoothing)
        if mix:
            images, targets = mix(mix_key, images, targets)
        images = normalize(images, mean, std)
        if erase:
            images = erase(erase_key, images)
        return images, targets

    return prepare


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    prepare: Callable[[Batch, jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    *,
    ema_decay: float,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, Any]]]:
    """Returns `train_step(state, batch, key) -> (state, metrics)`.

    `prepare` is what `make_prepare` returns. Randomness depends on `key` and `state.step` alone, so
    a resumed run draws what an unbroken one would, and any number of devices draw the same.
    `metrics` are scalars (loss, learning_rate, grad_norm) and `finite` bool [2 P]: a flag for each
    of the P gradients (or new running statistics), then for each parameter as it came in, which
    tell where a NaN began. One array, because fetching many small ones would slow the loop down.
    """

    def train_step(state, batch, key):
        dropout_key, mix_key, erase_key = step_keys(key, state.step)
        images, targets = prepare(batch, mix_key, erase_key)
        rngs = {"dropout": dropout_key}

        variables = split(state.params)
        params, statistics = variables["params"], variables.get("batch_stats", {})

        def loss_fn(params):
            logits, changed = model.apply(
                {"params": params, "batch_stats": statistics},
                images,
                train=True,
                rngs=rngs,
                mutable=["batch_stats"],
            )
            loss = soft_target_cross_entropy(logits, targets).mean()
            return loss, changed.get("batch_stats", {})

        (loss, statistics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, state.opt_state, params)
        params = merged({"params": optax.apply_updates(params, updates), "batch_stats": statistics})
        changes = merged({"params": grads, "batch_stats": statistics})
        ema = average(params, state.ema, ema_decay)
        metrics = {
            "loss": loss,
            "learning_rate": schedule(state.step),
            "grad_norm": optax.tree.norm(grads),
            "finite": all_finite({"params": state.params, "gradients": changes}),
        }
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    return train_step


def make_eval_step(
    model: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """Returns `eval_step(params, batch) -> sums` of top1, top5, loss and images over a batch.

    `batch` also holds `mask` bool [B]; rows where it is False pad the batch and count nowhere.
    With fewer than five classes top5 counts every image.
    """

    def eval_step(params, batch):
        logits = model.apply(split(params), normalize(batch["image"], mean, std), train=False)
        labels, mask = batch["label"], batch["mask"]
        _, best = jax.lax.top_k(logits, min(5, model.num_classes))
        hits = best == labels[:, None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return {
            "top1": jnp.sum(hits[:, 0], where=mask),
            "top5": jnp.sum(hits.any(axis=1), where=mask),
            "loss": jnp.sum(losses, where=mask),
            "images": jnp.sum(mask),
        }

    return eval_step


def make_predict_step(
    model: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns `predict_step(params, images) -> probabilities` [B, classes] of uint8 images."""

    def predict_step(params, images):
        logits = model.apply(split(params), normalize(images, mean, std), train=False)
        return jax.nn.softmax(logits)

    return predict_step
