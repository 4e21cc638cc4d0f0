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
import functools
import json
import logging
import pathlib
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError, RunError
from tnt_flax.core.files import write_atomic
from tnt_flax.data.labels import readable_names
from tnt_flax.runtime import host
from tnt_flax.tools.command_line import Parser

logger = logging.getLogger(__name__)
ON_INTERRUPT = "no report was written"
SHOWN = 16  # images with the largest loss
TRACED = 4  # images whose attention is shown
MAX_MATRIX = 20  # classes in a confusion matrix


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("workdir", metavar="WORKDIR", type=pathlib.Path, help="folder of a run")
    add("--out", type=pathlib.Path, help="default: WORKDIR/report.html")
    add("--checkpoint", choices=["best", "last"], default="best", help="which one predictions")
    add("--data-root", help="overrides data.root of the config")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the report; returns the JSON object of the last line.

    Raises:
        InputError: WORKDIR is not a workdir, its data are missing, or `out` is wrong.
        RunError: no image could be evaluated, or the report cannot be written.
    """
    from tnt_flax.runtime import workdir
    from tnt_flax.training import metrics
    from tnt_flax.training.evaluate import calibration_error, calibration_sums
    from tnt_flax.training.experiment import Experiment
    from tnt_flax.weights.read import read_checkpoint

    stored = workdir.read_config(args.workdir)
    if stored is None:
        raise InputError(f"{args.workdir} is not a workdir: it has no config.json")
    out = args.out or args.workdir / "report.html"
    if out.suffix != ".html" or not out.parent.is_dir():
        raise InputError(f"--out={out}: give a file that ends in .html, in a folder that exists")
    host.cache_compilations()
    config = workdir.config_from_json(stored)
    if args.data_root is not None:
        config.data.root = args.data_root
    found = read_checkpoint(args.workdir, weights=config.eval.weights, checkpoint=args.checkpoint)
    experiment = Experiment(config)
    source = experiment.eval_source
    if found.class_names != tuple(source.class_names):
        raise InputError(
            f"{found.path} was trained on other classes than {config.data.root or 'the data'} has"
        )
    logger.info(f"evaluating {found.summary()} on {len(source)} images")
    predictions = collect_predictions(experiment, found.network.model, found.variables)
    lines = metrics.read_metrics_file(args.workdir / "metrics.jsonl")
    summary = {
        "top1": float(predictions.correct.mean()),
        "top5": float((predictions.rank < 5).mean()),
        "loss": float(predictions.loss.mean()),
        "calibration_error": calibration_error(
            calibration_sums(predictions.confidence, predictions.correct)
        ),
        "images": len(predictions.label),
    }
    page = make_page(args.workdir, config, stored, found, source, predictions, lines, summary)
    try:
        write_atomic(out, page)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}") from None
    return {"out": str(out), **summary, "checkpoint": found.path}


def make_page(folder, config, stored, found, source, predictions, lines, summary) -> str:
    from tnt_flax.tools import figures, page
    from tnt_flax.training import plots
    from tnt_flax.training.evaluate import calibration_sums

    names = readable_names(source.class_names)
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    title = f"{config.model.name} on {config.data.name or config.data.source}"
    kind = {"ema": "EMA", "raw": "raw"}[found.weights]
    render = functools.partial(render_image, config, source, predictions, names)
    hardest = np.argsort(-predictions.loss, kind="stable")[:SHOWN]
    sums = calibration_sums(predictions.confidence, predictions.correct)
    curves = []
    if lines:
        curves = [
            "<h2>Curves</h2>",
            page.plot_svg(lambda p: plots.plot_curves(lines, p), "Curves"),
        ]
    parts = [
        f"<h1>{page.text(title)}</h1>",
        f'<p class="soft">{page.text(folder.resolve().name)}: {kind} weights of '
        f"{page.text(found.file_format)}, reported {today}</p>",
        page.facts(
            {
                "top-1": f"{summary['top1']:.2%}",
                "top-5": f"{summary['top5']:.2%}",
                "loss": f"{summary['loss']:.4f}",
                "calibration error": f"{summary['calibration_error']:.2%}",
                "evaluation images": f"{summary['images']:,}",
                "parameters": f"{found.num_params / 1e6:.2f} M",
            }
        ),
        *curves,
        *confusions(predictions, names, render),
        "<h2>Calibration</h2>",
        f"<p>Expected calibration error {summary['calibration_error']:.2%}, in 15 bins.</p>",
        page.plot_svg(lambda p: figures.plot_calibration(sums, p), "Calibration"),
        "<h2>Largest losses</h2>",
        "<p>Images whose label has the lowest probability.</p>",
        page.images(map(render, hardest)),
        "<h2>Attention and features</h2>",
        "<p>Attention rollout (brighter patches have a larger share in the head's input) and the "
        "words after the last block (three principal components as colors), for the image with "
        "the largest loss and some others.</p>",
        *attention(found, config, source, predictions, hardest, names),
        "<h2>Environment</h2>",
        *environments(folder),
        "<h2>Config</h2>",
        f"<details><summary>all keys</summary>{page.table(flat(stored))}</details>",
    ]
    return page.page(f"{title}, {config.data.image_size} pixels", parts)


def render_image(config, source, predictions, names, i: int) -> str:
    """Renders image `i` with its predicted class, and its label if that differs."""
    from tnt_flax.tools import page

    prediction = f"{names[predictions.predicted[i]]} {predictions.confidence[i]:.0%}"
    if predictions.correct[i]:
        caption = f'<span class="right">{page.text(prediction)}</span>'
    else:
        caption = f'<span class="wrong">{page.text(prediction)}</span><br>label: '
        caption += page.text(names[predictions.label[i]])
    pixels = image_of(config, source, int(predictions.record[i]))
    return page.image(pixels, caption, source.name_of(int(predictions.record[i])))


def confusions(predictions, names, render) -> list[str]:
    """Renders the confusion matrix, and images of the most confused pairs of classes."""
    from tnt_flax.tools import page

    parts = ["<h2>Confusion</h2>"]
    if len(names) <= MAX_MATRIX:
        parts += [
            "<p>Rows are labels, columns are predictions.</p>",
            page.matrix(confusion(predictions, len(names)), names),
        ]
    groups = []
    for label, predicted, count in most_confused(predictions, 8):
        of_pair = np.flatnonzero(
            (predictions.label == label) & (predictions.predicted == predicted)
        )
        of_pair = of_pair[np.argsort(-predictions.confidence[of_pair], kind="stable")][:3]
        heading = f"{names[label]} predicted as {names[predicted]}: {count} of "
        heading += f"{int((predictions.label == label).sum())} images"
        groups.append(f"<div><p>{page.text(heading)}</p>{page.images(map(render, of_pair))}</div>")
    return [*parts, page.images(groups, "groups") if groups else "<p>No mistakes.</p>"]


def attention(found, config, source, predictions, hardest, names) -> list[str]:
    """Renders a row of heatmaps for each of a few images."""
    from tnt_flax.tools import attention as tracing
    from tnt_flax.tools import figures, page

    others = np.linspace(0, len(predictions.label) - 1, TRACED, dtype=int)[: TRACED - 1]
    chosen = list(dict.fromkeys([int(hardest[0]), *others.tolist()]))
    pixels = np.stack([image_of(config, source, int(predictions.record[i])) for i in chosen])
    rows = []
    for i, trace in zip(chosen, tracing.trace_attention(found, pixels), strict=True):
        depth = len(trace.outer_attention)
        reached = trace.rollout_maps()
        label = page.text(names[predictions.label[i]])
        cells = [page.image(trace.pixels, f"label: {label}", f"image of class {label}")]
        for block in sorted({0, (depth - 1) // 2, depth - 1}):
            lit = figures.overlay_heatmap(trace.pixels, reached[block])
            cells.append(page.image(lit, f"after block {block + 1}", "attention rollout"))
        if trace.words:
            last = max(trace.words)
            words = tracing.words_in_place(trace.words[last], trace.grid_of(last))
            (colors,) = tracing.principal_colors([words])
            colors = np.rint(255 * colors).astype(np.uint8)
            cells.append(page.image(colors, f"words, block {last + 1}", "principal components"))
        rows.append(page.images(cells, "row"))
    return rows


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


def collect_predictions(experiment, model, variables) -> Predictions:
    """Returns the predictions of a network on the evaluation split of `experiment`.

    Raises:
        RunError: no image can be read, or a prediction is not finite.
    """
    import jax

    predict_step = jax.jit(experiment.make_predict_step(model))
    parts, begin = [], 0
    for batch in experiment.eval_batches():
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


# -------------------------------------------------------------------------------------- the page


def image_of(config: ConfigDict, source, record: int) -> np.ndarray:
    """Returns the image of a record after the evaluation transform, uint8 [S, S, 3]."""
    from tnt_flax.data.transforms import eval_transform

    image, _ = source[record]
    data = config.data
    return eval_transform(image, size=data.image_size, crop_fraction=data.crop_fraction)


def environments(folder: pathlib.Path) -> list[str]:
    """Renders the environments of the run, in the order of its starts."""
    from tnt_flax.runtime.workdir import read_environments
    from tnt_flax.tools import page

    starts = read_environments(folder)
    if not starts:
        return ["<p>Unknown: the workdir has no environment.json.</p>"]
    parts = []
    for start in starts:
        parts += [
            f"<p>From step {start['step']:,}, {page.text(start['time'])}</p>",
            page.table(start["environment"].items()),
        ]
    return parts


def flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Returns (key, value) of every key that is set, such as ("data.image_size", "224")."""
    rows = []
    for key, value in config.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((prefix + key, json.dumps(value)))
    return rows
