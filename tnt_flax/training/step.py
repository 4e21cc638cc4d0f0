# SPDX-License-Identifier: Apache-2.0
"""The functions that get compiled, pure and not yet jitted: training, evaluation, prediction.

The trainer, the tests and every tool jit these same ones.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from tnt_flax.core.trees import merged, split
from tnt_flax.training import fine_tuning
from tnt_flax.training.losses import smooth_one_hot, soft_target_cross_entropy
from tnt_flax.training.mixup import normalize

Batch = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Arrays only, so that a checkpoint of it is a complete run.

    `params` are `merged`: PyramidTNT's BatchNorms have their running statistics among them, which
    the average covers too, and the optimizer does not see.
    """

    step: jax.Array  # updates applied so far
    params: Any
    opt_state: optax.OptState
    ema: Any  # exponential moving average of params

    @classmethod
    def create(cls, params, tx: optax.GradientTransformation) -> "TrainState":
        """Step 0. The average starts at the initial weights and has no warm-up, as published."""
        ema = jax.tree.map(jnp.copy, params)  # its own buffers: the step donates both
        return cls(jnp.zeros((), jnp.int32), params, tx.init(split(params)["params"]), ema)


def all_finite(tree: Any, unless: jax.Array) -> jax.Array:
    """One flag per leaf, in the order of `jax.tree.leaves`: is every element finite?

    Where the scalar `unless` is true they are, and are not looked through: of a TNT-S on a CPU that
    would take a hundredth of the step.
    """
    leaves = jax.tree.leaves(tree)
    look = lambda: jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])
    return jax.lax.cond(unless, lambda: jnp.ones(len(leaves), bool), look)


def cast_kernels(params: Any, dtype: Any) -> Any:
    """Casts the kernels to `dtype`; norms, biases and positions are too small to matter."""
    is_kernel = lambda path: path[-1].key == "kernel"
    cast = lambda path, x: x.astype(dtype) if is_kernel(path) else x
    return jax.tree_util.tree_map_with_path(cast, params)


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
    freeze: str = "",
    gradient_dtype: str = "float32",
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, Any]]]:
    """Returns `train_step(state, batch, key) -> (state, metrics)`.

    `prepare` is what `make_prepare` returns. Randomness depends on `key` and `state.step` alone, so
    a resumed run draws what an unbroken one would, and any number of devices draw the same.
    Gradients are float32 before XLA sums them over the devices. With `gradient_dtype` "bfloat16" a
    bfloat16 model is differentiated with respect to its kernels in bfloat16 instead, which halves
    the traffic.
    `metrics` are scalars (loss, learning_rate, grad_norm) and `finite` bool [2 P]: a flag for each
    of the P gradients (or new running statistics), then for each parameter as it came in, which
    tell where a NaN began. One array, because fetching many small ones would slow the loop down.
    What `freeze` matches (see `fine_tuning.trained`) stays as it is. If it matches all running
    statistics, BatchNorms take these, as in evaluation, not the batch's.
    """

    def learns(params):
        return fine_tuning.trained(params, freeze)

    def loss_fn(params, statistics, prepared, key):
        images, targets = prepared
        mutable = ["batch_stats"]
        if freeze:
            learning = split(learns(merged({"params": params, "batch_stats": statistics})))
            params = fine_tuning.without_gradients(params, learning["params"])
            mutable = mutable if any(jax.tree.leaves(learning.get("batch_stats"))) else []
        logits, changed = model.apply(
            {"params": params, "batch_stats": statistics},
            images,
            train=True,
            rngs={"dropout": key},
            mutable=mutable,
        )
        loss = soft_target_cross_entropy(logits, targets).mean()
        return loss, changed.get("batch_stats", statistics)

    loss_and_grads = jax.value_and_grad(loss_fn, has_aux=True)
    reduce_in_bfloat16 = gradient_dtype == "bfloat16" and jnp.dtype(model.dtype) == gradient_dtype

    def train_step(state, batch, key):
        dropout_key, mix_key, erase_key = step_keys(key, state.step)
        variables = split(state.params)
        params, statistics = variables["params"], variables.get("batch_stats", {})
        prepared = prepare(batch, mix_key, erase_key)
        weights = cast_kernels(params, gradient_dtype) if reduce_in_bfloat16 else params
        (loss, statistics), grads = loss_and_grads(weights, statistics, prepared, dropout_key)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        updates, opt_state = tx.update(grads, state.opt_state, params)
        params = merged({"params": optax.apply_updates(params, updates), "batch_stats": statistics})
        changes = merged({"params": grads, "batch_stats": statistics})
        ema = average(params, state.ema, ema_decay)
        if freeze:
            params = fine_tuning.keep_frozen(params, state.params, learns(params))
            ema = fine_tuning.keep_frozen(ema, state.ema, learns(params))
        grad_norm = optax.tree.norm(grads)
        fine = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        metrics = {
            "loss": loss,
            "learning_rate": schedule(state.step),
            "grad_norm": grad_norm,
            "finite": all_finite({"params": state.params, "gradients": changes}, unless=fine),
        }
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    return train_step


CALIBRATION_BINS = 15  # of equal width, as in Guo et al. (arXiv 1706.04599)


def make_eval_step(
    model: nn.Module,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    classes: tuple[int, ...] | None = None,
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """Returns `eval_step(params, batch) -> sums` over a batch: of top1, top5, loss and images.

    `batch` also holds `mask` bool [B]; rows where it is False pad the batch and count nowhere.
    With fewer than five classes top5 counts every image. `label` may be [B, K], the classes that
    are right for each image, padded with -1; the loss is that of their probabilities' sum. With
    `classes` an image can only be taken for one of these.

    `per_class` [3, classes] are images, top1 and top5 of each (first) label; `calibration`
    [3, bins] are images, top1 and the probability of the answer, by this probability.
    """
    among = None if classes is None else jnp.isin(jnp.arange(model.num_classes), jnp.array(classes))

    def eval_step(params, batch):
        logits = model.apply(split(params), normalize(batch["image"], mean, std), train=False)
        labels, mask = batch["label"], batch["mask"]
        labels = labels[:, None] if labels.ndim == 1 else labels
        logits = logits if among is None else jnp.where(among[None], logits, -jnp.inf)
        _, best = jax.lax.top_k(logits, min(5, model.num_classes))
        hits = (best[:, :, None] == labels[:, None, :]).any(axis=2)
        log_probabilities = jax.nn.log_softmax(logits)
        right = jnp.take_along_axis(log_probabilities, jnp.maximum(labels, 0), axis=1)
        losses = -jax.nn.logsumexp(jnp.where(labels < 0, -jnp.inf, right), axis=1)
        top1, top5 = hits[:, 0], hits.any(axis=1)
        confidence = jnp.exp(log_probabilities.max(axis=1))
        bins = jnp.clip(jnp.ceil(confidence * CALIBRATION_BINS) - 1, 0, CALIBRATION_BINS - 1)

        def sums_by(keys, count, *columns):
            values = jnp.where(mask[:, None], jnp.stack(columns, axis=1), 0.0)
            return jax.ops.segment_sum(values, keys.astype(jnp.int32), count).T

        ones = jnp.ones_like(confidence)
        return {
            "top1": jnp.sum(top1, where=mask),
            "top5": jnp.sum(top5, where=mask),
            "loss": jnp.sum(losses, where=mask),
            "images": jnp.sum(mask),
            "per_class": sums_by(labels[:, 0], model.num_classes, ones, top1, top5),
            "calibration": sums_by(bins, CALIBRATION_BINS, ones, top1, confidence),
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
