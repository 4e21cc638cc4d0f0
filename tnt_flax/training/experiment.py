# SPDX-License-Identifier: Apache-2.0
"""From a config to what it describes.

Only this file, `convert.described`, `train`, `evaluate` and `tools` read one.
"""

import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import merged
from tnt_flax.data import pipeline, randaugment, sources, transforms
from tnt_flax.data.plan import TrainPlan
from tnt_flax.models import Model, create_model
from tnt_flax.runtime import sharding
from tnt_flax.training import mixup, step
from tnt_flax.training.model_config import with_network
from tnt_flax.training.optimizer import epoch_learning_rates, make_optimizer, per_epoch_schedule
from tnt_flax.weights.identify import check_same, unstored_fields
from tnt_flax.weights.load import adapt
from tnt_flax.weights.read import Checkpoint, read_checkpoint

Batches = Iterator[dict[str, np.ndarray]]


def build_mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of all devices of all hosts, or of `devices`."""
    sizes = dict(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    mesh = sharding.make_mesh(devices, **sizes)
    sharding.check_batch_size("batch_size", config.batch_size, mesh)
    sharding.check_batch_size("eval.batch_size", config.eval.batch_size, mesh)
    return mesh


def build_model(config: ConfigDict, num_classes: int) -> Model:
    """The network that `config.model` names, with the fields that it sets."""
    config = with_network(config)
    fields = {k: v for k, v in config.model.items() if k != "name" and v is not None}
    model = create_model(config.model.name, num_classes=num_classes, **fields)
    size = config.data.image_size
    if size < 1 or size % model.patch_size:
        raise InputError(
            f"data.image_size={size} is not divisible by the patch size {model.patch_size}: "
            f"use a multiple of {model.patch_size}"
        )
    if model.outer_heads % config.mesh.tensor:
        raise InputError(
            f"mesh.tensor={config.mesh.tensor} does not divide the {model.outer_heads} heads of "
            f"the outer transformer of {config.model.name}"
        )
    return model


def init_params(model: Model, config: ConfigDict) -> Callable[[jax.Array], Any]:
    """Returns `init(key) -> params`, a pure function to jit or to `jax.eval_shape`.

    As all `params` of a run they are `state.merged`: with the statistics of BatchNorms.
    """
    size = config.data.image_size
    return lambda key: merged(model.init(key, jnp.zeros((1, size, size, 3)), train=False))


def load_params(
    config: ConfigDict,
    model: Model,
    path: str,
    class_names: tuple[str, ...] | None = None,
    *,
    checkpoint: str = "best",
) -> tuple[Any, Checkpoint]:
    """The weights at `path`, of any system, for `model`; returns (params, what they came from).

    Their positions are resampled where `config.data.image_size` is another. With `class_names`, to
    fine-tune, other classes get a new head; without, to evaluate, the head is what it is.

    Raises:
        InputError: see `convert.checkpoints.read_checkpoint`; or they are of another network.
    """
    found = read_checkpoint(
        path,
        weights="ema" if class_names else config.eval.weights,
        checkpoint=checkpoint,
        **unstored_fields(model),
    )
    for key in ("mean", "std"):
        made, given = tuple(found.preprocessing[key]), tuple(config.data[key])
        if made != given:
            found.notes.append(f"warning: made with data.{key}={made}, used with {given}")
    summary, size, theirs = found.summary(), config.data.image_size, found.network.model.num_classes
    classes = len(class_names) if class_names else theirs
    new_head = classes != theirs or class_names and found.class_names not in (None, class_names)
    adapted = adapt(found, classes, size, 3, new_head=bool(new_head))
    wanted = model.clone(num_classes=classes)
    check_same(found.path, adapted, wanted, f"the {config.model.name} that the config describes")
    print("; ".join([f"loaded {summary}", *found.notes]), file=sys.stderr)
    return found.params, found


def build_optimizer(
    config: ConfigDict, steps_per_epoch: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    optimizer = config.optimizer
    rates = epoch_learning_rates(
        base=optimizer.learning_rate,
        warmup=optimizer.warmup_learning_rate,
        minimum=optimizer.min_learning_rate,
        epochs=config.epochs,
        warmup_epochs=optimizer.warmup_epochs,
        cooldown=optimizer.cooldown_epochs,
    )
    schedule = per_epoch_schedule(rates, steps_per_epoch)
    tx = make_optimizer(
        schedule,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        clip_norm=optimizer.clip_norm,
        layer_decay=optimizer.layer_decay,
        freeze=optimizer.freeze,
    )
    return tx, schedule


def run_keys(config: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """The keys of a run: of the initial weights, and of all its steps (see `steps.step_keys`)."""
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    return init_key, step_key


def build_train_step(config: ConfigDict, model: Model, tx, schedule):
    prepare = build_prepare(config, model.num_classes)
    options = dict(
        ema_decay=config.ema.decay,
        freeze=config.optimizer.freeze,
        gradient_dtype=config.mesh.gradient_dtype,
    )
    return step.make_train_step(model, tx, schedule, prepare, **options)


def build_prepare(config: ConfigDict, num_classes: int):
    """The part of the training step before the network."""
    options = config.augment
    mix = functools.partial(
        mixup.mix,
        groups=options.mix_groups,
        mixup_alpha=options.mixup_alpha,
        cutmix_alpha=options.cutmix_alpha,
        prob=options.mix_prob,
        switch_prob=options.mix_switch_prob,
    )
    erase = functools.partial(
        mixup.erase,
        prob=options.erase_prob,
        area=options.erase_area,
        ratio=options.erase_ratio,
    )
    return step.make_prepare(
        num_classes,
        label_smoothing=options.label_smoothing,
        mean=config.data.mean,
        std=config.data.std,
        mix=mix if mixes(config) else None,
        erase=erase if options.erase_prob else None,
    )


def mixes(config: ConfigDict) -> bool:
    """Does a training step mix images?"""
    return bool(config.augment.mixup_alpha or config.augment.cutmix_alpha)


def build_eval_step(config: ConfigDict, model: Model, classes: tuple[int, ...] | None = None):
    return step.make_eval_step(model, mean=config.data.mean, std=config.data.std, classes=classes)


def build_predict_step(config: ConfigDict, model: Model):
    return step.make_predict_step(model, mean=config.data.mean, std=config.data.std)


def open_source(config: ConfigDict, split: str, *, several_labels: bool = False):
    """The records of a split: `config.data.train_split` or `eval_split`; see `data.sources`."""
    data = config.data
    return sources.open_source(
        data.source,
        split,
        root=data.root,
        name=data.name,
        class_list=data.class_list,
        eval_labels=data.eval_labels,
        holdout=sources.Holdout(data.holdout, data.train_split, data.eval_split),
        several_labels=several_labels,
    )


def build_plan(config: ConfigDict, num_records: int) -> TrainPlan:
    """The order of the training records; what is repeated is spread over the groups that mix."""
    return TrainPlan(
        num_records,
        config.batch_size,
        config.seed,
        repeats=config.augment.repeats,
        groups=config.augment.mix_groups,
    )


def build_randaugment(config: ConfigDict) -> randaugment.RandAugment | None:
    """What `config.augment.randaugment` spells; None for "", which is off."""
    spelled = config.augment.randaugment
    return randaugment.parse(spelled, config.data.mean) if spelled else None


def build_train_transform(config: ConfigDict) -> Callable[..., np.ndarray]:
    """`train_transform` of the library that `config.augment.resampling` names."""
    if config.augment.resampling == "opencv":
        from tnt_flax.data import opencv

        return opencv.train_transform
    return transforms.train_transform


def train_batches(
    config: ConfigDict, source, plan: TrainPlan, start_step: int, num_steps: int
) -> Batches:
    """This host's rows of the batches of `num_steps` steps from `start_step` on."""
    transform = functools.partial(
        build_train_transform(config),
        size=config.data.image_size,
        scale=config.augment.scale,
        ratio=config.augment.ratio,
        flip=config.augment.flip,
        jitter=config.augment.color_jitter,
        randaugment=build_randaugment(config),
    )
    return pipeline.train_batches(
        source,
        plan,
        transform=transform,
        start_step=start_step,
        num_steps=num_steps,
        **_reading(config),
    )


