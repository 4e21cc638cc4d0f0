# SPDX-License-Identifier: Apache-2.0
"""AdamW with the published weight decay and schedule (timm 0.3.2), other ones, and fine-tuning.

Fine-tuning adds layer-wise learning rates and freezing by name. Weight decay, clipping, layer-wise
learning rates and freezing apply to every optimizer. Parameters of equal blocks are
stacked on a leading axis. Names here are per block, "blocks/3/inner/fc1/kernel", as everywhere in
the user interface; a property of one block is one element of an array [blocks, 1, ...].
"""

import functools
import math
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import named_leaves
from tnt_flax.weights import names

OPTIMIZERS = ("adamw", "nadamw", "lamb", "lion", "muon", "sgd")
STEM = ("word_embed", "word_pos", "proj", "cls_token", "sentence_pos")


class Optimizer(NamedTuple):
    """An optimizer and what a training step must know about it."""

    tx: optax.GradientTransformation
    schedule: optax.Schedule  # learning rate as a function of the step
    freeze: str = ""  # regular expression of frozen parameters, see `trainable_mask`


def decay_mask(params) -> dict:
    """Returns True for the parameters with weight decay: kernels of dense and conv layers.

    Also, as published, PyramidTNT's relative positions. Not biases, norms, the class token or other
    positions. Names decide, not ranks: stacked parameters of scanned blocks have a leading block
    axis, so that a bias is a matrix.
    """
    decayed = ("kernel", "relative_pos")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in decayed, params)


def make_optimizer(
    schedule: optax.Schedule,
    *,
    name: str = "adamw",
    beta1: float,
    beta2: float,
    eps: float,
    momentum: float = 0.9,
    weight_decay: float,
    clip_norm: float,
    layer_decay: float = 1.0,
    freeze: str = "",
) -> Optimizer:
    """Returns one of OPTIMIZERS; its updates equal those of timm's optimizer of that name.

    "adamw" is `torch.optim.AdamW`. "sgd" has Nesterov momentum, and adds the decayed weights to the
    gradient, as torch does. For "lamb" and "muon" see `scale_by_trust_ratio` and `scale_by_muon`.

    Args:
        schedule: learning rate as a function of the step.
        name: one of OPTIMIZERS.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        momentum: of "sgd" and "muon".
        weight_decay: of the parameters in `decay_mask`, multiplied by the learning rate.
        clip_norm: largest global norm of the gradient; 0 disables.
        layer_decay: see `layer_scales`; 1 disables.
        freeze: regular expression, see `trainable_mask`; "" disables. Tensors that match in all
            blocks get no moments. `step.make_train_step` keeps all that match.
    """
    decay = optax.add_decayed_weights(weight_decay, decay_mask)
    adam = optax.scale_by_adam(beta1, beta2, eps)
    rules = {
        "adamw": (adam, decay),
        "nadamw": (scale_by_nadam(beta1, beta2, eps), decay),
        # As in timm, without weight decay there is no trust ratio.
        "lamb": (adam, decay, *[scale_by_trust_ratio()] * bool(weight_decay)),
        "lion": (optax.scale_by_lion(beta1, beta2), decay),
        "muon": (scale_by_muon(momentum, adam), decay),
        "sgd": (decay, optax.trace(momentum, nesterov=True)),
    }
    tx = optax.chain(*rules[name], optax.scale_by_learning_rate(schedule))
    if clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
    if freeze:
        learns = lambda mask: bool(np.any(mask))  # in one block at least
        tx = optax.masked(tx, lambda x: jax.tree.map(learns, trainable_mask(x, freeze)))
    if layer_decay < 1:
        scale = lambda x, params: jax.tree.map(jnp.multiply, x, layer_scales(x, layer_decay))
        tx = optax.chain(tx, optax.stateless(scale))
    return Optimizer(tx, schedule, freeze)


def scale_by_nadam(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """Adam with Nesterov momentum, as in timm and mlcommons/algorithmic-efficiency.

    In the first steps it differs from `optax.scale_by_adam(nesterov=True)`, which corrects the bias
    of the momentum by another power of `beta1`.
    """
    adam = optax.scale_by_adam(beta1, beta2, eps)

    def update(grads, state, params=None):
        _, state = adam.update(grads, state, params)
        first = optax.tree.update_moment(grads, state.mu, beta1, 1)
        first = optax.tree.bias_correction(first, beta1, state.count)
        second = optax.tree.bias_correction(state.nu, beta2, state.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), first, second), state

    return optax.GradientTransformation(adam.init, update)


