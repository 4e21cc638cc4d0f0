# SPDX-License-Identifier: Apache-2.0
"""Writes a page about a training run: report.html, which stands alone and opens from disk.

    python -m tnt_flax.tools.report runs/digits
    python -m tnt_flax.tools.report runs/tnt_s --data-root=IMAGENET --out=tnt_s.html

Curves, the confusion matrix, calibration, the hardest images and the most frequent mistakes of the
evaluation split, what of some images reaches the head, the environment, the config. The best
checkpoint answers, with the weights that the config evaluates. The last line on stdout is one JSON
object. Exit code 1 is a report that cannot be made, 2 is bad input.
"""

import datetime
import json
import pathlib
import sys
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError, RunError
from tnt_flax.core.files import write_atomic
from tnt_flax.data.labels import readable_names
from tnt_flax.runtime import host
from tnt_flax.tools.command_line import Parser, run

SHOWN = 16  # images of a kind
LOOKED_AT = 4  # images of which attention is shown
MATRIX = 20  # classes: of more, only the mistakes are listed


def make_parser() -> Parser:
    parser = Parser("python -m tnt_flax.tools.report", __doc__)
    add = parser.add_argument
    add("workdir", metavar="WORKDIR", type=pathlib.Path, help="the folder of a run")
    add("--out", type=pathlib.Path, help="the page; WORKDIR/report.html by default")
    add("--checkpoint", choices=["best", "last"], default="best", help="which one answers")
    add("--data-root", help="where the data are now, if not where they were")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run(make_parser(), report, argv, on_interrupt="no report was written")


def report(args: Any) -> dict[str, Any]:
    """Writes the page; returns what the JSON line says.

    Raises:
        InputError: there is no run, its data are not there, or the page cannot be written.
        RunError: no image could be evaluated, or the page cannot be written.
    """
    from tnt_flax.runtime import workdir
    from tnt_flax.tools import predictions as answering
    from tnt_flax.training import metrics
    from tnt_flax.training.evaluate import calibration_error, calibration_sums
    from tnt_flax.training.experiment import Experiment
    from tnt_flax.weights.read import read_checkpoint

    stored = workdir.read_config(args.workdir)
    if stored is None:
        raise InputError(f"{args.workdir} is no workdir of a run: it has no config.json")
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
    print(f"evaluating {found.summary()} on {len(source)} images", file=sys.stderr)
    answers = answering.collect(experiment, found.network.model, found.variables)
    lines = metrics.read_metrics_file(args.workdir / "metrics.jsonl")
    summary = {
        "top1": float(answers.right.mean()),
        "top5": float((answers.rank < 5).mean()),
        "loss": float(answers.loss.mean()),
        "calibration_error": calibration_error(calibration_sums(answers.confidence, answers.right)),
        "images": len(answers.label),
    }
    page = make_page(args.workdir, config, stored, found, source, answers, lines, summary)
    try:
        write_atomic(out, page)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}") from None
    return {"out": str(out), **summary, "checkpoint": found.path}


