# SPDX-License-Identifier: Apache-2.0
"""Exact evaluation: every image counts once, for any batch size and number of devices."""

import contextlib
import functools
import logging
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError, RunError
from tnt_flax.core.files import open_table
from tnt_flax.data.labels import (
    LabelRows,
    imagenet_synsets,
    map_to_network,
    names_or_imagenet,
    read_real_labels,
    readable_names,
    select_classes,
    split_names,
)
from tnt_flax.data.sources import Source, storage, stores_several_labels
from tnt_flax.runtime import host, processes, sharding
from tnt_flax.runtime.watchdog import Watchdog
from tnt_flax.training.data import Batches
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.step import CALIBRATION_BINS, calibration_bin
from tnt_flax.weights.read import LoadedWeights

logger = logging.getLogger(__name__)

PER_CLASS = {"class": str, "name": str, "images": int}  # first columns of the table
# Further columns of single-label (False) and of multi-label data (True).
CLASS_METRICS = {False: ("top1", "top5"), True: ("average_precision",)}


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
        images). For multi-label data, top1, top5 and ece count images with at least one class,
        the binary cross entropy is the loss, and mean_average_precision replaces mean_per_class.
        The sums of `eval_step` over all batches, in float64. For multi-label data "per_class" is
        [2, classes]: images and average precision.

    Raises:
        RunError: there is no image, or the loss is not finite.
    """
    totals: dict[str, np.ndarray] = {}
    rows, skipped = [], 0

    def add(sums):  # in the order of the data
        sums = jax.device_get(sums)
        if "rows" in sums:
            rows.append(sums.pop("rows"))
        for name, x in sums.items():
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
    metrics["ece"] = calibration_error(totals["calibration"])
    if rows:
        metrics["loss"], totals["per_class"] = multi_label_metrics(rows)
        metrics["mean_average_precision"] = float(np.nanmean(totals["per_class"][1]))
    else:
        metrics["mean_per_class"] = mean_per_class(totals["per_class"])
    if not math.isfinite(metrics["loss"]):
        raise RunError(f"the evaluation loss is {metrics['loss']}: these weights are not usable")
    return {**metrics, "images": images, "skipped": processes.sum_over_processes(skipped)}, totals


def multi_label_metrics(rows: list[dict[str, np.ndarray]]) -> tuple[float, np.ndarray]:
    """Returns the mean binary cross entropy, and images and average precision [2, classes].

    `rows` are those of `step.make_eval_step`. The average precision of a class without images is
    NaN.

    Raises:
        RunError: no image has a class.
    """
    from sklearn.metrics import average_precision_score  # a slow import

    logits, targets = (
        np.concatenate([batch[name][batch["mask"]] for batch in rows])
        for name in ("logits", "targets")
    )
    if not targets.any():
        raise RunError("no image could be evaluated: none has a class of the network")
    logits = np.float64(logits)
    losses = np.logaddexp(0, np.where(targets, -logits, logits))
    precision = [
        average_precision_score(*column)
        if column[0].any() and np.isfinite(column[1]).all()
        else np.nan
        for column in zip(targets.T, logits.T, strict=True)
    ]
    return float(losses.mean()), np.stack([targets.sum(axis=0), precision])


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


@host.disable_x64()
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
        mesh, source = experiment.mesh, open_labeled_source(experiment)
        multi_label = experiment.data.is_multi_label(source)
        write_row = stack.enter_context(open_per_class(per_class, source, multi_label))
        variables, found = experiment.load_variables(path, checkpoint=checkpoint)
        variables = sharding.put_global(variables, mesh)
        class_names, num_classes = found.class_names, found.network.model.num_classes
        batches, classes = labeled_batches(experiment, source, found)

        logger.info(f"evaluating on {len(source)} images")
        model = experiment.make_model(num_classes)
        eval_step = experiment.make_eval_step(model, classes=classes, multi_label=multi_label)
        eval_step = sharding.jit_eval_step(eval_step, mesh, experiment.config.deterministic)
        # `setup`: there is nothing to save, so a signal may end the process at once.
        progress = functools.partial(watchdog.progress, setup=True)
        metrics, sums = evaluate(eval_step, variables, batches, mesh, progress)
        if not multi_label and stores_several_labels(source):
            # An image would count for one of its classes only.
            del metrics["mean_per_class"]
        metrics["classes"] = len(classes) if classes else num_classes
        if per_class:
            metrics["per_class"] = per_class
        if write_row:
            write_per_class(write_row, sums["per_class"], class_names, multi_label)
    return {**metrics, "checkpoint": found.path}


def labeled_batches(
    experiment: Experiment, source: Source, found: LoadedWeights
) -> tuple[Batches, tuple[int, ...] | None]:
    """Returns evaluation batches with the labels of a network, and its allowed classes.

    Args:
        experiment: of the evaluation.
        source: the evaluation split.
        found: the network, with its class names if they are known. Images are resized by its
            interpolation.

    Returns:
        The batches of `relabeled`, and the classes that predictions are restricted to by
        `eval.classes`; None for all.

    Raises:
        InputError: the classes do not fit together, see `data.labels`.
    """
    class_names, num_classes = found.class_names, found.network.model.num_classes
    classes = select_classes(experiment.config.eval.classes, class_names, num_classes)
    to_network = map_to_network(source.class_names, class_names, num_classes)
    batches = experiment.data.eval_batches(source, found.preprocessing["interpolation"])
    keep = experiment.data.is_multi_label(source)
    return relabeled(batches, to_network, classes, keep_unlabeled=keep), classes


@contextlib.contextmanager
def open_per_class(
    path: str | None, source: Source, multi_label: bool
) -> Iterator[Callable[[dict[str, Any]], object] | None]:
    """Yields `write(row)` of the table of classes, in process 0; None elsewhere and without path.

    Raises:
        InputError: images have several classes, and the network does not decide by sigmoids.
    """
    if path and not multi_label and stores_several_labels(source):
        raise InputError(
            "images may be of several classes in these data: --per-class needs "
            "--config.loss.name=bce, for average precisions"
        )
    if not path or not processes.is_main_process():
        yield None
        return
    columns = PER_CLASS | dict.fromkeys(CLASS_METRICS[multi_label], float)
    with open_table(pathlib.Path(path), columns) as write_row:
        yield write_row


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
    source = experiment.data.open_source(config.data.eval_split, evaluation=True, multi_label=True)
    if not config.eval.real_labels:
        return split_names(source) if config.loss.name == "bce" else source
    path = storage.join(config.data.root, config.eval.real_labels)
    return LabelRows(source, read_real_labels(path, source), imagenet_synsets())


def relabeled(
    batches: Batches,
    to_network: np.ndarray,
    classes: tuple[int, ...] | None,
    *,
    keep_unlabeled: bool = False,
) -> Batches:
    """Yields `batches` with labels of the network, int32 [b, K], where they have the data's.

    Args:
        batches: with labels int32 [b] or [b, K], -1 for no label.
        to_network: int [data classes], the network's class of each class of the data, or -1.
        classes: if given, other classes become -1, no label.
        keep_unlabeled: do not mask images without a label out.
    """
    with contextlib.closing(batches):
        for batch in batches:
            labels = batch["label"].reshape(len(batch["label"]), -1)
            batch["label"] = np.where(labels < 0, labels, to_network[labels])
            if classes is not None:
                batch["label"] = np.where(np.isin(batch["label"], classes), batch["label"], -1)
            if not keep_unlabeled:
                batch["mask"] &= (batch["label"] >= 0).any(axis=1)
            yield batch


def write_per_class(
    write_row: Callable[[dict[str, Any]], object],
    per_class: np.ndarray,
    class_names: tuple[str, ...] | None,
    multi_label: bool,
) -> None:
    """Writes a row for each class with images; `per_class` is that of `evaluate`."""
    columns, classes = CLASS_METRICS[multi_label], per_class.shape[1]
    names = names_or_imagenet(class_names, classes) or tuple(map(str, range(classes)))
    rows = zip(names, readable_names(names), per_class.T, strict=True)
    for synset, name, (images, *values) in rows:
        if images:
            if not multi_label:  # sums over the images
                values = [value / images for value in values]
            metrics = dict(zip(columns, values, strict=True))
            write_row({"class": synset, "name": name, "images": int(images), **metrics})
