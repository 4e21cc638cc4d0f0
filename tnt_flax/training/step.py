# SPDX-License-Identifier: Apache-2.0
"""The functions that get compiled: one step of training, evaluation and prediction.

All are pure. Their callers jit them: training, evaluation, some tools and the tests.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from tnt_flax.training.losses import LossFn
from tnt_flax.training.mixup import normalize
from tnt_flax.training.optimizer import Optimizer, select, trainable_mask

Batch = dict[str, jax.Array]
Variables = dict[str, Any]  # {"params": ..., "batch_stats": ...}, as `model.apply` takes them
# (batch, key of mixing, key of erasing, step, *more) -> (images float32 [B, H, W, 3], targets).
# Targets: float32 [B, K] for K classes; after `distillation.add_teacher` the pair of these and the
# teacher's logits [B, K].
AugmentFn = Callable[..., tuple[jax.Array, Any]]

CALIBRATION_BINS = 15  # of equal width, as in Guo et al. (arXiv 1706.04599)


@flax.struct.dataclass
class TrainState:
    """The state of a training run: arrays only, so that a checkpoint of it is complete."""

    step: jax.Array  # number of updates applied
    params: Any
    batch_stats: Any  # running statistics of BatchNorm; empty for networks without
    opt_state: optax.OptState
    ema: Variables  # exponential moving average of params and batch_stats

    @classmethod
    def create(cls, variables: Variables, tx: optax.GradientTransformation) -> "TrainState":
        """Returns the state of step 0. The EMA starts at the weights."""
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        ema = {"params": params, "batch_stats": batch_stats}
        ema = jax.tree.map(jnp.copy, ema)  # its own buffers: the step donates both
        return cls(jnp.zeros((), jnp.int32), params, batch_stats, tx.init(params), ema)

    @property
    def variables(self) -> Variables:
        return {"params": self.params, "batch_stats": self.batch_stats}


# -------------------------------------------------------------------------------------- training


def step_keys(key: jax.Array, step: jax.Array | int) -> jax.Array:
    """Returns the keys of one step of a run: of dropout, mixing and erasing."""
    return jax.random.split(jax.random.fold_in(key, step), 3)


def make_augment(
    num_classes: int,
    *,
    label_smoothing: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    randaugment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    mix: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    mix_steps: int | None = None,
    erase: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> AugmentFn:
    """Returns `augment(batch, mix_key, erase_key, step) -> (images, targets)`.

    `batch` holds `image` uint8 [B, H, W, 3] and `label`: int32 [B], or [B, L] with all classes of
    an image, padded with -1. The images are float32 [B, H, W, 3], normalized; the targets are
    float32 [B, num_classes].

    Args:
        num_classes: width of the targets.
        label_smoothing: share of a target that is spread evenly over all classes.
        mean, std: per channel, for pixels in [0, 1].
        randaugment: `randaugment(key, images)` for uint8 images, before mixing; None disables.
        mix: `mix(key, images, targets)` for uint8 images and smoothed targets; None disables.
        mix_steps: mix in the first `mix_steps` steps only; None: in all.
        erase: `erase(key, images)` for normalized images; None disables.
    """

    def augment(batch, mix_key, erase_key, step):
        images, targets = batch["image"], jax.nn.one_hot(batch["label"], num_classes)
        if targets.ndim == 3:  # several classes per image
            targets = targets.max(axis=1)
        targets = optax.smooth_labels(targets, label_smoothing)
        if randaugment:
            # With a small number, `fold_in` could return a key that `mix` splits from `mix_key`.
            images = randaugment(jax.random.fold_in(mix_key, 2**31), images)
        if mix:
            mixed = mix(mix_key, images, targets)
            if mix_steps is not None:
                choose = functools.partial(jnp.where, step < mix_steps)
                mixed = jax.tree.map(choose, mixed, (images, targets))
            images, targets = mixed
        images = normalize(images, mean, std)
        if erase:
            images = erase(erase_key, images)
        return images, targets

    return augment


def make_loss(
    model: nn.Module, loss_fn: LossFn = optax.softmax_cross_entropy, freeze: str = ""
) -> Callable[..., tuple[jax.Array, Any]]:
    """Returns `loss(params, batch_stats, images, targets, key) -> (mean loss, new batch_stats)`.

    `images` are float32 [B, H, W, 3]. `targets` are what `loss_fn` takes: [B, K], or a tuple with
    the logits of a teacher; see `training.losses` and `training.distillation`. Parameters that
    `freeze` matches get a gradient of 0. If `freeze` matches all running statistics, BatchNorm
    normalizes with them, as in evaluation.
    """

    def loss(params, batch_stats, images, targets, key):
        frozen_stats = False
        if freeze:
            stats_mask = trainable_mask(batch_stats, freeze)
            # All statistics are frozen; also true for networks without BatchNorm.
            frozen_stats = not any(x.any() for x in jax.tree.leaves(stats_mask))
            params_mask = trainable_mask(params, freeze)
            # With stop_gradient XLA drops the computation of gradients that nothing uses.
            params = select(params_mask, params, jax.lax.stop_gradient(params))
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            rngs={"dropout": key},
            # `models.pyramid_tnt.BatchNorm`, unlike flax's, normalizes with its running statistics
            # if the collection is immutable.
            # Unlike False, an empty list keeps the second result of `apply`.
            mutable=[] if frozen_stats else ["batch_stats"],
        )
        return loss_fn(logits, targets).mean(), updated.get("batch_stats", batch_stats)

    return loss


def split_into_micro_batches(loss_and_grads: Callable, count: int) -> Callable:
    """Returns a function that evaluates `loss_and_grads` on `count` micro-batches in turn.

    It takes the same arguments and returns the same results: loss and gradients are means over the
    micro-batches, summed in float32. Only the activations of one micro-batch are in memory at a
    time. Micro-batch i has the rows i, i + count, ...: every device keeps its rows. Dropout differs
    between micro-batches. BatchNorm normalizes with the statistics of each, and updates its running
    statistics once per micro-batch. With a `count` of 1, `loss_and_grads` itself is returned.

    Args:
        loss_and_grads: `jax.value_and_grad` of a function of `make_loss`.
        count: must divide the batch.
    """
    if count == 1:
        return loss_and_grads

    def split(x):
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    def accumulated(params, batch_stats, images, targets, key):
        def add(carry, micro_batch):
            sums, batch_stats = carry
            index, images, targets = micro_batch
            (loss, batch_stats), grads = loss_and_grads(
                params, batch_stats, images, targets, jax.random.fold_in(key, index)
            )
            sums = jax.tree.map(
                lambda total, x: total + x.astype(total.dtype) / count, sums, (loss, grads)
            )
            return (sums, batch_stats), None

        zeros = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.float32), (0.0, params))
        micro_batches = (jnp.arange(count), *jax.tree.map(split, (images, targets)))
        (sums, batch_stats), _ = jax.lax.scan(add, (zeros, batch_stats), micro_batches)
        loss, grads = sums
        return (loss, batch_stats), grads

    return accumulated


def make_train_step(
    model: nn.Module,
    optimizer: Optimizer,
    augment: AugmentFn,
    *,
    ema_decay: float,
    loss_fn: LossFn = optax.softmax_cross_entropy,
    ema_warmup: bool = False,
    accumulate: int = 1,
    gradient_dtype: str = "float32",
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Returns `train_step(state, batch, key, *more) -> (state, metrics)`.

    Randomness depends on `key` and `state.step` only: a resumed run and any number of devices use
    the same random numbers. `metrics` are the scalars loss, learning_rate and grad_norm (before
    clipping), and `finite`, see `finite_flags`.

    Args:
        model: TNT or PyramidTNT.
        optimizer: see `optimizer.make_optimizer`. Its `freeze` also applies to statistics.
        augment: see `AugmentFn`. It also gets `more`: the variables of a teacher, if there is one.
        ema_decay: decay of the exponential moving average; 0 copies the weights.
        loss_fn: see `losses.make_loss_fn`.
        ema_warmup: see `warm_up_decay`.
        accumulate: number of micro-batches, see `split_into_micro_batches`.
        gradient_dtype: "float32" sums gradients over devices in float32. "bfloat16" rounds the
            kernels to bfloat16 and differentiates with respect to them. That halves the traffic
            if the model computes in bfloat16, as `config.check_config` requires.
    """
    mean_loss = make_loss(model, loss_fn, optimizer.freeze)
    loss_and_grads = jax.value_and_grad(mean_loss, has_aux=True)
    loss_and_grads = split_into_micro_batches(loss_and_grads, accumulate)

    def train_step(state, batch, key, *more):
        dropout_key, mix_key, erase_key = step_keys(key, state.step)
        images, targets = augment(batch, mix_key, erase_key, state.step, *more)
        cast_params = cast_kernels(state.params, gradient_dtype)
        (loss, batch_stats), grads = loss_and_grads(
            cast_params, state.batch_stats, images, targets, dropout_key
        )
        # Back to the dtype of the parameters; no operation unless `cast_kernels` changed it.
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        decay = warm_up_decay(ema_decay, state.step) if ema_warmup else ema_decay
        new_state = update_state(state, optimizer, grads, batch_stats, decay)
        grad_norm = optax.tree.norm(grads)
        metrics = {
            "loss": loss,
            "learning_rate": optimizer.schedule(state.step),
            "grad_norm": grad_norm,
            "finite": finite_flags(
                {"params": grads, "batch_stats": new_state.batch_stats},
                state.variables,
                skip=jnp.isfinite(loss) & jnp.isfinite(grad_norm),
            ),
        }
        return new_state, metrics

    return train_step


