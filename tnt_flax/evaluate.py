# SPDX-License-Identifier: Apache-2.0
"""Exact evaluation: every image counts once, for any batch size and number of devices."""

import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tnt_flax import build, checkpoint, sharding, weights, workdir
from tnt_flax.errors import InputError, RunError


def evaluate(
    eval_step: Callable[..., dict[str, jax.Array]], params: Any, batches: build.Batches, mesh: Mesh
) -> dict[str, float]:
    """Returns top1 and top5 (shares of 1), loss (mean), images, and skipped (unreadable images).

    Raises:
        RunError: there is no image, or the loss is not finite.
    """
    totals, skipped = {"top1": 0.0, "top5": 0.0, "loss": 0.0, "images": 0}, 0

    def add(sums):  # in double precision, in the order of the data
        for name in totals if sums else ():
            totals[name] += sums[name].item()

    pending = None  # added one batch late: the device never waits, nor do batches pile up on it
    for batch in batches:
        skipped += int(batch.pop("corrupt").sum())
        sums = eval_step(params, sharding.to_global(batch, mesh))
        add(pending)
        pending = sums
    add(pending)
    images = totals.pop("images")
    if not images:
        raise RunError("no image could be evaluated")
    metrics = {name: total / images for name, total in totals.items()}
    if not math.isfinite(metrics["loss"]):
        raise RunError(f"the evaluation loss is {metrics['loss']}: these weights are not usable")
    return {**metrics, "images": images, "skipped": skipped}


def evaluate_checkpoint(
    config: ConfigDict, run: pathlib.Path | None, which: str
) -> dict[str, float | str]:
    """Evaluates weights on the evaluation split of `config`.

    `which` is "best" or "last" of the run in `run`, the folder of one checkpoint, or a .safetensors
    file of ours. Returns the metrics of `evaluate` and `checkpoint`, the path.
    """
    build.check(config)
    mesh = sharding.make_mesh()
    sharding.check_batch_size("eval.batch_size", config.eval.batch_size, mesh)
    if which in ("best", "last"):
        if run is None:
            raise InputError(f"--checkpoint={which} needs the --workdir of a run")
        path = checkpoint.find_checkpoint(run / "checkpoints", which)
    else:
        path = pathlib.Path(which).resolve()

    source = build.open_source(config, config.data.eval_split)
    model = build.build_model(config, len(source.class_names))
    shapes = jax.eval_shape(build.init_params(model, config), jax.random.key(0))
    if path.is_dir():
        info = checkpoint.read_info(path)
        _check_info(path, info, config, source.class_names)
        layout = checkpoint.abstract(shapes, sharding.replicated(mesh))
        params = checkpoint.read_weights(path, config.eval.weights, layout)
    else:
        params, info = weights.load_weights(path, shapes)
        _check_info(path, info, config, source.class_names)
        params = jax.device_put(params, sharding.replicated(mesh))

    print(f"evaluating {path} on {len(source)} images", file=sys.stderr)
    eval_step = jax.jit(build.build_eval_step(config, model))
    metrics = evaluate(eval_step, params, build.eval_batches(config, source), mesh)
    return {**metrics, "checkpoint": str(path)}


def _check_info(path, info, config, class_names) -> None:
    """The weights must be of this model and these classes."""
    if "config" in info:
        changed = workdir.differences(info["config"]["model"], workdir.as_json(config)["model"])
        harmless = ("dtype", "remat", "drop_path", "dropout", "attention_dropout")
        changed = [c for c in changed if c.split(":")[0] not in harmless]
        if changed:
            raise InputError(f"{path} is of another model: {'; '.join(changed)}")
    if "class_names" in info and tuple(info["class_names"]) != tuple(class_names):
        raise InputError(
            f"{path} was trained on {len(info['class_names'])} classes "
            f"{info['class_names'][:3]}..., the data has {len(class_names)} {class_names[:3]}..."
        )
