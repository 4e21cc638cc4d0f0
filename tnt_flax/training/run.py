# SPDX-License-Identifier: Apache-2.0
"""One training run in its workdir: opening it, saving, evaluation, logs and final files."""

import contextlib
import functools
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from tnt_flax.core.errors import InputError, RunError
from tnt_flax.core.trees import fingerprint, named_leaves
from tnt_flax.data.sources.storage import StorageUnavailable
from tnt_flax.runtime import processes, sharding
from tnt_flax.runtime.checkpoints import Checkpoints
from tnt_flax.runtime.watchdog import Watchdog
from tnt_flax.runtime.workdir import (
    config_to_json,
    current_environment,
    open_workdir,
    record_environment,
)
from tnt_flax.training import plots
from tnt_flax.training.evaluate import evaluate
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.metrics import (
    MetricWriter,
    NullWriter,
    Progress,
    StepMeter,
    read_metrics_file,
)
from tnt_flax.training.step import TrainState
from tnt_flax.weights import write
from tnt_flax.weights.names import join_collections

logger = logging.getLogger(__name__)

Metrics = dict[str, float]


@contextlib.contextmanager
def open_run(workdir: pathlib.Path, experiment: Experiment) -> Iterator[Watchdog]:
    """Opens `workdir` on all processes of a run; yields the watchdog of the run.

    Process 0 locks the workdir. All processes must see it, and agree on program and config.

    Raises:
        InputError: the workdir cannot be used, or processes differ. On every process alike.
        RunError: a process does not respond.
    """
    config = config_to_json(experiment.config)
    with experiment.watchdog() as watchdog, contextlib.ExitStack() as stack:
        lock = open_workdir(workdir, config)
        processes.run_on_main("workdir", lambda: stack.enter_context(lock))
        processes.check_same_program()
        processes.check_same_on_all_processes("config", config)
        processes.check_shared_workdir(workdir)
        yield watchdog


def log_start(experiment: Experiment, workdir: pathlib.Path, start_step: int) -> None:
    """Logs data, devices and steps; writes environment.json and parameters.txt."""
    environment = current_environment()  # a collective: on all processes
    if processes.is_main_process():
        record_environment(workdir, start_step, environment)
        params = experiment.state_shapes.params
        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        (workdir / "parameters.txt").write_text(table + "\n")
        logger.info(
            f"{experiment.name}: {len(experiment.train_source)} training and "
            f"{len(experiment.eval_source)} evaluation images, "
            f"{len(experiment.class_names)} classes, {sharding.describe(experiment.mesh)}, "
            f"{experiment.steps_per_epoch} steps per epoch; from step {start_step} to "
            f"{experiment.total_steps}; logs and checkpoints in {workdir}"
        )