def eval_batches(config: ConfigDict, source) -> Batches:
    """This host's rows of the evaluation batches: every image once, then padding."""
    transform = functools.partial(
        transforms.eval_transform,
        size=config.data.image_size,
        crop_fraction=config.data.crop_fraction,
    )
    return pipeline.eval_batches(
        source, transform=transform, batch_size=config.eval.batch_size, **_reading(config)
    )


def _reading(config: ConfigDict) -> dict[str, Any]:
    alone = jax.process_count() == 1
    host, num_hosts = (0, 1) if alone else sharding.host_rows(build_mesh(config))
    return dict(
        corrupt=config.data.corrupt,
        host=host,
        num_hosts=num_hosts,
        threads=config.data.threads,
        workers=config.data.workers,
        retry_seconds=config.data.retry_seconds,
    )


def in_steps(key: str, duration: str, steps_per_epoch: int) -> int:
    """ "3 epochs" or "500 steps" as a number of steps, at least 1.

    Raises:
        InputError: `duration`, the value of `key`, is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(epoch|step)s?\s*", duration)
    count = round(float(match[1]) * {"epoch": steps_per_epoch, "step": 1}[match[2]]) if match else 0
    if count < 1:
        raise InputError(f'{key}={duration!r} is no duration: use "N epochs" or "N steps"')
    return count