def update_state(
    state: TrainState,
    optimizer: Optimizer,
    grads: Any,
    batch_stats: Any,
    ema_decay: float | jax.Array,
) -> TrainState:
    """Returns the state after one update. Frozen parameters and statistics keep their values."""
    updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if optimizer.freeze:
        # The optimizer's mask does not suffice: stacked blocks are updated as a whole if some of
        # them are not frozen, and weight decay changes the frozen ones.
        params = select(trainable_mask(params, optimizer.freeze), params, state.params)
        mask = trainable_mask(batch_stats, optimizer.freeze)
        batch_stats = select(mask, batch_stats, state.batch_stats)
    ema = update_ema(state.ema, {"params": params, "batch_stats": batch_stats}, ema_decay)
    return TrainState(state.step + 1, params, batch_stats, opt_state, ema)


def cast_kernels(params: Any, dtype: Any) -> Any:
    """Casts the kernels to `dtype`; the other parameters are too small to matter for traffic."""

    def cast(path, x):
        return x.astype(dtype) if path[-1].key == "kernel" else x

    return jax.tree_util.tree_map_with_path(cast, params)


def warm_up_decay(decay: float, step: jax.Array) -> jax.Array:
    """Returns the decay of the EMA after `step` earlier updates: it rises from 0 to `decay`.

    So the EMA averages over about the last step^(2/3) updates, until that exceeds
    1 / (1 - `decay`). Source: timm's `ModelEmaV3` with `use_warmup`.
    """
    return jnp.minimum(1 - (1.0 + step) ** (-2 / 3), decay)


