# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a config, said before anything is built of it."""

import functools

import jax
from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError
from tnt_flax.training import experiment, fine_tuning


def check(config: ConfigDict) -> None:
    """Raises InputError for values that no other place would refuse by name."""
    for key, known in {
        "data.corrupt": ("error", "skip"),
        "augment.resampling": ("pillow", "opencv"),
        "eval.weights": ("ema", "raw"),
        "mesh.gradient_dtype": ("float32", "bfloat16"),
    }.items():
        group, name = key.split(".")
        if config[group][name] not in known:
            raise InputError(f"{key}={config[group][name]!r} is none of {known}")
    for key, least in {
        "epochs": 1,
        "optimizer.warmup_epochs": 0,
        "optimizer.cooldown_epochs": 0,
        "checkpoint.keep": 1,
        "data.threads": 1,
        "data.workers": 0,
        "data.retry_seconds": 0,
        "stall_minutes": 0,
        "mesh.fsdp": 1,
        "mesh.tensor": 1,
    }.items():
        value = functools.reduce(lambda c, k: c[k], key.split("."), config)
        if value < least:
            raise InputError(f"{key}={value} is less than {least}")
    if not 0 <= config.data.holdout < 1:
        raise InputError(f"data.holdout={config.data.holdout} is outside [0, 1)")
    if not 0 < config.optimizer.layer_decay <= 1:
        raise InputError(f"optimizer.layer_decay={config.optimizer.layer_decay} is outside (0, 1]")
    if config.optimizer.freeze:  # is it any parameter's name?
        shapes = jax.eval_shape(
            experiment.init_params(experiment.build_model(config, 1), config), jax.random.key(0)
        )
        fine_tuning.trained(shapes, config.optimizer.freeze)
    for key in ("mean", "std"):
        if len(config.data[key]) != 3:
            raise InputError(f"data.{key}={config.data[key]} must have three values, one a channel")
    experiment.build_randaugment(config)
    options = config.augment
    for key in ("mix_prob", "mix_switch_prob", "erase_prob"):
        if not 0 <= options[key] <= 1:
            raise InputError(f"augment.{key}={options[key]} is outside [0, 1]")
    for key in ("mixup_alpha", "cutmix_alpha", "color_jitter"):
        if options[key] < 0:
            raise InputError(f"augment.{key}={options[key]} is less than 0")
    for key in ("erase_area", "erase_ratio"):
        low, high = options[key]
        if not 0 < low <= high:
            raise InputError(
                f"augment.{key}={options[key]} is no range: use (least, most), above 0"
            )
    pairs = 2 * options.mix_groups
    if experiment.mixes(config) and (pairs < 2 or config.batch_size % pairs):
        raise InputError(
            f"batch_size={config.batch_size} does not split into augment.mix_groups="
            f"{options.mix_groups} groups of pairs: use a multiple of {max(pairs, 2)}, other "
            f"groups, or augment.mixup_alpha=0 and augment.cutmix_alpha=0"
        )
    if not 0 <= config.ema.decay < 1:
        raise InputError(f"ema.decay={config.ema.decay} is outside [0, 1)")