def make_page(folder, config, stored, found, source, answers, lines, summary) -> str:
    from tnt_flax.tools import page
    from tnt_flax.tools import predictions as answering
    from tnt_flax.training import plots
    from tnt_flax.training.evaluate import calibration_sums

    names = readable_names(source.class_names)
    size = config.data.image_size
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    title = f"{config.model.name} on {config.data.name or config.data.source}"

    def shown(i: int) -> str:
        """The image of answer `i` with what the network says to it."""
        said = f"{names[answers.predicted[i]]} {answers.confidence[i]:.0%}"
        if answers.right[i]:
            caption = f'<span class="right">{page.text(said)}</span>'
        else:
            caption = f'<span class="wrong">{page.text(said)}</span><br>is '
            caption += page.text(names[answers.label[i]])
        pixels = image_of(config, source, int(answers.record[i]))
        return page.image(pixels, caption, source.name_of(int(answers.record[i])))

    hardest = np.argsort(-answers.loss, kind="stable")[:SHOWN]
    pairs = answering.most_confused(answers, 8)
    kind = {"ema": "averaged", "raw": "raw"}[found.weights]
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
    ]
    if lines:
        parts += [
            "<h2>Curves</h2>",
            page.drawing(lambda p: plots.plot_curves(lines, p), "Curves"),
        ]
    parts += ["<h2>Confusion</h2>"]
    if len(names) <= MATRIX:
        parts += [
            "<p>Rows are what the images are, columns what the network takes them for.</p>",
            page.matrix(answering.confusion(answers, len(names)), names),
        ]
    groups = []
    for label, predicted, count in pairs:
        of_pair = np.flatnonzero((answers.label == label) & (answers.predicted == predicted))
        of_pair = of_pair[np.argsort(-answers.confidence[of_pair], kind="stable")][:3]
        heading = f"{names[label]} taken for {names[predicted]}: {count} of "
        heading += f"{int((answers.label == label).sum())} images"
        groups.append(f"<div><p>{page.text(heading)}</p>{page.images(map(shown, of_pair))}</div>")
    parts += [
        page.images(groups, "groups") if groups else "<p>Not one mistake.</p>",
        "<h2>Calibration</h2>",
        f"<p>Expected calibration error {summary['calibration_error']:.2%}, in 15 bins.</p>",
        page.drawing(
            lambda p: plots.plot_calibration(
                calibration_sums(answers.confidence, answers.right), p
            ),
            "Calibration",
        ),
        "<h2>Hardest images</h2>",
        "<p>Those whose own class the network finds least likely.</p>",
        page.images(map(shown, hardest)),
        "<h2>What the network looks at</h2>",
        "<p>Of the hardest image and of some others: what has reached the head (attention "
        "rollout, bright where most), and the words after the last block (three principal "
        "components as colours).</p>",
        *attention(found, config, source, answers, hardest, names),
        "<h2>Environment</h2>",
        *environments(folder),
        "<h2>Config</h2>",
        f"<details><summary>all keys</summary>{page.table(flat(stored))}</details>",
    ]
    return page.page(f"{title}, {size} pixels", parts)


def attention(found, config, source, answers, hardest, names) -> list[str]:
    """A row of pictures for each of a few images."""
    from tnt_flax.tools import attention as look
    from tnt_flax.tools import page, pictures

    others = np.linspace(0, len(answers.label) - 1, LOOKED_AT, dtype=int)[: LOOKED_AT - 1]
    chosen = list(dict.fromkeys([int(hardest[0]), *others.tolist()]))
    pixels = np.stack([image_of(config, source, int(answers.record[i])) for i in chosen])
    rows = []
    for i, seen in zip(chosen, look.look(found, pixels), strict=True):
        depth = len(seen.outer_attention)
        reached = seen.reached()
        label = page.text(names[answers.label[i]])
        cells = [page.image(seen.pixels, f"is {label}", f"an image of {label}")]
        for block in sorted({0, (depth - 1) // 2, depth - 1}):
            lit = pictures.lit(seen.pixels, reached[block])
            cells.append(page.image(lit, f"after block {block + 1}", "attention rollout"))
        if seen.words:
            last = max(seen.words)
            words = look.words_in_place(seen.words[last], seen.grid_of(last))
            (colors,) = look.principal_colors([words])
            colors = np.rint(255 * colors).astype(np.uint8)
            cells.append(page.image(colors, f"words, block {last + 1}", "principal components"))
        rows.append(page.images(cells, "row"))
    return rows


def image_of(config: ConfigDict, source, record: int) -> np.ndarray:
    """The image of a record as the evaluation gives it to the network, uint8 [S, S, 3]."""
    from tnt_flax.data.transforms import eval_transform

    image, _ = source[record]
    data = config.data
    return eval_transform(image, size=data.image_size, crop_fraction=data.crop_fraction)


def environments(folder: pathlib.Path) -> list[str]:
    """What the run computed on, one after the other."""
    from tnt_flax.runtime.workdir import read_environments
    from tnt_flax.tools import page

    starts = read_environments(folder)
    if not starts:
        return ["<p>Unknown: this run has left no environment.json, as older ones have not.</p>"]
    parts = []
    for start in starts:
        parts += [
            f"<p>From step {start['step']:,} on, {page.text(start['time'])}</p>",
            page.table(start["environment"].items()),
        ]
    return parts


def flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """("data.image_size", "224"), ...: every key that is set."""
    rows = []
    for key, value in config.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((prefix + key, json.dumps(value)))
    return rows


if __name__ == "__main__":
    sys.exit(main())