def update_ema(ema: Variables, variables: Variables, decay: float | jax.Array) -> Variables:
    """Returns decay * ema + (1 - decay) * variables.

    The EMA of a constant is exactly that constant, which keeps frozen weights bit-identical.
    Integers are copied: the `count` of `models.pyramid_tnt.BatchNorm`.
    """

    def update(old, new):
        if jnp.issubdtype(new.dtype, jnp.integer):
            return new
        return jnp.where(old == new, old, optax.incremental_update(new, old, 1 - decay))

    return jax.tree.map(update, ema, variables)


def finite_flags(
    computed: Variables, variables: Variables, skip: jax.Array
) -> Bool[Array, "flags"]:
    """Returns one flag per leaf of `computed`, then one per leaf of `variables`.

    `computed` are the gradients of a step and its new running statistics, `variables` the
    parameters and statistics that it started from. The flags show in which tensor a NaN began. They
    are one array, because fetching many small ones slows the loop down. If the scalar `skip` is
    true, all flags are True and nothing is checked: the check takes 1 % of a step on a CPU.
    """
    leaves = jax.tree.leaves(computed) + jax.tree.leaves(variables)
    check = lambda: jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])
    return jax.lax.cond(skip, lambda: jnp.ones(len(leaves), bool), check)


# ------------------------------------------------------------------------ evaluation, prediction


class Scores(NamedTuple):
    """Results for every image of a batch."""

    top1: Bool[Array, "B"]  # the most probable class is right
    top5: Bool[Array, "B"]  # one of the five most probable classes is right
    loss: Float[Array, "B"]  # -log of the total probability of the right classes
    confidence: Float[Array, "B"]  # probability of the most probable class


