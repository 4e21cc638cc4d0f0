# SPDX-License-Identifier: Apache-2.0
"""Losses: functions of logits and targets that return one loss per image.

The training step takes the mean over the batch. Targets are probabilities: mixup, smoothing and
images of several classes need no loss of their own.
"""

import csv
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tnt_flax.core.errors import InputError, as_input_error, did_you_mean, listed
from tnt_flax.data import sources
from tnt_flax.data.sources import storage

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


def balanced_class_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns weights in inverse proportion to the number of images of each class, float64 [K].

    `labels` are int [images], or [images, L] padded with -1. The mean weight of all labels is 1, as
    in scikit-learn. A class without images has the weight 0.
    """
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    return np.where(counts, counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1)), 0.0)


def read_class_weights(path: str, source: sources.Source) -> np.ndarray:
    """Returns the weights of the classes of `source`, float64 [K].

    Args:
        path: a CSV file with the columns class and weight; "balanced" is `balanced_class_weights`.
        source: the training data.

    Raises:
        InputError: the file cannot be read, a weight is no number or negative, or the classes of
            the file are not those of the source.
    """
    class_names = source.class_names
    if path == "balanced":
        return balanced_class_weights(sources.labels_of(source), len(class_names))
    with as_input_error(f"cannot read the class weights {path}"):
        rows = [*csv.reader(storage.read_file(path).decode("utf-8-sig").splitlines())]
    weights = {}
    for number, row in enumerate(rows, start=1):
        if not row or (number == 1 and row == ["class", "weight"]):
            continue
        name = row[0].strip()
        try:
            weights[name] = float(row[1])
            valid = len(row) == 2 and 0 <= weights[name] < np.inf
        except (IndexError, ValueError):
            valid = False
        if not valid:
            raise InputError(f"{path}, line {number}: expected CLASS,WEIGHT with a weight >= 0")
        if name not in class_names:
            hint = did_you_mean(name, class_names)
            raise InputError(f"{path}, line {number}: the data have no class {name!r}{hint}")
    if missing := [name for name in class_names if name not in weights]:
        raise InputError(f"{path} has no weight of {listed(missing)}: add a line for each class")
    return np.array([weights[name] for name in class_names])
