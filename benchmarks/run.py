# SPDX-License-Identifier: Apache-2.0
"""How much of the training step's speed the training loop keeps, with all that it does besides.

    python -m benchmarks loop --config=configs/digits.py --batch-size=32
    python -m benchmarks loop --config=configs/tnt_s.py --set model.dtype=float32

In turns, in one process set up as `main.py` sets up its own:

    loop   `train_and_evaluate`: reads, augments, trains, logs; its own figures of the second and
           third epoch, the first one compiles. Evaluation and checkpoints are not in them.
    bare   the same jitted step as often as the loop's epoch, on one batch that is on the device

The result is the median over the rounds of loop / bare, in steps per second. If the config names no
folder of images, photographs are generated, for epochs of --steps steps. Any key can be changed:
`--set data.workers=1`.
"""

import argparse
import contextlib
import functools
import itertools
import pathlib
import sys
import tempfile
from typing import Any

from benchmarks import harness, synthetic_run
from tnt_flax.core.errors import InputError, one_line

# Three epochs, each reported by itself.
EPOCHS = {
    "epochs": 3,
    "optimizer.warmup_epochs": 0,
    "optimizer.cooldown_epochs": 0,
    "log.every": "1 epochs",
    "eval.every": "3 epochs",
    "checkpoint.every": "3 epochs",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    synthetic_run.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=6, help="in an epoch of photographs")


def measure_loop(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all rounds; returns what the JSON line says.

    Raises:
        InputError: too few cores, less than one round, image or step; the config is wrong.
        RunError: the run failed.
    """
    harness.check_counts(args, "rounds", "cores", "batch_size", "steps")
    facts = {
        "config": args.config,
        "batch_size": args.batch_size,
        "cores": harness.pick_cores(args.cores),
        "versions": harness.versions("jax", "jaxlib", "flax", "grain"),
    }
    harness.print_facts(facts)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        changes = EPOCHS | synthetic_run.settings(args, folder / "images", args.steps)
        side = functools.partial(_passes, args.config, changes, folder)
        rates = {"loop": [], "bare": []}
        with harness.processes({"run": side}, facts["cores"]) as runs:
            for i in range(-1, args.rounds):  # the first round, which compiles, does not count
                for task in list(rates)[:: -1 if i % 2 else 1]:
                    rate = runs["run"](task)
                    rates[task] += [rate] if i >= 0 else []
                if i >= 0:
                    line = ", ".join(f"{name} {values[-1]:.3f}" for name, values in rates.items())
                    print(f"round {i + 1}: steps/s: {line}", file=sys.stderr)
    ratios = harness.ratios(rates, "loop", ["bare"])
    return {
        "loop_vs_bare": harness.median(ratios),
        "rounds": ratios,
        "steps_per_second": {name: harness.median(values) for name, values in rates.items()},
        **facts,
    }


def _passes(
    path: str, changes: dict[str, Any], folder: pathlib.Path, cores: int
) -> dict[str, harness.Pass]:
    del cores  # all threads are those that the process gets by itself
    from tnt_flax.runtime import host

    host.keep_memory()
    host.cache_compilations()  # every pass makes its functions anew
    import jax

    from tnt_flax.runtime import sharding
    from tnt_flax.training import experiment
    from tnt_flax.training.metrics import read_metrics_file
    from tnt_flax.training.step import TrainState
    from tnt_flax.training.train import train_and_evaluate

    config = synthetic_run.read_config(path)
    try:
        config.update_from_flattened_dict(changes)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"--set: {one_line(error)}") from None
    workdirs = (folder / f"run{i}" for i in itertools.count())

    def loop_pass():
        workdir = next(workdirs)
        train_and_evaluate(config, workdir)
        reports = read_metrics_file(workdir / "metrics.jsonl")
        reports = [line for line in reports if "train/images_per_second" in line]
        steps = reports[0]["step"]  # in each
        rates = [line["train/images_per_second"] for line in reports[1:]]
        return len(rates) * steps, sum(steps * config.batch_size / rate for rate in rates)

    mesh = experiment.build_mesh(config)
    source = experiment.open_source(config, config.data.train_split)
    plan = experiment.build_plan(config, len(source))
    model = experiment.build_model(config, len(source.class_names))
    tx, schedule = experiment.build_optimizer(config, plan.steps_per_epoch)
    init_params, (init_key, step_key) = (
        experiment.init_params(model, config),
        experiment.run_keys(config),
    )
    init_state = lambda key: TrainState.create(init_params(key), tx)
    shapes = jax.eval_shape(init_state, init_key)
    state = jax.jit(init_state, out_shardings=sharding.shardings(shapes, mesh))(init_key)
    train_step = experiment.build_train_step(config, model, tx, schedule)
    train_step = sharding.jit_train_step(train_step, mesh, shapes)
    with contextlib.closing(experiment.train_batches(config, source, plan, 0, 1)) as batches:
        batch = next(batches)
    batch.pop("replaced")
    batch = sharding.to_global(batch, mesh)

    def bare_pass():
        nonlocal state
        for _ in range(plan.steps_per_epoch):
            state, metrics = train_step(state, batch, step_key)
        jax.block_until_ready((state, metrics))
        return plan.steps_per_epoch

    return {"loop": loop_pass, "bare": bare_pass}
