# SPDX-License-Identifier: Apache-2.0
"""Writes an HTML report of a training run: one file that opens from disk.

    tnt-flax report runs/digits
    tnt-flax report runs/tnt_s --data-root=IMAGENET --out=tnt_s.html

It shows training curves, and for the evaluation split the confusion matrix, the most frequent
mistakes, calibration, the images with the largest loss, and the attention on some images; then the
environment and the config. Predictions are those of the best checkpoint, with the weights that
`eval.weights` selects. The last line on stdout is one JSON object. Exit code 1 means that the
report could not be made, 2 that the input was wrong.
"""

import argparse
import datetime
import json
import logging
import pathlib
import string
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from tnt_flax.core.errors import InputError, RunError, as_run_error
from tnt_flax.core.files import write_atomic
from tnt_flax.data.labels import readable_names
from tnt_flax.data.sources import Source
from tnt_flax.runtime import host, workdir
from tnt_flax.tools import attention, figures, page
from tnt_flax.tools.command_line import Parser
from tnt_flax.training import metrics, plots
from tnt_flax.training.evaluate import calibration_error, calibration_sums
from tnt_flax.training.experiment import Experiment
from tnt_flax.weights.read import LoadedWeights, read_checkpoint

logger = logging.getLogger(__name__)
ON_INTERRUPT = "no report was written"
SHOWN = 16  # images with the largest loss
TRACED = 4  # images whose attention is shown
MAX_MATRIX = 20  # classes in a confusion matrix


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("workdir", metavar="WORKDIR", type=pathlib.Path, help="folder of a run")
    add("--out", type=pathlib.Path, help="default: WORKDIR/report.html")
    add("--checkpoint", choices=["best", "last"], default="best", help="which predicts")
    add("--data-root", help="overrides data.root of the config")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the report; returns the JSON object of the last line.

    Raises:
        InputError: WORKDIR is not a workdir, its data are missing, or `out` is wrong.
        RunError: no image could be evaluated, or the report cannot be written.
    """
    stored = workdir.read_config(args.workdir)
    if stored is None:
        raise InputError(f"{args.workdir} is not a workdir: it has no config.json")
    out = args.out or args.workdir / "report.html"
    if out.suffix.lower() != ".html" or not out.parent.is_dir():
        raise InputError(f"--out={out}: give a file that ends in .html, in a folder that exists")
    host.cache_compilations()
    config = workdir.config_from_json(stored)
    if args.data_root is not None:
        config.data.root = args.data_root
    found = read_checkpoint(args.workdir, weights=config.eval.weights, checkpoint=args.checkpoint)
    experiment = Experiment(config)
    source = experiment.data.eval_source
    if found.class_names != tuple(source.class_names):
        raise InputError(
            f"{found.path} was trained on other classes than {config.data.root or 'the data'} has"
        )
    logger.info(f"evaluating {found.summary()} on {len(source)} images")
    predictions = collect_predictions(experiment, found.network.model, found.variables)
    summary = {
        "top1": float(predictions.correct.mean()),
        "top5": float((predictions.rank < 5).mean()),
        "loss": float(predictions.loss.mean()),
        "calibration_error": calibration_error(predictions.calibration_sums()),
        "images": len(predictions.label),
    }
    evaluated = Evaluated(args.workdir, experiment, found, source, predictions)
    with as_run_error(f"cannot write {out}"):
        write_atomic(out, make_page(evaluated, stored, summary))
    return {"out": str(out), **summary, "checkpoint": found.path}


class Evaluated(NamedTuple):
    """A run with the predictions of one of its checkpoints on the evaluation split."""

    folder: pathlib.Path  # of the run
    experiment: Experiment
    found: LoadedWeights
    source: Source
    predictions: "Predictions"

    @property
    def names(self) -> list[str]:
        return readable_names(self.source.class_names)

    def pixels(self, i: int) -> np.ndarray:
        """Returns an image after the evaluation transform, uint8 [H, W, 3]."""
        image, _ = self.source[int(self.predictions.record[i])]
        return self.experiment.data.eval_transform(image)

    def figure(self, i: int) -> str:
        """Renders an image with its predicted class, and its label if that differs."""
        predictions, names = self.predictions, self.names
        prediction = f"{names[predictions.predicted[i]]} {predictions.confidence[i]:.0%}"
        kind = "right" if predictions.correct[i] else "wrong"
        caption = f'<span class="{kind}">{page.text(prediction)}</span>'
        if not predictions.correct[i]:
            caption += f"<br>label: {page.text(names[predictions.label[i]])}"
        name = self.source.name_of(int(predictions.record[i]))
        return page.image(self.pixels(i), caption, name)


def make_page(evaluated: Evaluated, stored: dict[str, Any], summary: dict[str, Any]) -> str:
    """Fills the template. `stored` is the config as the run stored it."""
    folder, experiment, found, _, predictions = evaluated
    config = experiment.config
    lines = metrics.read_metrics_file(folder / "metrics.jsonl")
    curves = "<p>The workdir has no metrics.jsonl.</p>"
    if lines:
        curves = page.plot_svg(lambda path: plots.plot_curves(lines, path), "Curves")
    sums = predictions.calibration_sums()
    hardest = np.argsort(-predictions.loss, kind="stable")[:SHOWN]
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    kind = {"ema": "EMA", "raw": "raw"}[found.weights]
    origin = f"{folder.resolve().name}: {kind} weights of {found.file_format}, reported {today}"
    flat = traverse_util.flatten_dict(stored, sep=".")
    settings = [(key, json.dumps(value)) for key, value in flat.items() if value is not None]
    template = string.Template(pathlib.Path(__file__).with_name("report.html").read_text())
    return template.substitute(
        title=page.text(f"{config.model.name} on {config.data.name or config.data.source}"),
        size=config.data.image_size,
        origin=page.text(origin),
        top1=f"{summary['top1']:.2%}",
        top5=f"{summary['top5']:.2%}",
        loss=f"{summary['loss']:.4f}",
        calibration_error=f"{summary['calibration_error']:.2%}",
        images=f"{summary['images']:,}",
        parameters=f"{found.num_params / 1e6:.2f} M",
        curves=curves,
        confusion=render_confusion(evaluated),
        calibration=page.plot_svg(lambda path: figures.plot_calibration(sums, path), "Calibration"),
        hardest=page.images(map(evaluated.figure, hardest)),
        attention=render_attention(evaluated, int(hardest[0])),
        environments=render_environments(folder),
        config=page.table(settings),
    )


def render_confusion(evaluated: Evaluated) -> str:
    """Renders the confusion matrix, and images of the most confused pairs of classes."""
    predictions, names, matrix = evaluated.predictions, evaluated.names, ""
    if len(names) <= MAX_MATRIX:
        matrix = "<p>Rows are labels, columns are predictions.</p>"
        matrix += page.matrix(confusion(predictions, len(names)), names)
    groups = []
    for label, predicted, count in most_confused(predictions, 8):
        of_pair = np.flatnonzero(
            (predictions.label == label) & (predictions.predicted == predicted)
        )
        of_pair = of_pair[np.argsort(-predictions.confidence[of_pair], kind="stable")][:3]
        total = int((predictions.label == label).sum())
        heading = f"{names[label]} predicted as {names[predicted]}: {count} of {total} images"
        pair = page.images(map(evaluated.figure, of_pair))
        groups.append(f"<div><p>{page.text(heading)}</p>{pair}</div>")
    return matrix + (page.images(groups, "groups") if groups else "<p>No mistakes.</p>")


def render_attention(evaluated: Evaluated, hardest: int) -> str:
    """Renders a row of heatmaps for the image with the largest loss and for some others."""
    labels = evaluated.predictions.label
    others = np.linspace(0, len(labels) - 1, TRACED, dtype=int)[: TRACED - 1]
    chosen = list(dict.fromkeys([hardest, *others.tolist()]))
    pixels = np.stack([evaluated.pixels(i) for i in chosen])
    rows = []
    for i, trace in zip(chosen, attention.trace_attention(evaluated.found, pixels), strict=True):
        depth = len(trace.outer_attention)
        reached = trace.rollout_maps()
        label = evaluated.names[labels[i]]
        cells = [page.image(trace.pixels, f"label: {page.text(label)}", f"image of class {label}")]
        for block in sorted({0, (depth - 1) // 2, depth - 1}):
            heatmap = figures.overlay_heatmap(trace.pixels, reached[block])
            cells.append(page.image(heatmap, f"after block {block + 1}", "attention rollout"))
        if trace.words:
            last = max(trace.words)
            words = attention.words_in_place(trace.words[last], trace.grid_of(last))
            (colors,) = attention.principal_colors([words])
            colors = np.rint(255 * colors).astype(np.uint8)
            cells.append(page.image(colors, f"words, block {last + 1}", "principal components"))
        rows.append(page.images(cells, "row"))
    return "\n".join(rows)


def render_environments(folder: pathlib.Path) -> str:
    """Renders the environments of the run, in the order of its starts."""
    parts = [
        f"<p>From step {start['step']:,}, {page.text(start['time'])}</p>"
        + page.table(start["environment"].items())
        for start in workdir.read_environments(folder)
    ]
    return "\n".join(parts) or "<p>Unknown: the workdir has no environment.json.</p>"


# ------------------------------------------------------------------------------------ predictions


class Predictions(NamedTuple):
    """Predictions for K readable images, in the order of the split."""

    record: np.ndarray  # int [K], index in the split
    label: np.ndarray  # int [K]
    predicted: np.ndarray  # int [K]
    confidence: np.ndarray  # float [K], probability of the predicted class
    loss: np.ndarray  # float [K], cross-entropy
    rank: np.ndarray  # int [K], number of classes more probable than the label

    @property
    def correct(self) -> np.ndarray:
        return self.predicted == self.label

    def calibration_sums(self) -> np.ndarray:
        return calibration_sums(self.confidence, self.correct)


def collect_predictions(experiment, model, variables) -> Predictions:
    """Returns the predictions of a network on the evaluation split of `experiment`.

    Raises:
        RunError: no image can be read, or a prediction is not finite.
    """
    predict_step = jax.jit(experiment.make_predict_step(model))
    parts, begin = [], 0
    for batch in experiment.data.eval_batches():
        probabilities = np.asarray(predict_step(variables, batch["image"]), np.float64)
        rows = np.flatnonzero(batch["mask"])
        labels, probabilities = batch["label"][rows], probabilities[rows]
        own = np.take_along_axis(probabilities, labels[:, None], axis=1)
        parts.append(
            Predictions(
                begin + rows,
                labels,
                probabilities.argmax(axis=1),
                probabilities.max(axis=1),
                -np.log(np.maximum(own[:, 0], 1e-30)),
                (probabilities > own).sum(axis=1),
            )
        )
        begin += len(batch["mask"])
    predictions = Predictions(*map(np.concatenate, zip(*parts, strict=True)))
    if not len(predictions.label):
        raise RunError("no image could be evaluated")
    if not np.isfinite(predictions.confidence).all():
        raise RunError("a prediction is not finite: these weights are not usable")
    return predictions


def confusion(predictions: Predictions, classes: int) -> np.ndarray:
    """Returns the confusion matrix [classes, classes]: rows are labels, columns predictions."""
    pairs = predictions.label * classes + predictions.predicted
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def most_confused(predictions: Predictions, limit: int) -> list[tuple[int, int, int]]:
    """Returns (label, predicted, number of images) of the most frequent mistakes."""
    wrong = np.flatnonzero(~predictions.correct)
    pairs = np.stack([predictions.label[wrong], predictions.predicted[wrong]], axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:limit]
    return [(int(found[i][0]), int(found[i][1]), int(counts[i])) for i in order]
