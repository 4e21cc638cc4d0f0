# SPDX-License-Identifier: Apache-2.0
"""Exact evaluation: every image counts once, for any batch size and number of devices."""

import contextlib
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tnt_flax import build, distributed, sharding
from tnt_flax.errors import InputError, RunError
from tnt_flax.guard import Guard


def evaluate(
    eval_step: Callable[..., dict[str, jax.Array]],
    params: Any,
    batches: build.Batches,
    mesh: Mesh,
    stop: Callable[[str], bool | None] = lambda what: False,
) -> dict[str, float]:
    """Returns top1 and top5 (shares of 1), loss (mean), images, and skipped (unreadable images).

    `stop` is told of every batch, and says whether to give up; then the result is empty.

    Raises:
        RunError: there is no image, or the loss is not finite.
    """
    totals, skipped = {"top1": 0.0, "top5": 0.0, "loss": 0.0, "images": 0}, 0

    def add(sums):  # in double precision, in the order of the data
        for name in totals if sums else ():
            totals[name] += sums[name].item()

    params = sharding.whole(params, mesh)
    pending = None  # added one batch late: the device never waits, nor do batches pile up on it
    with contextlib.closing(batches):
        for number, batch in enumerate(batches, start=1):
            skipped += int(batch.pop("corrupt").sum())
            sums = eval_step(params, sharding.to_global(batch, mesh))
            add(pending)
            pending = sums
            if stop(f"batch {number} of an evaluation"):
                return {}
    add(pending)
    images = totals.pop("images")
    if not images:
        raise RunError("no image could be evaluated")
    metrics = {name: total / images for name, total in totals.items()}
    if not math.isfinite(metrics["loss"]):
        raise RunError(f"the evaluation loss is {metrics['loss']}: these weights are not usable")
    return {**metrics, "images": images, "skipped": distributed.total(skipped)}


def evaluate_checkpoint(
    config: ConfigDict, run: pathlib.Path | None, which: str
) -> dict[str, float | str]:
    """Evaluates weights on the evaluation split of `config`.

    `which` is "best" or "last" of the run in `run`, or weights of any system that are of the
    config's network: a file, a workdir, an address. Returns the metrics of `evaluate`, and as
    `checkpoint` where the weights were.
    """
    build.check(config)
    with Guard(config.stall_minutes) as guard:
        return _evaluate_checkpoint(config, run, which, guard)


def _evaluate_checkpoint(config, run, which, guard):
    mesh = build.build_mesh(config)
    path, checkpoint = which, "best"
    if which in ("best", "last"):
        if run is None:
            raise InputError(f"--checkpoint={which} needs the --workdir of a run")
        path, checkpoint = str(run), which

    source = build.open_source(config, config.data.eval_split)
    class_names = tuple(source.class_names)
    model = build.build_model(config, len(class_names))
    params, path = build.load_params(config, model, path, class_names, checkpoint=checkpoint)
    params = sharding.place(params, sharding.shardings(params, mesh, (sharding.TENSOR,)))

    print(f"evaluating on {len(source)} images", file=sys.stderr)
    eval_step = sharding.jit_eval_step(build.build_eval_step(config, model), mesh)
    metrics = evaluate(eval_step, params, build.eval_batches(config, source), mesh, guard.check)
    return {**metrics, "checkpoint": path}
