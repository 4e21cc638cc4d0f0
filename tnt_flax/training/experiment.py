# SPDX-License-Identifier: Apache-2.0
"""An experiment: the data, network, optimizer and steps that a config describes.

Training, evaluation and the tools that read a config start from this class.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError
from tnt_flax.data import transforms
from tnt_flax.data.labels import class_order_warning
from tnt_flax.data.stored_logits import is_logits_file
from tnt_flax.models import Network, create_model
from tnt_flax.runtime import processes, sharding
from tnt_flax.runtime.checkpoints import Checkpoints
from tnt_flax.runtime.workdir import check_space, config_to_json, explain_write_errors
from tnt_flax.training import device_randaugment, distillation, losses, mixup, step
from tnt_flax.training import optimizer as optimizers
from tnt_flax.training.config import check_config, resolve_model_config, steps_of
from tnt_flax.training.data import ExperimentData
from tnt_flax.training.optimizer import Optimizer
from tnt_flax.training.step import TrainState
from tnt_flax.training.trackers import parse_trackers
from tnt_flax.weights.identify import check_same, unstored_fields
from tnt_flax.weights.load import adapt
from tnt_flax.weights.read import LoadedWeights, read_checkpoint


class Keys(NamedTuple):
    """Random keys of a run."""

    init: jax.Array  # of the initial weights
    steps: jax.Array  # of all steps, see `step.step_keys`


class Experiment:
    """Everything that a config describes. `data` is its `training.data.ExperimentData`.

    Cached properties are built on first use, which may raise InputError. Methods named `make_*`
    return functions or modules that are not jitted. `init_variables` and `init_state` are for the
    caller to jit. `train_step` and `eval_step` are jitted for `mesh`.

    Args:
        config: see `configs/default.py`. If it names no network, the network is that of `weights`.
        weights: file, workdir or hf:// address, read only if `config` names no network; defaults to
            `config.init_from`. To load the values, see `load_variables`.
        checkpoint: "best" or "last", where `weights` is a workdir.
        devices: devices of the mesh; defaults to all devices of all processes.
        num_classes: defaults to the number of classes of the training data. If it is given, no
            data are read for the network and the loss: class weights are ones.
        steps_per_epoch: defaults to that of the training data. With `num_classes` and
            `steps_per_epoch`, the train step is built without reading data.

    Raises:
        InputError: a value in the config is wrong, or `weights` cannot be read.
    """

    def __init__(
        self,
        config: ConfigDict,
        *,
        weights: str = "",
        checkpoint: str = "best",
        devices: Sequence[Any] | None = None,
        num_classes: int | None = None,
        steps_per_epoch: int | None = None,
    ):
        self.config = resolve_model_config(config, weights, checkpoint)
        check_config(self.config)
        self.data = ExperimentData(self.config, self._host_rows)
        self._devices = devices
        self._num_classes = num_classes
        self._steps_per_epoch = steps_per_epoch

    def check_training(self) -> None:
        """Checks what `__init__` does not, before a workdir stores the config.

        Raises:
            InputError: see `make_model`; also if `augment.resampling` or `log.trackers` needs a
                package that is not installed, a tracker is unknown, or `optimizer.freeze` matches
                no parameter or all of them.
        """
        # The results are not needed, only the errors.
        transforms.resampler(self.config.augment.resampling)
        parse_trackers(self.config.log.trackers)
        self.make_model(num_classes=1)
        if self.config.optimizer.freeze:
            # Names do not depend on the number of classes, which only the data tell.
            init_variables = Experiment(self.config, num_classes=1).init_variables
            shapes = jax.eval_shape(init_variables, jax.random.key(0))
            optimizers.check_freeze(shapes, self.config.optimizer.freeze)

    def training_warnings(self) -> list[str]:
        """Returns what is probably wrong in the config, given the number of steps."""
        found, options, decay = [], self.config.optimizer, self.config.ema.decay
        if options.name in ("adamw", "nadamw") and options.learning_rate >= 4e-3:
            found.append(
                f"optimizer.learning_rate={options.learning_rate} often diverges with "
                f"{options.name}: DeiT-III's 4e-3 is for optimizer.name=lamb"
            )
        share = 0 if self.config.ema.warmup else decay**self.total_steps
        if share > 0.1:
            found.append(
                f"after all {self.total_steps} steps, {share:.0%} of the EMA will still be the "
                f"initial weights, with ema.decay={decay}: set ema.warmup=True"
            )
        return found

    @property
    def _has_data(self) -> bool:
        """False if the caller gave the number of classes: network and loss then need no data."""
        return self._num_classes is None

    @property
    def steps_per_epoch(self) -> int:
        return self._steps_per_epoch or self.data.plan.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * (self.config.epochs + self.config.optimizer.cooldown_epochs)

    def interval(self, group: str) -> int:
        """Returns `every`, in steps, of a group of the config: "eval", "checkpoint" or "log"."""
        return steps_of(f"{group}.every", self.config[group].every, self.steps_per_epoch)

    # ---------------------------------------------------------------------------- network

    def make_model(self, num_classes: int) -> Network:
        """Returns the network that `config.model` describes.

        Raises:
            InputError: no network is named, or it does not fit `data.image_size` or `mesh.tensor`.
        """
        config = self.config
        if not config.model.name:
            raise InputError(
                "model.name is empty, which means the network of the weights: set init_from=FILE, "
                "or name one of tnt_flax.list_models()"
            )
        fields = {k: v for k, v in config.model.items() if k != "name" and v is not None}
        model = create_model(config.model.name, num_classes=num_classes, **fields)
        if any(side < 1 or side % model.patch_size for side in self.data.image_size):
            raise InputError(
                f"data.image_size={config.data.image_size} is not divisible by the patch size "
                f"{model.patch_size}: use multiples of {model.patch_size}"
            )
        if model.outer_heads % config.mesh.tensor:
            raise InputError(
                f"mesh.tensor={config.mesh.tensor} does not divide the {model.outer_heads} heads "
                f"of the outer transformer of {config.model.name}"
            )
        return model

    @functools.cached_property
    def model(self) -> Network:
        """The network, for the classes of the training data."""
        num_classes = len(self.data.class_names) if self._has_data else self._num_classes
        return self.make_model(num_classes)

    def init_variables(self, key: jax.Array) -> step.Variables:
        """Returns initial parameters and statistics; to jit or to `jax.eval_shape`."""
        return self.model.init(key, jnp.zeros((1, *self.data.image_size, 3)), train=False)

    def load_variables(
        self, path: str, class_names: Sequence[str] | None = None, *, checkpoint: str = "best"
    ) -> tuple[step.Variables, LoadedWeights]:
        """Loads weights of any framework for the network of the config.

        Positions are resampled to `data.image_size`. Warns of other preprocessing than the
        config's. To fine-tune, pass `class_names` of the training data: loads EMA weights, and
        replaces the head if the weights have other classes. To evaluate, leave them out: loads the
        weights that `eval.weights` names, keeps the head, and also compares the crop.

        Returns:
            The variables, and the checkpoint they were read from.

        Raises:
            InputError: the weights cannot be read (see `weights.read.read_checkpoint`), or are of
                another network.
        """
        # Most files state neither the numbers of heads nor the patch size: pass the config's.
        model, image_size = self.make_model(num_classes=0), self.data.image_size
        kind = "ema" if class_names else self.config.eval.weights
        fields = unstored_fields(model)
        found = read_checkpoint(
            path, weights=kind, checkpoint=checkpoint, other_head=bool(class_names), **fields
        )
        found.notes += self._preprocessing_warnings(found, crop=not class_names)
        summary = found.summary()  # before `adapt` changes its variables in place
        num_classes, new_head = found.network.model.num_classes, False
        if class_names:
            renamed = found.class_names not in (None, tuple(class_names))
            new_head = renamed or len(class_names) != num_classes
            num_classes = len(class_names)
            unnamed = not new_head and found.class_names is None  # their order is unknown
            if unnamed and (warning := class_order_warning(class_names)):
                found.notes.append(warning)
        adapted = adapt(found, num_classes, image_size, in_channels=3, new_head=new_head)
        description = f"the {self.config.model.name} that the config describes"
        check_same(found.path, adapted, model.clone(num_classes=num_classes), description)
        found.log_notes(summary)
        return found.variables, found

    def _preprocessing_warnings(self, found: LoadedWeights, *, crop: bool) -> list[str]:
        """Returns warnings where the config's preprocessing differs from that of the weights."""
        wanted = {f"data.{key}": given for key, given in self.data.normalization.items()}
        if crop:
            wanted["data.crop_fraction"] = self.config.data.crop_fraction
        stored = {key: found.preprocessing[key.removeprefix("data.")] for key in wanted}
        return [
            f"warning: made with {key}={stored[key]}, used with {given}"
            for key, given in wanted.items()
            if stored[key] != given
        ]

    # ---------------------------------------------------------------------------- state and steps

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh of `devices`. Every device gets equally many rows of a batch."""
        axes = {axis: self.config.mesh[axis] for axis in sharding.AXES}
        mesh = sharding.make_mesh(self._devices, **axes)
        accumulate = self.config.accumulate
        key = "batch_size" if accumulate == 1 else "batch_size / accumulate"
        sharding.check_batch_size(key, self.config.batch_size // accumulate, mesh)
        sharding.check_batch_size("eval.batch_size", self.config.eval.batch_size, mesh)
        return mesh

    def _host_rows(self) -> tuple[int, int]:
        """Returns which rows of a batch this process reads: an index, and the number of parts.

        Processes that read the same rows have the same index: see `sharding.host_rows`.
        """
        return sharding.host_rows(self.mesh) if jax.process_count() > 1 else (0, 1)

    @functools.cached_property
    def optimizer(self) -> Optimizer:
        options = dict(self.config.optimizer.items())
        schedule_options = {key: options.pop(key) for key in optimizers.SCHEDULE_KEYS}
        schedule = optimizers.make_schedule(
            self.config.epochs, self.steps_per_epoch, **schedule_options
        )
        return optimizers.make_optimizer(schedule, **options)

    def split_seed(self) -> Keys:
        """Returns the random keys of the run; not jitted."""
        return Keys(*jax.random.split(jax.random.key(self.config.seed)))

    @functools.cached_property
    def keys(self) -> Keys:
        """The random keys of the run, replicated over the mesh."""
        return jax.jit(self.split_seed, out_shardings=sharding.replicated(self.mesh))()

    def init_state(self, key: jax.Array) -> TrainState:
        """Returns the state of step 0 with new weights; to jit or to `jax.eval_shape`."""
        return TrainState.create(self.init_variables(key), self.optimizer.tx)

    @functools.cached_property
    def state_shapes(self) -> TrainState:
        """Shapes and dtypes of the state, as `jax.ShapeDtypeStruct`s."""
        return jax.eval_shape(self.init_state, jax.random.key(0))

    @property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, as `jax.ShapeDtypeStruct`s."""
        shardings = sharding.shardings(self.state_shapes, self.mesh)
        return jax.tree.map(lambda x, s: x.update(sharding=s), self.state_shapes, shardings)

    def new_state(self) -> TrainState:
        """Returns the sharded state of step 0, with new weights or those of `init_from`."""
        shardings = sharding.shardings(self.state_shapes, self.mesh)
        if not self.config.init_from:
            return jax.jit(self.init_state, out_shardings=shardings)(self.keys.init)
        variables, _ = self.load_variables(self.config.init_from, self.data.class_names)
        variables = sharding.put_global(variables, self.mesh)
        create = lambda variables: TrainState.create(variables, self.optimizer.tx)
        return jax.jit(create, out_shardings=shardings)(variables)

    @property
    def info(self) -> dict[str, Any]:
        """The config and the class names, as every checkpoint and weights file stores them."""
        return {"config": config_to_json(self.config), "class_names": list(self.data.class_names)}

    def open_checkpoints(self, workdir: pathlib.Path) -> Checkpoints:
        """Opens the checkpoints in `workdir`, after a check of the free disk space."""
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.state_shapes))
        processes.run_on_main("space", lambda: check_space(workdir, size))
        keep = self.config.checkpoint.keep
        with explain_write_errors(workdir):
            return Checkpoints(workdir / "checkpoints", keep=keep, info=self.info)

    def eval_variables(self, state: TrainState) -> step.Variables:
        """Returns the variables of `state` that are evaluated, see `eval.weights`."""
        return state.ema if self.config.eval.weights == "ema" else state.variables

    def make_augment(self, num_classes: int) -> step.AugmentFn:
        """Returns `augment(batch, mix_key, erase_key, step)`; see `step.make_augment`."""
        options, randaugment = self.config.augment, None
        if options.randaugment_on == "device" and self.data.randaugment:
            randaugment = functools.partial(
                device_randaugment.randaugment, policy=self.data.randaugment
            )
        mix_steps = None
        if options.mix_off_epochs:
            mix_steps = max(self.total_steps - options.mix_off_epochs * self.steps_per_epoch, 0)
        return step.make_augment(
            num_classes,
            label_smoothing=options.label_smoothing,
            randaugment=randaugment,
            mix_steps=mix_steps,
            **mixup.functions(options),
            **self.data.normalization,
        )

    @functools.cached_property
    def loss_fn(self) -> losses.LossFn:
        """The loss of logits and targets, see `losses.make_loss_fn`."""
        options = dict(**self.config.loss)
        weights = options.pop("class_weights") or None
        if weights:
            if self._has_data:
                weights = losses.read_class_weights(weights, self.data.train_source)
            else:  # no data: weights of the same shape
                weights = np.ones(self._num_classes)
        loss_fn = losses.make_loss_fn(**options, class_weights=weights)
        if self.teacher is None:
            return loss_fn
        keys = ("kind", "temperature", "weight")
        options = {key: self.config.distill[key] for key in keys}
        return distillation.make_distillation_loss(loss_fn, **options)

    @functools.cached_property
    def teacher(self) -> distillation.Teacher | None:
        """The teacher of `distill.teacher`, for the classes of the training data."""
        path = self.config.distill.teacher
        if not path:
            return None
        if is_logits_file(path):
            return distillation.STORED
        return distillation.load_teacher(
            path,
            self.data.class_names if self._has_data else self._num_classes,
            image_size=self.data.image_size,
            dtype=self.config.model.dtype,
            **self.data.normalization,
        )

    @functools.cached_property
    def teacher_variables(self) -> tuple[step.Variables, ...]:
        """The further arguments of `train_step`: with a teacher its variables, sharded; else ()."""
        if self.teacher is None:
            return ()
        return (sharding.put_global(self.teacher.variables, self.mesh),)

    def make_train_step(self, accumulate: int | None = None) -> Callable:
        """Returns `train_step(state, batch, key, *teacher_variables)`; see `step.make_train_step`.

        `accumulate` is by default that of the config.
        """
        augment = self.make_augment(self.model.num_classes)
        if self.teacher:
            augment = distillation.add_teacher(augment, self.teacher)
        return step.make_train_step(
            self.model,
            self.optimizer,
            augment,
            ema_decay=self.config.ema.decay,
            loss_fn=self.loss_fn,
            ema_warmup=self.config.ema.warmup,
            accumulate=accumulate or self.config.accumulate,
            gradient_dtype=self.config.mesh.gradient_dtype,
        )

    def make_eval_step(self, model: Network, **options: Any) -> Callable:
        """Returns `eval_step(variables, batch)`; see `step.make_eval_step`."""
        return step.make_eval_step(model, **options, **self.data.normalization)

    def make_predict_step(self, model: Network) -> Callable:
        """Returns `predict_step(variables, images)`; see `step.make_predict_step`."""
        return step.make_predict_step(model, **self.data.normalization)

    def jit_train_step(self, accumulate: int | None = None) -> Callable:
        """Returns the function of `make_train_step`, jitted for `mesh`; it donates the state."""
        state, _, _, *teacher = self.step_shapes
        train_step, deterministic = self.make_train_step(accumulate), self.config.deterministic
        return sharding.jit_train_step(
            train_step, self.mesh, state, *teacher, deterministic=deterministic
        )

    @functools.cached_property
    def train_step(self) -> Callable:
        """The function of `jit_train_step`, for the config."""
        return self.jit_train_step()

    @functools.cached_property
    def eval_step(self) -> Callable:
        """The function of `make_eval_step` for `model`, jitted for `mesh`."""
        multi_label = self._has_data and self.data.is_multi_label(self.data.eval_source)
        eval_step = self.make_eval_step(self.model, multi_label=multi_label)
        return sharding.jit_eval_step(eval_step, self.mesh, self.config.deterministic)

    @property
    def step_shapes(self) -> tuple[Any, ...]:
        """Shapes of the arguments of `train_step`, for images of one class each."""
        rows = self.config.batch_size
        pixels = jax.ShapeDtypeStruct((rows, *self.data.image_size, 3), jnp.uint8)
        labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
        key = jax.eval_shape(self.split_seed).steps
        batch = {"image": pixels, "label": labels}
        if self.teacher is distillation.STORED:
            logits = jax.ShapeDtypeStruct((rows, self.model.num_classes), jnp.float32)
            batch["teacher_logits"] = logits
        teacher = [jax.eval_shape(lambda: self.teacher.variables)] if self.teacher else []
        return self.state_shapes, batch, key, *teacher
