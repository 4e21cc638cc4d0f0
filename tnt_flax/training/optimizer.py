# SPDX-License-Identifier: Apache-2.0
"""AdamW with the published learning rates and weight decay (timm 0.3.2), and fine-tuning.

Fine-tuning adds layer-wise learning rates and freezing by name. Parameters of equal blocks are
stacked on a leading axis. Names here are per block, "blocks/3/inner/fc1/kernel", as everywhere in
the user interface; a property of one block is one element of an array [blocks, 1, ...].
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import named_leaves

# Keys of the config's optimizer for `make_optimizer`; the others are for `epoch_learning_rates`.
ADAMW_KEYS = ("beta1", "beta2", "eps", "weight_decay", "clip_norm", "layer_decay", "freeze")
STEM = ("word_embed", "word_pos", "proj", "cls_token", "sentence_pos")


class Optimizer(NamedTuple):
    """An optimizer and what a training step must know about it."""

    tx: optax.GradientTransformation
    schedule: optax.Schedule  # learning rate as a function of the step
    freeze: str = ""  # regular expression of frozen parameters, see `trainable_mask`


def epoch_learning_rates(
    epochs: int,
    *,
    learning_rate: float,
    warmup_learning_rate: float,
    min_learning_rate: float,
    warmup_epochs: int,
    cooldown_epochs: int,
) -> np.ndarray:
    """Returns the learning rates of all `epochs + cooldown_epochs` epochs.

    Linear from `warmup_learning_rate` towards `learning_rate`, then a cosine, then constant at
    `min_learning_rate`. The cosine spans all `epochs`: warm-up replaces its beginning and does not
    shift it (timm's CosineLRScheduler with warmup_prefix=False).
    """
    epoch = np.arange(epochs + cooldown_epochs, dtype=np.float64)
    height = learning_rate - min_learning_rate
    rates = min_learning_rate + 0.5 * height * (1 + np.cos(np.pi * epoch / epochs))
    rates = np.where(epoch < epochs, rates, min_learning_rate)
    if warmup_epochs:
        height = learning_rate - warmup_learning_rate
        rising = warmup_learning_rate + epoch * height / warmup_epochs
        rates = np.where(epoch < warmup_epochs, rising, rates)
    return rates


def per_epoch_schedule(rates: np.ndarray, steps_per_epoch: int) -> optax.Schedule:
    """Returns a schedule that changes once per epoch and stays at the last rate."""

    def schedule(step):
        epoch = jnp.minimum(step // steps_per_epoch, len(rates) - 1)
        return jnp.asarray(rates, jnp.float32)[epoch]

    return schedule


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
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
    layer_decay: float = 1.0,
    freeze: str = "",
) -> Optimizer:
    """Returns AdamW as `torch.optim.AdamW` computes it.

    Args:
        schedule: learning rate as a function of the step.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: of the parameters in `decay_mask`, multiplied by the learning rate.
        clip_norm: largest global norm of the gradient; 0 disables.
        layer_decay: see `layer_scales`; 1 disables.
        freeze: regular expression, see `trainable_mask`; "" disables. Tensors that match in all
            blocks get no moments. `step.make_train_step` keeps all that match.
    """

    tx = optax.adamw(schedule, beta1, beta2, eps, weight_decay=weight_decay, mask=decay_mask)
    if clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
    if freeze:
        learns = lambda mask: bool(np.any(mask))  # in one block at least
        tx = optax.masked(tx, lambda x: jax.tree.map(learns, trainable_mask(x, freeze)))
    if layer_decay < 1:
        scale = lambda x, params: jax.tree.map(jnp.multiply, x, layer_scales(x, layer_decay))
        tx = optax.chain(tx, optax.stateless(scale))
    return Optimizer(tx, schedule, freeze)


def names_per_block(name: str, leaf: Any) -> list[str]:
    """Returns the names of a parameter: one, or one per block if it is stacked."""
    stacked = re.fullmatch(r"(|.*/)blocks_(\d+)/(.*)", name)
    if not stacked:
        return [name]
    before, first, rest = stacked.groups()
    return [f"{before}blocks/{int(first) + i}/{rest}" for i in range(leaf.shape[0])]


def map_names(function: Callable[[str], Any], tree: Any) -> Any:
    """Returns a tree of `function(name)`: scalars, or arrays [blocks, 1, ...] if stacked."""

    def values(name, leaf):
        names = names_per_block(name, leaf)
        found = np.array([function(n) for n in names])
        return found[0] if names == [name] else found.reshape(-1, *[1] * (leaf.ndim - 1))

    leaves = [values(name, leaf) for name, leaf in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


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
    names = [n for name, leaf in named_leaves(params).items() for n in names_per_block(name, leaf)]
    depth = len({name.split("/")[1] for name in names if name.startswith("blocks/")})
    top = max(layer_of(name, depth) for name in names)
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
