# SPDX-License-Identifier: Apache-2.0
"""What a training run does besides its steps: checks, logs, evaluations and final files."""

import contextlib
import functools
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError, RunError
from tnt_flax.core.trees import fingerprint, named_leaves
from tnt_flax.runtime import host, processes, sharding
from tnt_flax.runtime.checkpoints import Checkpoints, score
from tnt_flax.runtime.watchdog import Watchdog
from tnt_flax.runtime.workdir import (
    config_to_json,
    current_environment,
    explain_write_errors,
    open_workdir,
    record_environment,
)
from tnt_flax.training import plots
from tnt_flax.training.evaluate import evaluate
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.metrics import MetricWriter, read_metrics_file
from tnt_flax.training.step import TrainState
from tnt_flax.training.trackers import open_trackers
from tnt_flax.weights import write
from tnt_flax.weights.names import join_collections

ONE_HOUR = 3600  # seconds

logger = logging.getLogger(__name__)


def log(text: str) -> None:
    """Logs a line, in process 0 only."""
    if processes.is_main_process():
        logger.info(text)


@contextlib.contextmanager
def open_run(
    workdir: pathlib.Path, experiment: Experiment, owns_process: bool
) -> Iterator[Watchdog]:
    """Opens `workdir` on all processes of a run; yields the watchdog of the run.

    Process 0 locks the workdir. All processes must see it, and agree on program and config.

    Raises:
        InputError: on every process: the workdir cannot be used, or processes differ.
        RunError: a process does not respond.
    """
    config = config_to_json(experiment.config)
    stall_minutes = experiment.config.stall_minutes
    watchdog = Watchdog(stall_minutes, owns_process=owns_process)
    with watchdog, contextlib.ExitStack() as stack:
        lock = open_workdir(workdir, config)
        processes.run_on_main("workdir", lambda: stack.enter_context(lock))
        processes.check_same_program()
        processes.check_same_on_all_processes("config", config)
        with explain_write_errors(workdir, InputError):
            processes.check_shared_workdir(workdir)
        if experiment.config.deterministic:
            stack.enter_context(host.keep_compilations(workdir / "compiled"))
        yield watchdog


def check_data(experiment: Experiment) -> None:
    """Opens the data of both splits; checks that all hosts have the same.

    Raises:
        InputError: they differ, or the data, their class weights or the teacher cannot be read.
    """
    _ = experiment.loss_fn, experiment.data.columns
    multi_label = experiment.data.is_multi_label(experiment.data.eval_source)
    best = experiment.config.checkpoint.best
    if best == ("mean_per_class" if multi_label else "mean_average_precision"):
        kind = "multi-label" if multi_label else "single-label"
        raise InputError(f"checkpoint.best={best!r} is no metric of {kind} data: use another")
    data = {
        "train_images": len(experiment.data.train_source),
        "eval_images": len(experiment.data.eval_source),
        "classes": dict(enumerate(experiment.data.class_names)),
    }
    # One host may have an index of the images ready while another has to build it.
    processes.check_same_on_all_processes("data", data, timeout=ONE_HOUR)


def log_start(experiment: Experiment, workdir: pathlib.Path, start_step: int) -> None:
    """Logs data, devices and steps; writes environment.json and parameters.txt."""
    host.warn_of_unused_gpu()
    environment = current_environment()  # a collective: on all processes
    environment["compiler_options"] = sharding.compiler_options(
        experiment.mesh, experiment.config.deterministic
    )
    if processes.is_main_process():
        params = experiment.state_shapes.params
        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        with explain_write_errors(workdir):
            record_environment(workdir, start_step, environment)
            (workdir / "parameters.txt").write_text(table + "\n")
    data = experiment.data
    log(
        f"{experiment.config.model.name}: {len(data.train_source)} training and "
        f"{len(data.eval_source)} evaluation images, {len(data.class_names)} classes, "
        f"{sharding.describe(experiment.mesh)}, {experiment.steps_per_epoch} steps per epoch; "
        f"from step {start_step} to {experiment.total_steps}; logs and checkpoints in {workdir}"
    )


def open_metrics(experiment: Experiment, workdir: pathlib.Path, start_step: int) -> MetricWriter:
    """Opens metrics.jsonl, TensorBoard's events and `log.trackers`."""
    options = experiment.config.log
    config = config_to_json(experiment.config)
    trackers = functools.partial(open_trackers, options.trackers, options.project, workdir, config)
    with explain_write_errors(workdir):
        return MetricWriter(workdir, start_step, trackers)