def score(logits: Float[Array, "B K"], labels: Int[Array, "B L"]) -> Scores:
    """Compares logits with the classes that are right for each image, padded with -1.

    With up to five classes top5 is true for every image with a label. An image without any label
    has an infinite loss: the `mask` of `sum_scores` must leave it out.
    """
    _, best = jax.lax.top_k(logits, min(5, logits.shape[1]))
    hits = (best[:, :, None] == labels[:, None, :]).any(axis=2)  # bool [B, min(5, K)]
    log_probabilities = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(log_probabilities, jnp.maximum(labels, 0), axis=1)
    loss = -jax.nn.logsumexp(jnp.where(labels < 0, -jnp.inf, right), axis=1)
    confidence = jnp.exp(log_probabilities.max(axis=1))
    return Scores(hits[:, 0], hits.any(axis=1), loss, confidence)


def calibration_bin(confidence: Float[Array, "B"]) -> Int[Array, "B"]:
    """Returns the bin of each confidence; bin i covers (i, i + 1] / CALIBRATION_BINS."""
    bins = jnp.ceil(confidence * CALIBRATION_BINS) - 1
    return jnp.clip(bins, 0, CALIBRATION_BINS - 1).astype(jnp.int32)


def sum_scores(
    scores: Scores, labels: Int[Array, "B"], mask: Bool[Array, "B"], num_classes: int
) -> dict[str, jax.Array]:
    """Sums over the rows where `mask` is True.

    The others are padding, unreadable images, or images without a label.

    Returns:
        top1, top5, loss, images: scalars.
        per_class [3, classes]: images, top1 and top5 by label.
        calibration [3, bins]: images, sum of top1 and sum of confidence, by bins of confidence.
    """

    def sums_by(index, num_bins, *columns):
        values = jnp.where(mask[:, None], jnp.stack(columns, axis=1), 0.0)
        return jax.ops.segment_sum(values, index, num_bins).T

    ones, bins = jnp.ones_like(scores.confidence), calibration_bin(scores.confidence)
    return {
        "top1": jnp.sum(scores.top1, where=mask),
        "top5": jnp.sum(scores.top5, where=mask),
        "loss": jnp.sum(scores.loss, where=mask),
        "images": jnp.sum(mask),
        "per_class": sums_by(labels, num_classes, ones, scores.top1, scores.top5),
        "calibration": sums_by(bins, CALIBRATION_BINS, ones, scores.top1, scores.confidence),
    }


def make_eval_step(
    model: nn.Module,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    classes: tuple[int, ...] | None = None,
    multi_label: bool = False,
) -> Callable[[Variables, Batch], dict[str, jax.Array]]:
    """Returns `eval_step(variables, batch) -> sums`, see `sum_scores`.

    `batch` holds `image` uint8 [B, H, W, 3], `mask` bool [B], False for padding and unreadable
    images, and `label`: int32 [B], or [B, L] where several classes are right. Sums per class are by
    the first label.

    Args:
        model: TNT or PyramidTNT.
        mean, std: per channel, for pixels in [0, 1].
        classes: restricts the predictions to these classes; None allows all.
        multi_label: sum over images with at least one class, and also return "rows" for
            `evaluate.multi_label_metrics`: `logits` [B, K], `targets` bool [B, K], `mask` [B].
    """
    allowed = None
    if classes is not None:
        allowed = jnp.isin(jnp.arange(model.num_classes), jnp.array(classes))

    def eval_step(variables, batch):
        logits = model.apply(variables, normalize(batch["image"], mean, std), train=False)
        if allowed is not None:
            logits = jnp.where(allowed[None], logits, -jnp.inf)
        labels = batch["label"]
        labels = labels[:, None] if labels.ndim == 1 else labels
        scores, mask = score(logits, labels), batch["mask"]
        if not multi_label:
            return sum_scores(scores, labels[:, 0], mask, model.num_classes)
        labeled = mask & (labels >= 0).any(axis=1)
        targets = jax.nn.one_hot(labels, model.num_classes, dtype=bool).any(axis=1)
        sums = sum_scores(scores, labels[:, 0], labeled, model.num_classes)
        return sums | {"rows": {"logits": logits, "targets": targets, "mask": mask}}

    return eval_step


def make_predict_step(
    model: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Variables, jax.Array], jax.Array]:
    """Returns `predict_step(variables, images) -> probabilities` [B, classes] of uint8 images."""

    def predict_step(variables, images):
        logits = model.apply(variables, normalize(images, mean, std), train=False)
        return jax.nn.softmax(logits)

    return predict_step