def scale_by_trust_ratio() -> optax.GradientTransformation:
    """Multiplies the update of each decayed parameter by norm(parameter) / norm(update).

    This is LAMB's layer-wise adaptation (You et al., arXiv 1904.00962), with the norms of each
    block where blocks are stacked.
    """
    ratio = optax.scale_by_trust_ratio()

    def scale(path, update, param):
        one = lambda update, param: ratio.update(update, optax.EmptyState(), param)[0]
        return (jax.vmap(one) if is_stacked(path) else one)(update, param)

    tx = optax.stateless(lambda x, params: jax.tree_util.tree_map_with_path(scale, x, params))
    return optax.masked(tx, decay_mask)


# (a, b, c) of the polynomials a x + b x^3 + c x^5 that push all singular values towards 1. Source:
# timm's "quintic" and optax's "dion".
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def scale_by_muon(
    momentum: float, others: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Orthogonalizes the momentum of the matrices in blocks; all others are updated by `others`.

    Where blocks are stacked, each matrix [in, out] of [blocks, in, out] is orthogonalized by
    itself. Updates are scaled by 0.2 * sqrt(max(in, out)), which gives them the size of AdamW's
    (Liu et al., arXiv 2502.16982): learning rate and weight decay are AdamW's. Computes in float32.
    """

    def labels(tree):
        is_matrix = lambda path: is_stacked(path) and path[-1].key == "kernel"
        label = lambda path, _: "muon" if is_matrix(path) else "others"
        return jax.tree_util.tree_map_with_path(label, tree)

    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    muon = optax.contrib.scale_by_muon(
        NEWTON_SCHULZ,
        len(NEWTON_SCHULZ),
        momentum,
        nesterov=False,
        weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: axes, tree),
    )
    scale = lambda x: 0.2 * math.sqrt(max(x.shape[-2:])) * x
    scale_all = optax.stateless(lambda tree, params: jax.tree.map(scale, tree))
    return optax.partition({"muon": optax.chain(muon, scale_all), "others": others}, labels)


def is_stacked(path: Any) -> bool:
    """Returns True if the parameter at `path` has a leading axis of blocks."""
    return bool(names.STACKED.fullmatch(jax.tree_util.keystr(path, simple=True, separator="/")))


def names_per_block(name: str, leaf: Any) -> list[str]:
    """Returns the names of a parameter: one, or one per block if it is stacked."""
    if match := names.STACKED.fullmatch(name):
        return [names.unstacked_name(match, i) for i in range(leaf.shape[0])]
    return [name]


def map_names(function: Callable[[str], Any], tree: Any) -> Any:
    """Returns a tree of `function(name)`: scalars, or arrays [blocks, 1, ...] if stacked."""

    def values(name, leaf):
        blocks = names_per_block(name, leaf)
        found = np.array(list(map(function, blocks)))
        return found[0] if blocks == [name] else found.reshape(-1, *[1] * (leaf.ndim - 1))

    return names.map_named(values, tree)


# ----------------------------------------------------------------------- layer-wise learning rates


def layer_of(name: str, depth: int) -> int:
    """Returns 0 for stem, positions and class token, 1 to `depth` for blocks, then the head.

    The last norm belongs to the last block. Source: `group_matcher` of timm's TNT.

    Raises:
        InputError: TNT has no such part.
    """
    part, _, rest = name.partition("/")
    if part == "blocks":
        return 1 + int(rest.partition("/")[0])
    layers = dict.fromkeys(STEM, 0) | {"norm": depth, "head": depth + 1}
    if part not in layers:
        raise InputError(f"optimizer.layer_decay is for TNT, which has no {name}: leave it at 1")
    return layers[part]


def layer_scales(params: Any, decay: float) -> Any:
    """Returns learning-rate factors, see `map_names`: `decay` to the power of the layers above.

    The last layer, usually the head, has 1. Source: timm's `param_groups_layer_decay`, where the
    factor also applies to the weight decay.
    """
    leaves = named_leaves(params).items()
    per_block = [block for name, leaf in leaves for block in names_per_block(name, leaf)]
    depth = len({name.split("/")[1] for name in per_block if name.startswith("blocks/")})
    top = max(layer_of(name, depth) for name in per_block)
    return map_names(lambda name: np.float32(decay ** (top - layer_of(name, depth))), params)


# --------------------------------------------------------------------------------------- freezing


def trainable_mask(tree: Any, frozen: str) -> Any:
    """Returns the mask of trainable tensors, see `map_names`: their names do not match `frozen`.

    `frozen` is a regular expression that may match anywhere in a name: "^blocks/[0-3]/" freezes the
    first four blocks, "^(?!head/)" everything except the head.

    Raises:
        InputError: `frozen` is not a regular expression.
    """
    try:
        pattern = re.compile(frozen)
    except re.error as error:
        raise InputError(
            f"optimizer.freeze={frozen!r} is not a regular expression: {error}"
        ) from None
    return map_names(lambda name: pattern.search(name) is None, tree)


def check_freeze(variables: dict[str, Any], frozen: str) -> None:
    """Raises InputError unless `frozen` matches some names of `variables`, and not all."""
    masks = [trainable_mask(tree, frozen) for tree in variables.values()]
    flags = np.concatenate([np.ravel(x) for x in jax.tree.leaves(masks)])
    if flags.all() or not flags.any():
        which = "no" if flags.all() else "every"
        raise InputError(
            f"optimizer.freeze={frozen!r} matches {which} parameter: names are such as "
            "word_embed/conv/kernel, sentence_pos, blocks/3/inner/fc1/kernel, norm/scale, "
            "head/kernel"
        )


def select(mask: Any, new: Any, old: Any) -> Any:
    """Returns `new` where `mask` is True and `old` elsewhere, for a mask of `trainable_mask`."""

    def choose(selected, x, y):
        if np.all(selected) or not np.any(selected):  # no operation at all
            return x if np.all(selected) else y
        return jnp.where(selected, x, y)

    return jax.tree.map(choose, mask, new, old)


# ------------------------------------------------------------------------ learning-rate schedules

SCHEDULES = ("cosine", "linear", "constant")
# Keys of the config's optimizer for `make_schedule`; the others are for `make_optimizer`.
SCHEDULE_KEYS = (
    "schedule",
    "schedule_interval",
    "learning_rate",
    "warmup_learning_rate",
    "min_learning_rate",
    "warmup_epochs",
    "cooldown_epochs",
)


def learning_rates(
    epoch: Any,
    epochs: int,
    *,
    schedule: str = "cosine",
    learning_rate: float,
    warmup_learning_rate: float,
    min_learning_rate: float,
    warmup_epochs: int,
    cooldown_epochs: int,
    xp: ModuleType = np,
) -> Any:
    """Returns the learning rates at the epochs `epoch`, an array that may hold fractions.

    Linear from `warmup_learning_rate` towards `learning_rate`, then the schedule:

    - "cosine" and "linear" fall to `min_learning_rate` over all `epochs`, and stay there during
      `cooldown_epochs`. Warm-up replaces their beginning and does not shift it (timm's
      CosineLRScheduler, and PolyLRScheduler with power 1, with warmup_prefix=False).
    - "constant" stays at `learning_rate` for `epochs`, then falls linearly to `min_learning_rate`
      over `cooldown_epochs` (timm's WSDLRScheduler with decay_fn="linear").

    `xp` is numpy, or jax.numpy for traced epochs.
    """
    if schedule == "constant":
        height = 1 - (epoch - epochs) / max(cooldown_epochs, 1)
        height = xp.where(cooldown_epochs > 0, xp.clip(height, 0, 1), 1.0)
    else:
        done = epoch / epochs
        height = 0.5 * (1 + xp.cos(np.pi * done)) if schedule == "cosine" else 1 - done
        height = xp.where(epoch < epochs, height, 0.0)
    rates = min_learning_rate + (learning_rate - min_learning_rate) * height
    if warmup_epochs:
        height = learning_rate - warmup_learning_rate
        rising = warmup_learning_rate + epoch * height / warmup_epochs
        rates = xp.where(epoch < warmup_epochs, rising, rates)
    return rates


def make_schedule(
    epochs: int, steps_per_epoch: int, *, schedule_interval: str = "epoch", **options: Any
) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    Args:
        epochs: without the cool-down.
        steps_per_epoch: steps of an epoch.
        schedule_interval: "epoch" changes the rate once per epoch, as published; "step" in every
            step.
        **options: of `learning_rates`.
    """
    if schedule_interval == "step":
        rates = functools.partial(learning_rates, epochs=epochs, **options, xp=jnp)
        return lambda step: rates(step / steps_per_epoch)
    total = epochs + options["cooldown_epochs"]
    return per_epoch_schedule(learning_rates(np.arange(total), epochs, **options), steps_per_epoch)


def per_epoch_schedule(rates: np.ndarray, steps_per_epoch: int) -> optax.Schedule:
    """Returns a schedule that changes once per epoch and stays at the last rate."""

    def schedule(step):
        epoch = jnp.minimum(step // steps_per_epoch, len(rates) - 1)
        return jnp.asarray(rates, jnp.float32)[epoch]

    return schedule
