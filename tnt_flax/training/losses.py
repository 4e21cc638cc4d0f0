# SPDX-License-Identifier: Apache-2.0
"""Losses: functions of logits and targets that return one loss per image.

The training step takes the mean over the batch. Targets are probabilities: mixup, smoothing and
images of several classes need no loss of their own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

LOSSES = ("softmax", "bce")
# (logits float32 [B, K], targets float32 [B, K]) -> losses float32 [B]
LossFn = Callable[[jax.Array, jax.Array], jax.Array]


def make_loss_fn(
    name: str,
    *,
    bce_threshold: float | None = None,
    bce_sum: bool = False,
    class_weights: np.ndarray | None = None,
) -> LossFn:
    """Returns the loss `name` of LOSSES, `loss_fn(logits, targets)`, float32 [B].

    Args:
        name: "softmax" is the cross entropy of the softmax. "bce" is the binary cross entropy of
            one sigmoid per class (timm's BinaryCrossEntropy).
        bce_threshold: targets above are 1 and all others 0, for "bce"; None leaves them unchanged.
        bce_sum: sum over the classes, for "bce"; otherwise the mean.
        class_weights: float [K], factors of the terms that attract an image to a class. These are
            the `weight` of torch's cross_entropy and the `pos_weight` of its
            binary_cross_entropy_with_logits. The mean over a batch divides by its size, as torch
            does for probabilities as targets. None weighs all classes equally.
    """
    weights = None if class_weights is None else jnp.asarray(class_weights, jnp.float32)[None]

    def weighted(targets):
        return targets if weights is None else targets * weights

    def softmax(logits, targets):
        return optax.softmax_cross_entropy(logits, weighted(targets))

    def bce(logits, targets):
        if bce_threshold is not None:
            targets = (targets > bce_threshold).astype(logits.dtype)
        positive = weighted(targets) * jax.nn.log_sigmoid(logits)
        losses = -(positive + (1 - targets) * jax.nn.log_sigmoid(-logits))
        return losses.sum(axis=1) if bce_sum else losses.mean(axis=1)

    return {"softmax": softmax, "bce": bce}[name]
