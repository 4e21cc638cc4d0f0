# SPDX-License-Identifier: Apache-2.0
"""Cost of a training run beyond its steps: start-up time, and overhead of the training loop.

    python -m benchmarks start --config=configs/tnt_s.py
    python -m benchmarks start --config=configs/digits.py --batch-size=32
    python -m benchmarks loop --config=configs/digits.py --batch-size=32
    python -m benchmarks loop --config=configs/tnt_s.py --set model.dtype=float32

Run both in the checkout. If the config names no image folder, photographs are generated. Any config
key can be changed: `--set model.dtype=float32 data.workers=1`.

`start` measures from `python main.py` to the end of its first step. Each round starts it twice in
new workdirs: `cold` with an empty compilation cache, `warm` with the cache of the cold start. Each
process is ended after its first step. Results, medians over rounds:

    seconds     from process start until the metrics of step 1 are printed
    compile_s   thereof in XLA's compiler, or reading its cache
    cpu_s       CPU time: below `seconds` if the cores are shared, above it with several cores
    peak_gib    peak resident memory

`loop` compares, alternating in one process that is set up as `main.py`:

    loop   `train_and_evaluate` (reads, augments, trains, logs): its reported rates of the second
           and third epoch; the first one compiles. Evaluation and checkpoints are not included.
    bare   the same jitted step, as often as an epoch has steps, on one batch on the device

Its result is the median over rounds of loop / bare in steps per second.
"""

import argparse
import contextlib
import functools
import itertools
import os
import pathlib
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import harness
from tnt_flax.core.errors import InputError, RunError
from tnt_flax.tools.command_line import positive, read_config

MARK = "watched: "  # prefix of the lines that the started process prints for this one
COMPILE = "/jax/core/compile/backend_compile_duration"  # event of jax.monitoring
WATCHED = "from benchmarks.run import run_watched; run_watched()"
EPOCHS = (  # three epochs, each reported separately
    "epochs=3",
    "optimizer.warmup_epochs=0",
    "optimizer.cooldown_epochs=0",
    "log.every=1 epochs",
    "eval.every=3 epochs",
    "checkpoint.every=3 epochs",
)


add_arguments = harness.add_run_arguments


def add_loop_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_run_arguments(parser)
    parser.add_argument("--steps", type=positive, default=6, help="steps per epoch of photographs")


def _facts(args):
    facts = {
        "config": args.config,
        "batch_size": args.batch_size,
        "cores": harness.pick_cores(args.cores),
        "versions": harness.versions("jax", "jaxlib", "flax", "grain"),
    }
    harness.print_facts(facts)
    return facts


# ----------------------------------------------------------------------------------------- start-up


