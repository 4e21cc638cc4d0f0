# SPDX-License-Identifier: Apache-2.0
"""How fast images are classified: one by one, and in batches of any size; beside timm.

    python -m benchmarks inference --against=timm
    python -m benchmarks inference --batch-sizes 1 8 64 --cores=2

Each side runs in a process of its own, one at a time, on the same cores of the CPU. All have the
same normalized images in memory, and random weights. The sides:

    ours                        float32, as `tnt_flax.load` gives it
    ours bfloat16               the same with dtype="bfloat16"
    timm eager, timm compile    float32 in inference mode; in `torch.compile`
    timm bfloat16               timm eager in `torch.autocast`

bfloat16 is left out where the CPU has no instructions for it. In a round every side works off some
batches of every size, after a round that does not count and compiles. `latency_ms` are milliseconds
for a single image, median and 95th percentile over all that were timed, one at a time. A ratio is
the median over the rounds of ours / theirs, in images per second.
"""

import argparse
import functools
import statistics
import sys
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.model import (
    CLASSES,
    THEIRS,
    Work,
    add_sides,
    has_bfloat16,
    make_batch,
    set_up,
    timm_network,
)
from tnt_flax.models import create_model

OURS = {"ours": "float32", "ours bfloat16": "bfloat16"}  # the type of the computation
IMAGES = 8  # at least, in a pass over batches
SINGLES = 10  # in a round


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sides(parser)
    sizes = [1, 2, 4, 8, 16, 32]
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=sizes, help="images")


def measure_inference(
    args: argparse.Namespace, image_size: int | None = None, **fields: Any
) -> dict[str, Any]:
    """Runs all rounds; returns what the JSON line says. The arguments are those of `measure_model`.

    Raises:
        InputError: an unknown model, too few cores, less than one round or image, no timm.
        RunError: a side failed.
    """
    harness.check_counts(args, "rounds", "cores")
    for size in args.batch_sizes:
        harness.check_counts(argparse.Namespace(batch_sizes=size), "batch_sizes")
    sizes = sorted(set(args.batch_sizes))
    work, facts, hows = set_up(args, sizes, image_size, fields)
    harness.print_facts(facts)
    harness.say_who_takes_part()
    sides = {
        name: functools.partial(_our_passes, work, dtype)
        for name, dtype in OURS.items()
        if dtype == "float32" or has_bfloat16()
    }
    sides |= {THEIRS[how]: functools.partial(_timm_passes, work, how) for how in hows}
    with harness.processes(sides, facts["cores"]) as runs:
        latencies = measure_latency(runs, args.rounds)
        rates = {size: harness.measure(runs, f"batch {size}", args.rounds) for size in sizes}
    return summarize(latencies, rates) | facts


def measure_latency(runs: dict[str, harness.Run], count: int) -> dict[str, list[list[float]]]:
    """Milliseconds of single images for every side, SINGLES in each of `count` rounds."""
    found = {name: [] for name in runs}
    for i in range(-1, count):
        for name in list(runs) if i % 2 else reversed(runs):
            times = [1e3 / runs[name]("single") for _ in range(SINGLES)]
            found[name] += [times] if i >= 0 else []
        if i >= 0:
            said = (f"{name} {statistics.median(times[-1]):.1f}" for name, times in found.items())
            print(f"latency round {i + 1}: ms: {', '.join(said)}", file=sys.stderr)
    return found


def summarize(
    latencies: dict[str, list[list[float]]], rates: dict[int, harness.Rates]
) -> dict[str, Any]:
    single = {  # images per second, by which a ratio is the larger the better
        name: [1e3 / statistics.median(times) for times in values]
        for name, values in latencies.items()
    }
    tables = {"latency": single} | {str(size): found for size, found in rates.items()}

    def ratio(side, other):
        """Of every table, where both took part."""
        return {
            name: harness.median(harness.ratios(table, side, [other]))
            for name, table in tables.items()
            if side in table and other in table
        }

    return {
        "latency_ms": {
            name: {
                "median": round(float(np.median(times)), 2),
                "p95": round(float(np.percentile(times, 95)), 2),
            }
            for name, times in latencies.items()
        },
        "images_per_second": {
            str(size): {name: harness.median(values) for name, values in found.items()}
            for size, found in rates.items()
        },
        **{f"vs_{how}": ratio("ours", theirs) for how, theirs in THEIRS.items()},
        "rounds": {
            name: {side: [round(rate, 3) for rate in values] for side, values in table.items()}
            for name, table in tables.items()
        },
    }


def _batches(work: Work):
    """{task: (images, how many times)} of every size."""
    sizes = {f"batch {size}": (size, -(-IMAGES // size)) for size in work.batch_size}
    return {
        task: (make_batch(work._replace(batch_size=size))[0], times)
        for task, (size, times) in {"single": (1, 1), **sizes}.items()
    }


def _our_passes(work: Work, dtype: str, cores: int) -> dict[str, harness.Pass]:
    del cores  # XLA has a thread for each that the process has
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", "cpu")
    model = create_model(work.model, num_classes=CLASSES, dtype=dtype, **work.fields)
    batches = {task: (jnp.asarray(x), times) for task, (x, times) in _batches(work).items()}
    variables = jax.jit(model.init)(jax.random.key(0), batches["single"][0])
    predict = jax.jit(model.apply)

    def run(images, times):
        for _ in range(times):
            predict(variables, images).block_until_ready()
        return times * len(images)

    return {task: functools.partial(run, *batch) for task, batch in batches.items()}


def _timm_passes(work: Work, how: str, cores: int) -> dict[str, harness.Pass]:
    import torch

    _, call, precision = timm_network(work, how, cores)

    def run(images, times):
        with torch.inference_mode(), precision:
            for _ in range(times):
                call(images)
        return times * len(images)

    return {
        task: functools.partial(run, torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), times)
        for task, (x, times) in _batches(work).items()
    }
