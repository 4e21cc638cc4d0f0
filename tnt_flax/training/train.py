# SPDX-License-Identifier: Apache-2.0
"""Trains a network: set-up from top to bottom, then one loop."""

import contextlib
import functools
import logging
import pathlib
from typing import Any

from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError, Stopped
from tnt_flax.data.sources.storage import StorageUnavailable
from tnt_flax.runtime import host, processes
from tnt_flax.runtime.checkpoints import Checkpoints
from tnt_flax.runtime.sharding import to_global
from tnt_flax.runtime.watchdog import Watchdog
from tnt_flax.training import memory, run
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.metrics import MetricWriter, StepMeter, format_averages
from tnt_flax.training.step import TrainState

logger = logging.getLogger(__name__)


@host.disable_x64()
def train_and_evaluate(
    config: ConfigDict, workdir: pathlib.Path, *, owns_process: bool = False
) -> dict[str, Any]:
    """Trains and evaluates what `config` describes; resumes an earlier run in `workdir`.

    Disables JAX's 64-bit types meanwhile; `model.dtype` decides the precision of activations.

    Args:
        config: see `configs/default.py`.
        workdir: folder of the run.
        owns_process: True lets `Watchdog` exit the process, as in a command. With False, a single
            process returns or raises instead; one of several processes may always exit.

    Returns:
        The metrics of the last evaluation (see `evaluate.evaluate`), the step, and the SHA-256
        fingerprint of the final parameters and statistics.

    Raises:
        InputError: the config, the data or the workdir is wrong.
        RunError: the loss became NaN or infinite, checkpoints could not be saved, the data became
            unavailable, or a device has too little memory.
        Stopped: a signal came (SIGTERM, Ctrl-C and the like); all steps made are saved.
    """
    with contextlib.ExitStack() as stack:
        experiment = Experiment(config)
        experiment.check_training()
        watchdog = stack.enter_context(run.open_run(workdir, experiment, owns_process))

        # ---------------------------------------------------------------- data
        run.check_data(experiment)
        watchdog.progress("data opened", setup=True)

        # ---------------------------------------------------------------- state, new or restored
        checkpoints = experiment.open_checkpoints(workdir)
        stack.callback(checkpoints.close)  # commits the save in flight
        # Runs before `checkpoints.close`, which would wait for the other processes: after an error,
        # `abort` ends all processes first.
        stack.push(lambda kind, error, trace: watchdog.abort(error))
        suggest = functools.partial(memory.suggest_accumulate, experiment)
        stack.enter_context(host.explain_device_errors(suggest))
        state = checkpoints.restore_latest(experiment.abstract_state)
        if state is None:
            state = experiment.new_state()
        start_step = int(state.step)
        run.log_start(experiment, workdir, start_step)
        for warning in experiment.training_warnings():
            run.log(f"warning: {warning}")
        watchdog.progress("state ready", setup=True)

        # ---------------------------------------------------------------- loop
        writer = run.open_metrics(experiment, workdir, start_step)
        stack.enter_context(contextlib.closing(writer))
        state, metrics = train_loop(experiment, state, checkpoints, writer, watchdog)

        # ---------------------------------------------------------------- final artifacts
        step = int(state.step)
        checkpoints.save_blocking(state, step, metrics)  # does nothing if the loop saved this step
        digest = run.write_final_artifacts(experiment, state, workdir, writer)
        # A process that exits much earlier than the others would count as dead.
        processes.barrier("end", run.ONE_HOUR)
        return {**metrics, "step": step, "fingerprint": digest}


def train_loop(
    experiment: Experiment,
    state: TrainState,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    watchdog: Watchdog,
) -> tuple[TrainState, dict[str, float]]:
    """Runs all steps from `state` on; returns the final state and the metrics of its evaluation.

    `eval.patience` may end the run earlier. On a signal, `watchdog` raises Stopped after a step or
    an evaluation batch; in a single process, also during the wait for data. The loop then saves the
    state. If the data fail, only a run of one process saves.
    """
    step, total_steps = int(state.step), experiment.total_steps  # step: updates applied so far
    step_args = (experiment.keys.steps, *experiment.teacher_variables)
    due = functools.partial(is_due, experiment)
    evaluate = functools.partial(run.evaluate_state, experiment, writer, watchdog)
    check = functools.partial(run.check_finite, experiment, checkpoints)
    batch_size = experiment.config.batch_size
    meter = StepMeter(batch_size, experiment.steps_per_epoch, total_steps, check)
    early = run.EarlyStopping(experiment.config, writer.path)
    batches = experiment.data.train_batches(step, total_steps - step)
    try:
        metrics = checkpoints.metrics(step)  # the result if no step is left
        # An earlier start stopped before or in this evaluation, or had another `eval.every`.
        if step and due("eval", step) and not metrics:
            metrics = evaluate(state, step)
            checkpoints.add_metrics(step, metrics)
            early.add(step, metrics)
        while step < total_steps and not early.ends_run:
            with meter.wait_for_data():
                batch = watchdog.next_batch(batches)
            meter.replaced_images += int(batch.pop("replaced").sum())
            batch = to_global(batch, experiment.mesh)
            state, step_metrics = experiment.train_step(state, batch, *step_args)
            step += 1
            meter.add(step, step_metrics)  # fetches those of step - 1: the device need not wait
            if due("log", step):
                averages = meter.averages(step)
                writer.write(step, averages | {"checkpoint/failed": checkpoints.failed_saves})
                run.log(format_averages(step, total_steps, averages))
            watchdog.progress(f"step {step} of {total_steps}")
            if due("eval", step) or due("checkpoint", step):
                meter.fetch_pending_metrics()  # `check` raises before a NaN is saved
                with meter.pause():
                    metrics = evaluate(state, step) if due("eval", step) else {}
                    checkpoints.save_async(state, step, metrics)
                if metrics:
                    early.add(step, metrics)
    except (Stopped, InputError, StorageUnavailable) as error:
        watchdog.abort(error)  # exits if there are several processes, except for Stopped
        meter.fetch_pending_metrics()  # raises RunError instead of saving a NaN
        if step:  # a new run recreates the state of step 0
            checkpoints.save_blocking(state, step)
        if isinstance(error, Stopped) and step:
            raise Stopped(f"step {step} is saved; the same command resumes from there") from None
        raise
    finally:
        batches.close()
    return state, metrics


def is_due(experiment: Experiment, group: str, step: int) -> bool:
    """Returns True at multiples of the interval of `group`, and at the last step."""
    return step % experiment.interval(group) == 0 or step == experiment.total_steps
