# SPDX-License-Identifier: Apache-2.0
"""Learning rates as functions of the epoch or the step; the published ones are timm 0.3.2's."""

import functools
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

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