def evaluate_state(
    experiment: Experiment, writer: MetricWriter, watchdog: Watchdog, state: TrainState, step: int
) -> dict[str, float]:
    """Evaluates the state after `step` updates; logs and returns the metrics of `evaluate`.

    Raises:
        Stopped: a signal came before all images were evaluated.
    """
    variables, batches = experiment.eval_variables(state), experiment.data.eval_batches()
    metrics, _ = evaluate(
        experiment.eval_step, variables, batches, experiment.mesh, watchdog.progress
    )
    writer.write(step, {f"eval/{name}": value for name, value in metrics.items()})
    precision = metrics.get("mean_average_precision")
    log(
        f"step {step}: {experiment.config.eval.weights} weights on {metrics['images']} images: "
        f"top-1 {metrics['top1']:.2%}  top-5 {metrics['top5']:.2%}  loss {metrics['loss']:.4f}"
        + ("" if precision is None else f"  mAP {precision:.2%}")
    )
    return metrics


class EarlyStopping:
    """Ends a run after `eval.patience` evaluations without a better `checkpoint.best`.

    Depends on the evaluations in metrics.jsonl only, so a resumed run decides as an uninterrupted
    one would, and all processes decide alike.
    """

    def __init__(self, config: ConfigDict, metrics_file: pathlib.Path):
        self._patience, self._metric = config.eval.patience, config.checkpoint.best
        key = f"eval/{self._metric}"
        read = lambda: [(m["step"], m[key]) for m in read_metrics_file(metrics_file) if key in m]
        self._values = dict(processes.run_on_main("evaluations", read)) if self._patience else {}
        self._update()

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Adds the metrics of an evaluation; logs whether the run ends."""
        self._values[step] = metrics[self._metric]
        self._update()
        if self.ends_run:
            log(
                f"stopping after {self._patience} evaluations without a better {self._metric} than "
                f"{self._values[self._best_step]:.4f} of step {self._best_step} (eval.patience)"
            )

    def _update(self) -> None:
        """Finds the first of the best evaluations, and whether too many came after it."""
        rank = lambda step: (score({self._metric: self._values[step]}, self._metric), -step)
        self._best_step = max(self._values, key=rank, default=0)
        later = sum(step > self._best_step for step in self._values)
        self.ends_run = 0 < self._patience <= later


def write_final_artifacts(
    experiment: Experiment, state: TrainState, workdir: pathlib.Path, writer: MetricWriter
) -> str:
    """Writes weights and plots of a finished run; returns the fingerprint of its parameters."""
    digest = fingerprint(join_collections(state.variables), sharding.fetch)
    writer.write(int(state.step), {"fingerprint": digest})
    log(f"SHA-256 of the final parameters: {digest}")
    evaluated = experiment.eval_variables(state)
    ema, evaluated = jax.tree.map(sharding.fetch, (state.ema, evaluated))  # on all processes
    if processes.is_main_process():
        path = workdir / "weights.safetensors"
        with explain_write_errors(workdir):
            write.save_weights(path, join_collections(ema), experiment.info)
            plots.plot_curves(read_metrics_file(writer.path), workdir / "curves.png")
            plot_first_predictions(experiment, evaluated, workdir / "predictions.png")
    return digest


def plot_first_predictions(experiment: Experiment, variables: Any, path: pathlib.Path) -> None:
    """Plots predictions for the first evaluation batch, computed on one device."""
    with contextlib.closing(experiment.data.eval_batches()) as batches:
        batch = next(batches)
    predict_step = jax.jit(experiment.make_predict_step(experiment.model))
    probabilities = jax.device_get(predict_step(*jax.device_put((variables, batch["image"]))))
    images, labels, mask = batch["image"], batch["label"], batch["mask"]
    plots.plot_predictions(
        images[mask], labels[mask], probabilities[mask], experiment.data.class_names, path
    )


def check_finite(
    experiment: Experiment, checkpoints: Checkpoints, step: int, metrics: dict[str, Any]
) -> None:
    """Stops the run if the loss or a gradient of `step` is NaN or infinite.

    Raises:
        RunError: with the step, the learning rate and the first tensor with a NaN or infinity, once
            the save in flight is committed.
    """
    if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
        return
    checkpoints.wait_for_save()
    names = list(named_leaves(experiment.state_shapes.variables))  # "params/head/bias"
    computed = [f"{'gradient of' if n.startswith('params/') else 'new'} {n}" for n in names]
    computed_finite, variables_finite = np.split(metrics["finite"], 2)
    finite = zip([*names, *computed], [*variables_finite, *computed_finite], strict=True)
    bad = [tensor for tensor, ok in finite if not ok]
    # Finite gradients can have an infinite norm.
    bad.append("the gradient norm" if np.isfinite(metrics["loss"]) else "the loss itself")
    raise RunError(
        f"the loss of step {step} is {metrics['loss']} at learning rate "
        f"{metrics['learning_rate']:.3g}; first bad tensor: {bad[0]}; "
        f"the last good checkpoint is step {checkpoints.latest_step()}"
    )