class Run:
    """Data, metrics, checkpoints and watchdog of a training loop.

    A context manager around the loop: at its end, the save in flight is committed and all files are
    closed.
    """

    def __init__(
        self,
        experiment: Experiment,
        workdir: pathlib.Path,
        watchdog: Watchdog,
        checkpoints: Checkpoints,
        start_step: int,
    ):
        self.experiment, self.workdir = experiment, workdir
        self.watchdog, self.checkpoints = watchdog, checkpoints
        self.is_main_process = processes.is_main_process()
        total = experiment.total_steps
        self.writer = MetricWriter(workdir, start_step) if self.is_main_process else NullWriter()
        self.progress = Progress(start_step, total) if self.is_main_process else NullWriter()
        names = list(named_leaves(experiment.state_shapes.variables))
        check = functools.partial(check_finite, names=names, checkpoints=checkpoints)
        batch_size, steps_per_epoch = experiment.plan.batch_size, experiment.steps_per_epoch
        self.meter = StepMeter(batch_size, steps_per_epoch, total, check)
        self.batches = experiment.train_batches(start_step, total - start_step)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            self.watchdog.abort(error)  # first: closing checkpoints waits for the other processes
        with contextlib.ExitStack() as stack:  # closes all, in reverse order
            stack.callback(self.writer.close)
            stack.callback(self.checkpoints.close)  # commits the save in flight
            stack.callback(self.progress.close)
            stack.callback(self.batches.close)

    def evaluate(self, state: TrainState, step: int) -> Metrics:
        """Evaluates and logs the state after `step` updates.

        Returns an empty dictionary if a signal stops the run before all images are evaluated.
        """
        experiment = self.experiment
        metrics, _ = evaluate(
            experiment.eval_step,
            experiment.eval_variables(state),
            experiment.eval_batches(),
            experiment.mesh,
            self.watchdog.progress,
        )
        if self.watchdog.stopping:  # the next start repeats this evaluation
            return {}
        self.writer.write(step, {f"eval/{name}": value for name, value in metrics.items()})
        self.progress.log(
            f"step {step}: {experiment.eval_weights} weights on {metrics['images']} images: "
            f"top-1 {metrics['top1']:.2%}  top-5 {metrics['top5']:.2%}  loss {metrics['loss']:.4f}"
        )
        return metrics

    def log_metrics(self, step: int) -> None:
        """Logs the averages of the steps since the last call, after `step` updates."""
        self.meter.fetch_pending_metrics()
        self.meter.replaced = processes.sum_over_processes(self.meter.replaced)
        values = self.meter.report(step)
        values["checkpoint/failed"] = self.checkpoints.failed_saves
        self.writer.write(step, values)
        self.progress.report(step, values)

    def save_now(self, state: TrainState, step: int) -> None:
        """Saves the state after `step` updates, unless it is saved; returns when it is safe."""
        self.meter.fetch_pending_metrics()  # a NaN must not reach a checkpoint
        if step:  # the state of step 0 comes from the seed
            self.checkpoints.save_blocking(state, step)

    @contextlib.contextmanager
    def save_on_data_error(self, state: TrainState, step: int) -> Iterator[None]:
        """Saves the state after `step` updates before an error of the data ends the run."""
        try:
            yield
        except (InputError, StorageUnavailable) as error:
            self.watchdog.abort(error)
            self.save_now(state, step)
            raise

    def write_final_artifacts(self, state: TrainState) -> str:
        """Writes weights and plots of a finished run; returns the fingerprint of its parameters."""
        experiment, workdir = self.experiment, self.workdir
        digest = fingerprint(join_collections(state.variables), sharding.fetch)
        self.writer.write(experiment.total_steps, {"fingerprint": digest})
        ema = sharding.fetch_on_main(state.ema)  # a collective: on all processes
        evaluated = ema
        if experiment.eval_variables(state) is not state.ema:
            evaluated = sharding.fetch_on_main(state.variables)
        if self.is_main_process:
            logger.info("SHA-256 of the final parameters: %s", digest)
            path = workdir / "weights.safetensors"
            write.save_weights(path, join_collections(ema), self.checkpoints.info)
            plots.plot_curves(read_metrics_file(self.writer.path), workdir / "curves.png")
            plot_first_predictions(experiment, evaluated, workdir / "predictions.png")
        return digest


def plot_first_predictions(experiment: Experiment, variables: Any, path: pathlib.Path) -> None:
    """Plots predictions for the first evaluation batch, computed on one device."""
    with contextlib.closing(experiment.eval_batches()) as batches:
        batch = next(batches)
    predict_step = jax.jit(experiment.make_predict_step(experiment.model))
    probabilities = jax.device_get(predict_step(*jax.device_put((variables, batch["image"]))))
    images, labels, mask = batch["image"], batch["label"], batch["mask"]
    plots.plot_predictions(
        images[mask], labels[mask], probabilities[mask], experiment.class_names, path
    )


def check_finite(
    step: int, metrics: dict[str, Any], *, names: Sequence[str], checkpoints: Checkpoints
) -> None:
    """Stops the run if the loss or a gradient of `step` is NaN or infinite.

    `names` are those of all variables, "params/head/bias", in the order of `metrics["finite"]`.

    Raises:
        RunError: with the step, the learning rate and the first tensor with a NaN or infinity, once
            the save in flight is committed.
    """
    if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
        return
    checkpoints.wait_for_save()

    def labels(params: str, statistics: str) -> list[str]:
        kinds = {"params": params, "batch_stats": statistics}
        return [f"{kinds[c]} {name}" for c, _, name in (n.partition("/") for n in names)]

    computed, variables = np.split(metrics["finite"], 2)
    tensors = labels("parameter", "statistics") + labels("gradient of", "new statistics")
    finite = [*variables, *computed]
    bad = [tensor for tensor, ok in zip(tensors, finite, strict=True) if not ok]
    if not bad:
        overflow = np.isfinite(metrics["loss"])  # of the sum of squared gradients
        bad = ["the gradient norm (overflow)" if overflow else "the loss itself"]
    raise RunError(
        f"the loss of step {step} is {metrics['loss']} at learning rate "
        f"{metrics['learning_rate']:.3g}; first bad tensor: {bad[0]}; "
        f"the last good checkpoint is step {checkpoints.latest_step()}"
    )
