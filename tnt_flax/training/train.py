# SPDX-License-Identifier: Apache-2.0
"""The training run: set-up from top to bottom, then one loop."""

import contextlib
import functools
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError, RunError, Stopped
from tnt_flax.core.trees import fingerprint, flat_names, split
from tnt_flax.data.sources import check_same_classes
from tnt_flax.data.sources.outage import Outage
from tnt_flax.runtime import agreement, environment, processes, sharding
from tnt_flax.runtime.checkpoints import Checkpoints, abstract
from tnt_flax.runtime.watchdog import Guard
from tnt_flax.runtime.workdir import as_json, check_space, open_workdir
from tnt_flax.training import config_check, experiment, plots
from tnt_flax.training.evaluate import evaluate
from tnt_flax.training.metrics import MetricWriter, Progress, Silence, StepMeter, read_metrics_file
from tnt_flax.training.model_config import with_network
from tnt_flax.training.step import TrainState
from tnt_flax.weights import weights_file


def train_and_evaluate(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains what `config` describes in `workdir`, from where an earlier run there stopped.

    Returns the last evaluation (top1, top5, loss, images), the step, and the SHA-256 fingerprint of
    the final parameters.

    Raises:
        InputError: something in the config, the data or the workdir is wrong.
        RunError: the loss became NaN or infinite, checkpoints could not be saved, or the data went
            away.
        Stopped: a notice came (SIGTERM, Ctrl-C); the state is saved.
    """
    config = with_network(config)
    config_check.check(config)
    experiment.build_train_transform(config)  # not after the workdir has got this config
    with Guard(config.stall_minutes) as guard, contextlib.ExitStack() as stack:
        enter = lambda: stack.enter_context(open_workdir(workdir, as_json(config)))
        processes.on_main("workdir", enter)
        agreement.agree_on_program()
        agreement.agree("config", as_json(config))
        agreement.check_shared(workdir)
        return _train(config, workdir, guard)


def due(step: int, every: int, total: int) -> bool:
    """Is it time, with `step` updates done? Every `every` steps, and after the last one."""
    return step % every == 0 or step == total


def _train(config: ConfigDict, workdir: pathlib.Path, guard: Guard) -> dict[str, Any]:
    # ---------------------------------------------------------------- mesh
    mesh = experiment.build_mesh(config)
    replicated = sharding.replicated(mesh)
    main = processes.is_main()  # writes what is written once

    # ---------------------------------------------------------------- data
    train_source = experiment.open_source(config, config.data.train_split)
    eval_source = experiment.open_source(config, config.data.eval_split)
    check_same_classes(train_source, eval_source)
    class_names = train_source.class_names
    seen = {"train_images": len(train_source), "eval_images": len(eval_source)}
    # One host may have found its index of the images ready, another has to make it.
    agreement.agree("data", {**seen, "classes": dict(enumerate(class_names))}, timeout=3600)
    plan = experiment.build_plan(config, len(train_source))
    total_steps = plan.steps_per_epoch * (config.epochs + config.optimizer.cooldown_epochs)
    every = {
        group: experiment.in_steps(f"{group}.every", config[group].every, plan.steps_per_epoch)
        for group in ("eval", "checkpoint", "log")
    }

    guard.check("the open data set")

    # ---------------------------------------------------------------- model and optimizer
    model = experiment.build_model(config, len(class_names))
    tx, schedule = experiment.build_optimizer(config, plan.steps_per_epoch)
    init_params = experiment.init_params(model, config)
    make_keys = jax.jit(functools.partial(experiment.run_keys, config), out_shardings=replicated)
    init_key, step_key = make_keys()

    def new_state(params):
        return TrainState.create(params, tx)

    def init_state(key):
        return new_state(init_params(key))

    # ---------------------------------------------------------------- state, new or restored
    shapes = jax.eval_shape(init_state, init_key)
    shardings = sharding.shardings(shapes, mesh)
    layout = abstract(shapes, shardings)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    processes.on_main("space", lambda: check_space(workdir, size))
    info = {"config": as_json(config), "class_names": list(class_names)}
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep, info=info)
    state = checkpoints.restore_latest(layout)
    if state is None:
        if config.init_from:
            params, _ = experiment.load_params(config, model, config.init_from, tuple(class_names))
            params = sharding.place(params, shardings.params)
            state = jax.jit(new_state, out_shardings=shardings)(params)
        else:
            state = jax.jit(init_state, out_shardings=shardings)(init_key)
        if main:
            params = split(shapes.params)["params"]
            table = parameter_overview.get_parameter_overview(params, include_stats=False)
            (workdir / "parameters.txt").write_text(table + "\n")
    names = list(flat_names(state.params))
    start_step = int(state.step)
    computes_on = environment.describe()
    if main:
        environment.record(workdir, start_step, computes_on)
        print(
            f"{config.model.name}: {len(train_source)} training and {len(eval_source)} evaluation "
            f"images, {len(class_names)} classes, {sharding.describe(mesh)}, "
            f"{plan.steps_per_epoch} steps per epoch; from step {start_step} to {total_steps}; "
            f"logs and checkpoints in {workdir}",
            file=sys.stderr,
        )

    guard.check("the state to begin with")

    # ---------------------------------------------------------------- compiled steps
    train_step = experiment.build_train_step(config, model, tx, schedule)
    train_step = sharding.jit_train_step(train_step, mesh, shapes)
    eval_step = sharding.jit_eval_step(experiment.build_eval_step(config, model), mesh)

    # ---------------------------------------------------------------- loop
    writer = MetricWriter(workdir, start_step) if main else Silence()
    progress = Progress(start_step, total_steps) if main else Silence()
    meter = StepMeter(config.batch_size, plan.steps_per_epoch, total_steps)
    pending = None  # (step, metrics) of the step that the device may still be working on

    def settle():
        """Takes in the metrics of the pending step; returns when the device has finished it."""
        nonlocal pending
        if pending is not None:
            step, metrics = pending
            pending = None
            metrics = jax.device_get(metrics)
            check_finite(step, metrics, names, checkpoints)
            meter.add(metrics)

    def evaluated_params():
        return state.ema if config.eval.weights == "ema" else state.params

    def run_evaluation(step):
        batches = experiment.eval_batches(config, eval_source)
        metrics = evaluate(eval_step, evaluated_params(), batches, mesh, guard.reached)
        if guard.stopping:  # not all images were seen; the next start makes up for it
            return {}
        writer.write(step, {f"eval/{name}": value for name, value in metrics.items()})
        progress.say(
            f"step {step}: {config.eval.weights} weights on {metrics['images']} images: "
            f"top-1 {metrics['top1']:.2%}  top-5 {metrics['top5']:.2%}  loss {metrics['loss']:.4f}"
        )
        return metrics

    def keep(step):
        """Returns when the state after `step` updates is safe."""
        settle()  # a NaN must not reach a checkpoint
        if step:  # the state before the first one comes from the seed
            checkpoints.ensure(state, step)

    @contextlib.contextmanager
    def needing_data(step):
        """Data that cannot be read ends the run, but does not cost the steps before."""
        try:
            yield
        except (InputError, Outage) as error:
            guard.failed(error)
            keep(step)
            raise

    batches = experiment.train_batches(
        config, train_source, plan, start_step, total_steps - start_step
    )
    try:
        last_eval = {}
        interrupted = start_step and due(start_step, every["eval"], total_steps)
        if interrupted and not checkpoints.metrics(start_step):
            last_eval = run_evaluation(start_step)
            if last_eval:
                checkpoints.add_metrics(start_step, last_eval)
        for step in range(start_step, total_steps):  # `step` updates have been applied so far
            asked = time.perf_counter()
            with needing_data(step):
                batch = guard.wait(batches)
            if batch is None:
                keep(step)
                raise Stopped(f"step {step} is saved; the same command goes on from there")
            meter.waited += time.perf_counter() - asked
            meter.replaced += int(batch.pop("replaced").sum())

            state, metrics = train_step(state, sharding.to_global(batch, mesh), step_key)
            settle()  # the step before: its metrics are ready while the device works on this one
            pending = (step, metrics)
            progress.advance()

            done = step + 1
            stopping = guard.reached(f"step {done} of {total_steps}")
            if due(done, every["log"], total_steps):
                settle()
                meter.replaced = processes.total(meter.replaced)
                values = meter.report(done) | {"checkpoint/failed": checkpoints.failed_saves}
                writer.write(done, values)
                progress.report(done, values)
            evaluating = due(done, every["eval"], total_steps) and not stopping
            if evaluating or due(done, every["checkpoint"], total_steps):
                settle()  # a NaN must not reach a checkpoint
                with meter.pause():
                    with needing_data(done):
                        last_eval = run_evaluation(done) if evaluating else {}
                    checkpoints.save(state, done, last_eval or None)
        checkpoints.ensure(state, total_steps, last_eval or None)
        if not last_eval and not guard.stopping:  # nothing was left to do
            last_eval = run_evaluation(total_steps)
        if guard.stopping:
            raise Stopped("every step is saved; the same command evaluates and finishes")

        # ------------------------------------------------------------ what a run leaves behind
        digest = fingerprint(state.params, sharding.fetch)
        writer.write(total_steps, {"fingerprint": digest})
        average = sharding.fetch_on_main(state.ema)
        evaluated = (
            average if config.eval.weights == "ema" else sharding.fetch_on_main(state.params)
        )
        if main:
            print(f"SHA-256 of the final parameters: {digest}", file=sys.stderr)
            weights_file.save_weights(workdir / "weights.safetensors", average, info)
            plots.plot_curves(read_metrics_file(writer.path), workdir / "curves.png")
            with contextlib.closing(experiment.eval_batches(config, eval_source)) as eval_batches:
                batch = next(eval_batches)
            predict_step = jax.jit(experiment.build_predict_step(config, model))
            probabilities = jax.device_get(
                predict_step(*jax.device_put((evaluated, batch["image"])))
            )
            images, labels, mask = batch["image"], batch["label"], batch["mask"]
            plots.plot_predictions(
                images[mask],
                labels[mask],
                probabilities[mask],
                class_names,
                workdir / "predictions.png",
            )
        # Who leaves much earlier than the others would count as dead.
        processes.exchange("end", "", 3600)
        return {**last_eval, "step": total_steps, "fingerprint": digest}
    except BaseException as error:
        guard.failed(error)  # what follows would wait for the other processes
        raise
    finally:
        batches.close()
        progress.close()
        checkpoints.close()  # whatever stopped the loop, what was being saved gets committed
        writer.close()


def check_finite(
    step: int, metrics: dict[str, Any], names: list[str], checkpoints: Checkpoints
) -> None:
    """Stops the run if the loss or a gradient of `step` is NaN or infinite.

    `names` are those of the parameters, in the order of `metrics["finite"]`.

    Raises:
        RunError: with the step, the learning rate and the first tensor that went bad, once the
            checkpoint that was being written is safe.
    """
    if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
        return
    checkpoints.wait()
    gradients, parameters = np.split(metrics["finite"], 2)
    bad = [f"parameter {name}" for name, ok in zip(names, parameters, strict=True) if not ok]
    bad += [f"gradient of {name}" for name, ok in zip(names, gradients, strict=True) if not ok]
    raise RunError(
        f"the loss of step {step} is {metrics['loss']} at learning rate "
        f"{metrics['learning_rate']:.3g}; first bad tensor: {(bad or ['the loss itself'])[0]}; "
        f"the last good checkpoint is step {checkpoints.latest_step()}"
    )
