# SPDX-License-Identifier: Apache-2.0
"""The training run: set-up from top to bottom, then one loop."""

import contextlib
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from tnt_flax import build, figures, sharding, weights
from tnt_flax.checkpoint import Checkpoints, abstract
from tnt_flax.data.sources import check_same_classes
from tnt_flax.errors import RunError
from tnt_flax.evaluate import evaluate
from tnt_flax.metrics import MetricWriter, Progress, StepMeter, read_metrics_file
from tnt_flax.state import TrainState, fingerprint, flat_names, split
from tnt_flax.workdir import as_json, check_space, open_workdir


def train_and_evaluate(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains what `config` describes in `workdir`, from where an earlier run there stopped.

    Returns the last evaluation (top1, top5, loss, images), the step, and the SHA-256 fingerprint of
    the final parameters.

    Raises:
        InputError: something in the config, the data or the workdir is wrong.
        RunError: the loss became NaN or infinite, or a checkpoint could not be saved.
    """
    build.check(config)
    build.build_train_transform(config)  # not after the workdir has got this config
    with open_workdir(workdir, as_json(config)):
        return _train(config, workdir)


def due(step: int, every: int, total: int) -> bool:
    """Is it time, with `step` updates done? Every `every` steps, and after the last one."""
    return step % every == 0 or step == total


def _train(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    # ---------------------------------------------------------------- mesh
    mesh = sharding.make_mesh()
    replicated = sharding.replicated(mesh)
    sharding.check_batch_size("batch_size", config.batch_size, mesh)
    sharding.check_batch_size("eval.batch_size", config.eval.batch_size, mesh)

    # ---------------------------------------------------------------- data
    train_source = build.open_source(config, config.data.train_split)
    eval_source = build.open_source(config, config.data.eval_split)
    check_same_classes(train_source, eval_source)
    class_names = train_source.class_names
    plan = build.build_plan(config, len(train_source))
    total_steps = plan.steps_per_epoch * (config.epochs + config.optimizer.cooldown_epochs)
    every = {
        group: build.in_steps(f"{group}.every", config[group].every, plan.steps_per_epoch)
        for group in ("eval", "checkpoint", "log")
    }

    # ---------------------------------------------------------------- model and optimizer
    model = build.build_model(config, len(class_names))
    tx, schedule = build.build_optimizer(config, plan.steps_per_epoch)
    init_params = build.init_params(model, config)
    init_key, step_key = build.run_keys(config)
    step_key = jax.device_put(step_key, replicated)

    def new_state(params):
        return TrainState.create(params, tx)

    def init_state(key):
        return new_state(init_params(key))

    # ---------------------------------------------------------------- state, new or restored
    layout = abstract(jax.eval_shape(init_state, init_key), replicated)
    check_space(workdir, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layout)))
    info = {"config": as_json(config), "class_names": list(class_names)}
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep, info=info)
    state = checkpoints.restore_latest(layout)
    if state is None:
        if config.init_from:
            params, _ = build.load_params(
                config, model, config.init_from, tuple(class_names), fine_tune=True
            )
            state = jax.jit(new_state, out_shardings=replicated)(params)
        else:
            state = jax.jit(init_state, out_shardings=replicated)(init_key)
        params = split(state.params)["params"]
        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        (workdir / "parameters.txt").write_text(table + "\n")
    names = list(flat_names(state.params))
    start_step = int(state.step)
    print(
        f"{config.model.name}: {len(train_source)} training and {len(eval_source)} evaluation "
        f"images, {len(class_names)} classes, {jax.device_count()} {jax.default_backend()} "
        f"device(s), {plan.steps_per_epoch} steps per epoch; from step {start_step} to "
        f"{total_steps}; logs and checkpoints in {workdir}",
        file=sys.stderr,
    )

    # ---------------------------------------------------------------- compiled steps
    batch_sharding = sharding.batch_sharding(mesh)
    train_step = sharding.jit_train_step(build.build_train_step(config, model, tx, schedule), mesh)
    eval_step = jax.jit(
        sharding.on_mesh(build.build_eval_step(config, model), mesh),
        in_shardings=(replicated, batch_sharding),
        out_shardings=replicated,
    )

    # ---------------------------------------------------------------- loop
    writer = MetricWriter(workdir, start_step)
    progress = Progress(start_step, total_steps)
    meter = StepMeter(config.batch_size, plan.steps_per_epoch, total_steps)
    last_eval = {}
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
        batches = build.eval_batches(config, eval_source)
        metrics = evaluate(eval_step, evaluated_params(), batches, mesh)
        writer.write(step, {f"eval/{name}": value for name, value in metrics.items()})
        progress.say(
            f"step {step}: {config.eval.weights} weights on {metrics['images']} images: "
            f"top-1 {metrics['top1']:.2%}  top-5 {metrics['top5']:.2%}  loss {metrics['loss']:.4f}"
        )
        return metrics

    batches = build.train_batches(config, train_source, plan, start_step, total_steps - start_step)
    try:
        for step in range(start_step, total_steps):  # `step` updates have been applied so far
            asked = time.perf_counter()
            batch = next(batches)
            meter.waited += time.perf_counter() - asked
            meter.replaced += int(batch.pop("replaced").sum())

            state, metrics = train_step(state, sharding.to_global(batch, mesh), step_key)
            settle()  # the step before: its metrics are ready while the device works on this one
            pending = (step, metrics)
            progress.advance()

            done = step + 1
            if due(done, every["log"], total_steps):
                settle()
                values = meter.report(done)
                writer.write(done, values)
                progress.report(done, values)
            evaluating = due(done, every["eval"], total_steps)
            if evaluating or due(done, every["checkpoint"], total_steps):
                settle()  # a NaN must not reach a checkpoint
                with meter.pause():
                    last_eval = run_evaluation(done) if evaluating else {}
                    checkpoints.save(state, done, last_eval or None)
        if not last_eval:  # nothing was left to do
            last_eval = run_evaluation(total_steps)
        checkpoints.wait()

        # ------------------------------------------------------------ what a run leaves behind
        digest = fingerprint(state.params)
        writer.write(total_steps, {"fingerprint": digest})
        print(f"SHA-256 of the final parameters: {digest}", file=sys.stderr)
        weights.save_weights(workdir / "weights.safetensors", state.ema, info)
        figures.plot_curves(read_metrics_file(writer.path), workdir / "curves.png")
        with contextlib.closing(build.eval_batches(config, eval_source)) as eval_batches:
            batch = next(eval_batches)
        predict_step = jax.jit(build.build_predict_step(config, model))
        pixels = jax.device_put(batch["image"], replicated)
        probabilities = jax.device_get(predict_step(evaluated_params(), pixels))
        images, labels, mask = batch["image"], batch["label"], batch["mask"]
        figures.plot_predictions(
            images[mask],
            labels[mask],
            probabilities[mask],
            class_names,
            workdir / "predictions.png",
        )
        return {**last_eval, "step": total_steps, "fingerprint": digest}
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