def measure_start(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the start-up time; returns the JSON result.

    Raises:
        InputError: no main.py here, too few cores, or main.py rejected its input.
        RunError: the run failed before its first step.
    """
    if not pathlib.Path("main.py").is_file():
        raise InputError("there is no main.py here: run this in a checkout of tnt_flax")
    facts = _facts(args)
    starts = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        args.set = ["log.every=1 steps", *args.set]
        overrides = harness.synthetic_overrides(args, folder / "images", steps=2)
        flags = [f"--config={args.config}", *overrides]
        for i in range(args.rounds):
            for kind, results in starts.items():
                workdir, cache = folder / f"{kind}{i}", folder / f"cache{i}"
                results.append(start([*flags, f"--workdir={workdir}"], cache, facts["cores"]))
                line = ", ".join(f"{key} {results[-1][key]}" for key in _medians(results))
                print(f"round {i + 1}: {kind}: {line}", file=sys.stderr)
    return {
        **{kind: _medians(results) for kind, results in starts.items()},
        "rounds": {
            kind: [[result["seconds"], result["compile_s"]] for result in results]
            for kind, results in starts.items()
        },
        **facts,
    }


def _medians(results):
    return {key: round(statistics.median(r[key] for r in results), 3) for key in results[0]}


def start(flags: list[str], cache: pathlib.Path, cores: list[int]) -> dict[str, Any]:
    """Starts main.py with `flags`, ends it after its first step, and returns what that cost."""
    began = time.perf_counter()
    with harness.pinned(cores):
        process = subprocess.Popen(
            [sys.executable, "-c", WATCHED, *flags],
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    compile_s, last_line = 0.0, ""
    with process:
        try:
            for line in process.stderr:
                if line.startswith(MARK):
                    compile_s += float(line.removeprefix(MARK))
                elif line.startswith("step 1/"):
                    seconds = time.perf_counter() - began
                    return _summarize(seconds, compile_s, process.pid)
                else:
                    last_line = line.strip() or last_line
        finally:
            process.kill()
    if process.returncode == 2:
        raise InputError(last_line.removeprefix("error: "))
    raise RunError(f"main.py ended before its first step: {last_line}")


def _summarize(seconds, compile_s, pid):
    process = pathlib.Path(f"/proc/{pid}")
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())[1])
    ticks = (process / "stat").read_text().rpartition(")")[2].split()[11:13]  # user, system
    return {
        "seconds": round(seconds, 3),
        "compile_s": round(compile_s, 3),
        "cpu_s": sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
        "peak_gib": round(peak / 2**20, 3),
    }


def run_watched() -> None:
    """Runs main.py in this process and reports the time of every compilation on stderr."""
    from jax import monitoring

    def watch(event, seconds, **_):
        if event == COMPILE:
            with contextlib.suppress(BrokenPipeError):
                print(f"{MARK}{seconds}", file=sys.stderr, flush=True)

    monitoring.register_event_duration_secs_listener(watch)
    sys.argv[0] = "main.py"
    runpy.run_path("main.py", run_name="__main__")


# --------------------------------------------------------------------------------------------- loop


def measure_loop(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the training loop relative to its bare step; returns the JSON result.

    Raises:
        InputError: too few cores, or the config is invalid.
        RunError: the run failed.
    """
    facts = _facts(args)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        args.set = [*EPOCHS, *args.set]
        overrides = harness.synthetic_overrides(args, folder / "images", args.steps)
        contender = functools.partial(_loop_passes, args.config, overrides, folder)
        with harness.processes({"run": contender}, facts["cores"]) as runs:
            tasks = {task: functools.partial(runs["run"], task) for task in ("loop", "bare")}
            rates = harness.alternate(tasks, args.rounds, "steps/s")
    ratios = harness.ratios(rates, "loop", ["bare"])
    return {
        "loop_vs_bare": harness.median(ratios),
        "rounds": ratios,
        "steps_per_second": {name: harness.median(values) for name, values in rates.items()},
        **facts,
    }


def _loop_passes(
    path: str, overrides: list[str], folder: pathlib.Path, cores: int
) -> dict[str, harness.Pass]:
    """Contender with the tasks "loop" and "bare"; workdirs are created in `folder`."""
    del cores  # XLA starts one thread per available core
    from tnt_flax.runtime import host

    host.keep_memory()
    host.cache_compilations()  # every pass jits its functions again
    from tnt_flax.training.metrics import read_metrics_file
    from tnt_flax.training.train import train_and_evaluate

    config = read_config(path, overrides)
    workdirs = (folder / f"run{i}" for i in itertools.count())

    def loop_pass():
        workdir = next(workdirs)
        train_and_evaluate(config, workdir)
        reports = read_metrics_file(workdir / "metrics.jsonl")
        reports = [line for line in reports if "train/images_per_second" in line]
        steps = reports[0]["step"]  # per epoch
        rates = [line["train/images_per_second"] for line in reports[1:]]
        return len(rates) * steps, sum(steps * config.batch_size / rate for rate in rates)

    return {"loop": loop_pass, "bare": _bare_pass(config)}


def _bare_pass(config):
    import jax

    from tnt_flax.runtime import sharding
    from tnt_flax.training.experiment import Experiment

    experiment = Experiment(config)
    state, step_key = experiment.new_state(), experiment.keys.steps
    train_step, steps_per_epoch = experiment.train_step, experiment.steps_per_epoch
    with contextlib.closing(experiment.data.train_batches(0, 1)) as batches:
        batch = next(batches)
    batch.pop("replaced")
    batch = sharding.to_global(batch, experiment.mesh)

    def bare_pass():
        nonlocal state
        for _ in range(steps_per_epoch):
            state, metrics = train_step(state, batch, step_key)
        jax.block_until_ready((state, metrics))
        return steps_per_epoch

    return bare_pass
