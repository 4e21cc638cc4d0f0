# SPDX-License-Identifier: Apache-2.0
"""AdamW with the published learning rates and weight-decay groups (timm 0.3.2 as TNT used it)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tnt_flax.training import fine_tuning


def epoch_learning_rates(
    *, base: float, warmup: float, minimum: float, epochs: int, warmup_epochs: int, cooldown: int
) -> np.ndarray:
    """The learning rate of every epoch, `epochs + cooldown` of them.

    Linear from `warmup` towards `base` for `warmup_epochs`, then a cosine to `minimum` over
    `epochs` which is *not* shifted by the warm-up, then `cooldown` epochs at `minimum`
    (timm's CosineLRScheduler with t_in_epochs and warmup_prefix=False).
    """
    epoch = np.arange(epochs + cooldown, dtype=np.float64)
    rates = minimum + 0.5 * (base - minimum) * (1 + np.cos(np.pi * epoch / epochs))
    rates = np.where(epoch < epochs, rates, minimum)
    if warmup_epochs:
        rising = warmup + epoch * (base - warmup) / warmup_epochs
        rates = np.where(epoch < warmup_epochs, rising, rates)
    return rates


def per_epoch_schedule(rates: np.ndarray, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate changes once per epoch, never within one; the last one stays."""

    def schedule(step):
        epoch = jnp.minimum(step // steps_per_epoch, len(rates) - 1)
        return jnp.asarray(rates, jnp.float32)[epoch]

    return schedule


def decay_mask(params) -> dict:
    """True for the parameters that weight decay shrinks: kernels of dense and conv layers.

    Also, as published, PyramidTNT's relative positions. Not biases, norms, the class token or other
    positions. Names decide, not ranks: parameters of scanned blocks carry a leading layer axis, so
    a stacked bias is a matrix too.
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
) -> optax.GradientTransformation:
    """torch.optim.AdamW; `clip_norm` > 0 first clips the global norm of the gradient to it.

    `layer_decay` below 1 slows the layers down as `fine_tuning.layer_scales` says; what `freeze`
    matches gets no moments, and its updates must not be applied.
    """
    tx = optax.adamw(schedule, beta1, beta2, eps, weight_decay=weight_decay, mask=decay_mask)
    tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx) if clip_norm else tx
    tx = fine_tuning.only_trained(tx, freeze) if freeze else tx
    return optax.chain(tx, fine_tuning.scale_by_layer(layer_decay)) if layer_decay < 1 else tx
