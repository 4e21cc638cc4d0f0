# SPDX-License-Identifier: Apache-2.0
"""Trains a network: set-up from top to bottom, then one loop."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from tnt_flax.core.errors import Stopped
from tnt_flax.data.sources import check_same_classes
from tnt_flax.runtime import processes
from tnt_flax.runtime.checkpoints import abstract_state
from tnt_flax.runtime.sharding import to_global
from tnt_flax.runtime.watchdog import Watchdog
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.run import Run, log_start, open_run
from tnt_flax.training.step import TrainState

ONE_HOUR = 3600  # seconds


def train_and_evaluate(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains and evaluates what `config` describes; resumes an earlier run in `workdir`.

    Returns:
        The last evaluation (top1, top5, loss, images, skipped), the step, and the SHA-256
        fingerprint of the final parameters.

    Raises:
        InputError: the config, the data or the workdir is wrong.
        RunError: the loss became NaN or infinite, checkpoints could not be saved, or the data
            became unavailable.
        Stopped: a signal came (SIGTERM, Ctrl-C); the state is saved.
    """
    experiment = Experiment(config)
    experiment.check_training()
    with open_run(workdir, experiment) as watchdog:
        return _train(experiment, workdir, watchdog)


def due(step: int, every: int, total: int) -> bool:
    """Returns True every `every` steps and at the last step."""
    return step % every == 0 or step == total


def _train(experiment: Experiment, workdir: pathlib.Path, watchdog: Watchdog) -> dict[str, Any]:
    # ---------------------------------------------------------------- data
    check_same_classes(experiment.train_source, experiment.eval_source)
    data = {
        "train_images": len(experiment.train_source),
        "eval_images": len(experiment.eval_source),
        "classes": dict(enumerate(experiment.class_names)),
    }
    # One host may have an index of the images ready while another has to build it.
    processes.check_same_on_all_processes("data", data, timeout=ONE_HOUR)
    total_steps = experiment.total_steps
    every = {group: experiment.interval(group) for group in ("eval", "checkpoint", "log")}
    watchdog.progress("data opened", setup=True)
    watchdog.raise_if_stopping()

    # ---------------------------------------------------------------- state, new or restored
    checkpoints = experiment.open_checkpoints(workdir)
    layout = abstract_state(experiment.state_shapes, experiment.state_shardings)
    state = checkpoints.restore_latest(layout)
    if state is None:
        state = experiment.initial_state()
    log_start(experiment, workdir, int(state.step))
    watchdog.progress("state ready", setup=True)
    watchdog.raise_if_stopping()

    # ---------------------------------------------------------------- loop
    with Run(experiment, workdir, watchdog, checkpoints, int(state.step)) as run:
        state, last_eval = _loop(run, state, every)
        checkpoints.save_blocking(state, total_steps, last_eval or None)
        if not last_eval and not watchdog.stopping:  # the run was complete already
            last_eval = run.evaluate(state, total_steps)
        if watchdog.stopping:
            raise Stopped("every step is saved; the same command evaluates and finishes")

        # ------------------------------------------------------------ final artifacts
        digest = run.write_final_artifacts(state)
        # A process that exits much earlier than the others would count as dead.
        processes.barrier("end", ONE_HOUR)
        return {**last_eval, "step": total_steps, "fingerprint": digest}


def _loop(
    run: Run, state: TrainState, every: dict[str, int]
) -> tuple[TrainState, dict[str, float]]:
    """Runs all steps from `state` on; returns the final state and the last evaluation."""
    experiment, watchdog, checkpoints = run.experiment, run.watchdog, run.checkpoints
    train_step, mesh, (_, step_key) = experiment.train_step, experiment.mesh, experiment.keys
    start_step, total_steps = int(state.step), experiment.total_steps

    last_eval = {}
    missed_evaluation = start_step > 0 and due(start_step, every["eval"], total_steps)
    if missed_evaluation and not checkpoints.metrics(start_step):
        last_eval = run.evaluate(state, start_step)
        if last_eval:
            checkpoints.add_metrics(start_step, last_eval)

    for step in range(start_step, total_steps):  # `step` updates have been applied so far
        with run.meter.wait_for_data(), run.save_on_data_error(state, step):
            batch = watchdog.next_batch(run.batches)
        if batch is None:
            run.save_now(state, step)
            raise Stopped(f"step {step} is saved; the same command resumes from there")
        run.meter.replaced += int(batch.pop("replaced").sum())

        state, metrics = train_step(state, to_global(batch, mesh), step_key)
        run.meter.add(step, metrics)  # fetches the previous step's: the device never waits
        run.progress.advance()

        done = step + 1
        stopping = watchdog.progress(f"step {done} of {total_steps}")
        if due(done, every["log"], total_steps):
            run.log_metrics(done)
        evaluating = due(done, every["eval"], total_steps) and not stopping
        if evaluating or due(done, every["checkpoint"], total_steps):
            run.meter.fetch_pending_metrics()  # a NaN must not reach a checkpoint
            with run.meter.pause():
                with run.save_on_data_error(state, done):
                    last_eval = run.evaluate(state, done) if evaluating else {}
                checkpoints.save_async(state, done, last_eval or None)
    return state, last_eval
