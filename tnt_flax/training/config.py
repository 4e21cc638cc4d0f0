# SPDX-License-Identifier: Apache-2.0
"""Checks a config, and completes one that leaves the network to a weights file."""

import re
from operator import attrgetter
from typing import Any

from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError
from tnt_flax.data import images, randaugment, transforms
from tnt_flax.data.stored_logits import is_logits_file
from tnt_flax.models import MODELS, Network, create_model
from tnt_flax.training import distillation
from tnt_flax.training.losses import LOSSES
from tnt_flax.training.optimizer import OPTIMIZERS, SCHEDULES
from tnt_flax.weights import identify
from tnt_flax.weights.read import read_checkpoint

# Valid values: a condition, the end of the message if it is False, and the keys it applies to.
RULES = (
    (lambda x: x >= 0, "is less than 0", (
        "optimizer.warmup_epochs", "optimizer.cooldown_epochs", "data.workers",
        "data.retry_seconds", "stall_minutes", "eval.patience", "augment.mixup_alpha",
        "augment.cutmix_alpha", "augment.color_jitter", "augment.mix_off_epochs", "seed",
    )),
    (lambda x: x >= 1, "is less than 1", (
        "epochs", "batch_size", "accumulate", "checkpoint.keep", "data.threads", "augment.repeats",
        "mesh.fsdp", "mesh.tensor",
    )),
    (lambda x: 0 <= x <= 1, "is outside [0, 1]", (
        "augment.mix_prob", "augment.mix_switch_prob", "augment.erase_prob", "distill.weight",
    )),
    (lambda x: x > 0, "is not greater than 0", ("distill.temperature",)),
    (lambda x: 0 <= x < 1, "is outside [0, 1)", (
        "data.holdout", "ema.decay", "optimizer.momentum",
    )),
    (lambda x: 0 < x <= 1, "is outside (0, 1]", ("optimizer.layer_decay", "data.crop_fraction")),
    (lambda x: 0 < x[0] <= x[1], "is not a valid range: use (low, high), above 0", (
        "augment.erase_area", "augment.erase_ratio",
    )),
    (lambda x: len(x) == 3, "must have three values, one per channel", ("data.mean", "data.std")),
)  # fmt: skip
CHOICES = {
    "checkpoint.best": ("top1", "mean_per_class", "top5", "loss", "ece", "mean_average_precision"),
    "data.corrupt": ("error", "skip"),
    "distill.kind": distillation.KINDS,
    "augment.interpolation": tuple(transforms.INTERPOLATIONS),
    "augment.randaugment_on": ("host", "device"),
    "augment.resampling": ("pillow", "opencv"),
    "eval.weights": ("ema", "raw"),
    "loss.name": LOSSES,
    "mesh.gradient_dtype": ("float32", "bfloat16"),
    "optimizer.name": OPTIMIZERS,
    "optimizer.schedule": SCHEDULES,
    "optimizer.schedule_interval": ("epoch", "step"),
}


def check_config(config: ConfigDict) -> None:
    """Checks all values that no other function checks by the name of their key.

    Raises:
        InputError: with the key, its value and the valid values.
    """
    for key, known in CHOICES.items():
        if (value := attrgetter(key)(config)) not in known:
            raise InputError(f"{key}={value!r} is none of {known}")
    for valid, problem, keys in RULES:
        for key in keys:
            if not valid(value := attrgetter(key)(config)):
                raise InputError(f"{key}={value} {problem}")
    images.Policy.of(config.data)
    transforms.height_width(config.data.image_size)
    if config.mesh.gradient_dtype == "bfloat16" and config.model.dtype != "bfloat16":
        raise InputError(
            f"mesh.gradient_dtype='bfloat16' needs model.dtype='bfloat16', not "
            f"{config.model.dtype!r}: change one of them"
        )
    if config.batch_size % config.accumulate:
        raise InputError(
            f"accumulate={config.accumulate} does not divide batch_size={config.batch_size}"
        )
    augment, groups = config.augment, config.augment.mix_groups
    if augment.three_augment and augment.randaugment:
        raise InputError('augment.three_augment is not for RandAugment: set augment.randaugment=""')
    if augment.randaugment:
        randaugment.parse(augment.randaugment, config.data.mean)
    mixes = augment.mixup_alpha or augment.cutmix_alpha
    if mixes and is_logits_file(config.distill.teacher):
        raise InputError(
            "distill.teacher has logits of single images, not of mixed ones: set "
            "augment.mixup_alpha=0 and augment.cutmix_alpha=0, or use the weights as the teacher"
        )
    if mixes and (groups < 1 or config.batch_size % (2 * groups)):
        raise InputError(
            f"batch_size={config.batch_size} does not split into augment.mix_groups={groups} "
            f"groups of pairs: use a multiple of {max(2 * groups, 2)}, other groups, or "
            "augment.mixup_alpha=0 and augment.cutmix_alpha=0"
        )


def steps_of(key: str, duration: str, steps_per_epoch: int) -> int:
    """Returns the number of steps, at least 1, of a duration such as "3 epochs" or "500 steps".

    Raises:
        InputError: `duration`, the value of `key`, is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(epoch|step)s?\s*", duration)
    count = round(float(match[1]) * {"epoch": steps_per_epoch, "step": 1}[match[2]]) if match else 0
    if count < 1:
        raise InputError(f'{key}={duration!r} is not a valid duration: use "N epochs" or "N steps"')
    return count


def resolve_model_config(config: ConfigDict, path: str = "", checkpoint: str = "best"):
    """Returns a copy of `config` with the network of the weights at `path`, default `init_from`.

    Fields of `config.model` that are set stay. A config that names a network, or has no weights, is
    returned unchanged.

    Raises:
        InputError: the weights cannot be read, or no config can describe their network.
    """
    path = path or config.init_from
    if config.model.name or not path:
        return config
    known = {name: config.model[name] for name in identify.UNSTORED_FIELDS}
    known = {name: value for name, value in known.items() if value is not None}
    ignore = dict(other_head=True, put=lambda name, x: None)  # only the body counts
    found = read_checkpoint(path, checkpoint=checkpoint, **ignore, **known)
    config = config.copy_and_resolve_references()
    for field, value in describe_model(found.path, found.network.model).items():
        if field not in config.model:
            raise InputError(f"{found.path} has {field}={value}, which no config key can express")
        if field == "name" or config.model[field] is None:
            config.model[field] = value
    return config


def describe_model(path: str, model: Network) -> dict[str, Any]:
    """Returns the name of the closest published network and all fields that differ from it.

    Raises:
        InputError: `model`, read from `path`, is of no published variant.
    """
    variant = identify.variant_of(model)
    names = [name for name in MODELS if identify.variant_of(create_model(name)) == variant]
    if not names:
        raise InputError(f"{path} is a network of no published variant: set model.name")
    name = identify.name_of(model) or names[0]
    published = create_model(name, num_classes=model.num_classes)
    changed = identify.differences(model, published)
    return {"name": name} | {field: value for field, (value, _) in changed.items()}
