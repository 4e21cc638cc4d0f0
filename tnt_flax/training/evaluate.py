# SPDX-License-Identifier: Apache-2.0
"""Exact evaluation: every image counts once, for any batch size and number of devices."""

import contextlib
import functools
import logging
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError, RunError
from tnt_flax.core.files import open_table
from tnt_flax.data.labels import (
    RealLabels,
    map_to_network,
    names_or_imagenet,
    read_real_labels,
    readable_names,
    select_classes,
)
from tnt_flax.data.sources import Source, storage
from tnt_flax.runtime import host, processes, sharding
from tnt_flax.runtime.watchdog import Watchdog
from tnt_flax.training.experiment import Batches, Experiment
from tnt_flax.training.step import CALIBRATION_BINS, calibration_bin

logger = logging.getLogger(__name__)

PER_CLASS_COLUMNS = {"class": str, "name": str, "images": int, "top1": float, "top5": float}


@host.explain_device_errors()
def evaluate(
    eval_step: Callable[..., dict[str, jax.Array]],
    variables: Any,
    batches: Batches,
    mesh: Mesh,
    progress: Callable[[str], None] = lambda what: None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Evaluates `variables` on all `batches`.

    Args:
        eval_step: see `step.make_eval_step`, jitted.
        variables: parameters and statistics on `mesh`.
        batches: this process's rows of each batch.
        mesh: see `runtime.sharding`.
        progress: called with "batch 1 of an evaluation" and so on; may raise.

    Returns:
        The metrics: top1 and top5 (fractions), loss (mean), ece (expected calibration error),
        mean_per_class (mean of the top-1 accuracies of the classes), images, skipped (unreadable
        images).
        The sums of `eval_step` over all batches, in float64.

    Raises:
        RunError: there is no image, or the loss is not finite.
    """
    totals: dict[str, np.ndarray] = {}
    skipped = 0

    def add(sums):  # in the order of the data
        for name, x in jax.device_get(sums).items():
            totals[name] = totals.get(name, 0) + np.asarray(x, np.float64)

    variables = sharding.unshard_fsdp(variables, mesh)
    pending = {}  # added one batch late, so that the device never waits for the host
    with contextlib.closing(batches):
        for number, batch in enumerate(batches, start=1):
            skipped += int(batch.pop("corrupt").sum())
            sums = eval_step(variables, sharding.to_global(batch, mesh))
            add(pending)
            pending = sums
            progress(f"batch {number} of an evaluation")
    add(pending)
    images = int(totals.get("images", 0))
    if not images:
        raise RunError("no image could be evaluated")
    metrics = {name: totals[name].item() / images for name in ("top1", "top5", "loss")}
    if not math.isfinite(metrics["loss"]):
        raise RunError(f"the evaluation loss is {metrics['loss']}: these weights are not usable")
    metrics["ece"] = calibration_error(totals["calibration"])
    metrics["mean_per_class"] = mean_per_class(totals["per_class"])
    return {**metrics, "images": images, "skipped": processes.sum_over_processes(skipped)}, totals


def calibration_sums(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Returns [3, bins]: images, correct predictions and confidence, summed over each bin."""
    bins = np.asarray(calibration_bin(np.float32(confidence)))
    columns = (np.ones(len(bins)), correct, confidence)
    return np.stack([np.bincount(bins, x, CALIBRATION_BINS) for x in columns])


def calibration_error(sums: np.ndarray) -> float:
    """Returns the expected calibration error (arXiv 1706.04599) of `calibration_sums`."""
    images, correct, confidence = sums
    return float(np.abs(correct - confidence).sum() / images.sum())


def mean_per_class(per_class: np.ndarray) -> float:
    """Returns the mean top-1 accuracy of all classes with images; `per_class` is [3, classes]."""
    images, top1, _ = per_class[:, per_class[0] > 0]
    return float((top1 / images).mean())


@host.float32()
def evaluate_checkpoint(
    config: ConfigDict,
    run: pathlib.Path | None,
    which: str,
    per_class: str | None = None,
    *,
    owns_process: bool = False,
) -> dict[str, float | str]:
    """Evaluates weights on `config`'s evaluation split; class names are mapped where they differ.

    Args:
        config: names the data. If it names no network, the network is that of the weights.
        run: workdir of the run that "best" and "last" refer to.
        which: "best" or "last", or weights of any framework: file, workdir, hf:// address.
        per_class: table to write, with a row for each class that has images.
        owns_process: see `train_and_evaluate`.

    Returns:
        The metrics of `evaluate`; `classes`, the number of classes that predictions are restricted
        to; `checkpoint`, the path of the weights.

    Raises:
        InputError: something is missing or does not fit; also if labels and classes do not fit
            together, see `data.labels`.
    """
    path, checkpoint = _find_weights(which, run)
    watchdog = Watchdog(config.stall_minutes, owns_process=owns_process)
    with watchdog, contextlib.ExitStack() as stack:
        experiment = Experiment(config, weights=path, checkpoint=checkpoint)
        mesh, write_row = experiment.mesh, None
        if per_class and processes.is_main_process():
            table = open_table(pathlib.Path(per_class), PER_CLASS_COLUMNS)
            write_row = stack.enter_context(table)
        source = open_labeled_source(experiment)
        multi_label = getattr(source, "max_labels", None) is not None
        if multi_label and per_class:
            raise InputError("images may be of several classes in these data: no --per-class")
        variables, found = experiment.load_variables(path, checkpoint=checkpoint)
        variables = sharding.put_global(variables, mesh)
        class_names, num_classes = found.class_names, found.network.model.num_classes
        classes = select_classes(experiment.config.eval.classes, class_names, num_classes)
        to_network = map_to_network(source.class_names, class_names, num_classes)

        logger.info(f"evaluating on {len(source)} images")
        eval_step = experiment.make_eval_step(experiment.make_model(num_classes), classes)
        eval_step = sharding.jit_eval_step(eval_step, mesh, experiment.config.deterministic)
        batches = relabeled(experiment.eval_batches(source), to_network, classes)
        # `setup`: there is nothing to save, so a signal may end the process at once.
        progress = functools.partial(watchdog.progress, setup=True)
        metrics, sums = evaluate(eval_step, variables, batches, mesh, progress)
        if multi_label:  # an image counts for one of its classes
            del metrics["mean_per_class"]
        metrics["classes"] = len(classes) if classes else num_classes
        if per_class:
            metrics["per_class"] = per_class
        if write_row:
            write_per_class(write_row, sums["per_class"], class_names)
    return {**metrics, "checkpoint": found.path}


def _find_weights(which: str, run: pathlib.Path | None) -> tuple[str, str]:
    """Returns the path of the weights and, for a workdir, which of its checkpoints."""
    if which not in ("best", "last"):
        return which, "best"
    if run is None:
        raise InputError(f"--checkpoint={which} needs the --workdir of a run")
    return str(run), which


def open_labeled_source(experiment: Experiment) -> Source:
    """Opens the evaluation split, with the labels of `eval.real_labels` if that is set."""
    config = experiment.config
    source = experiment.open_source(config.data.eval_split, evaluation=True, multi_label=True)
    if not config.eval.real_labels:
        return source
    path = storage.join(config.data.root, config.eval.real_labels)
    return RealLabels(source, read_real_labels(path, source))


def relabeled(batches: Batches, to_network: np.ndarray, classes: tuple[int, ...] | None) -> Batches:
    """Yields `batches` with labels of the network, int32 [b, K], where they have the data's.

    Args:
        batches: with labels int32 [b] or [b, K], -1 for no label.
        to_network: int [data classes], the network's class of each class of the data, or -1.
        classes: if given, images of other classes are masked out, as are images without a label.
    """
    with contextlib.closing(batches):
        for batch in batches:
            labels = batch["label"].reshape(len(batch["label"]), -1)
            batch["label"] = np.where(labels < 0, labels, to_network[labels])
            if classes is not None:
                batch["label"] = np.where(np.isin(batch["label"], classes), batch["label"], -1)
            batch["mask"] &= (batch["label"] >= 0).any(axis=1)
            yield batch


def write_per_class(
    write_row: Callable[[dict[str, Any]], object],
    per_class: np.ndarray,
    class_names: tuple[str, ...] | None,
) -> None:
    """Writes a row for each class with images; `per_class` is [3, classes]."""
    classes = per_class.shape[1]
    names = names_or_imagenet(class_names, classes) or tuple(map(str, range(classes)))
    rows = zip(names, readable_names(names), per_class.T, strict=True)
    for synset, name, (images, top1, top5) in rows:
        if images:
            accuracies = {"top1": top1 / images, "top5": top5 / images}
            write_row({"class": synset, "name": name, "images": int(images), **accuracies})
