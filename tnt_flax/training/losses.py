# SPDX-License-Identifier: Apache-2.0
"""The training loss: cross-entropy with soft targets, label smoothing folded into the targets."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def smooth_one_hot(
    labels: Int[Array, "B"], num_classes: int, smoothing: float
) -> Float[Array, "B K"]:
    """Rows that sum to 1: smoothing / K everywhere, and 1 - smoothing more at the label."""
    off = smoothing / num_classes
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + off


def soft_target_cross_entropy(
    logits: Float[Array, "B K"], targets: Float[Array, "B K"]
) -> Float[Array, "B"]:
    """-sum_k targets_k log softmax(logits)_k for every example (timm's SoftTargetCrossEntropy)."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)
