# SPDX-License-Identifier: Apache-2.0
"""Classifies images with weights of any framework: class names and probabilities.

    tnt-flax predict tnt_s_81.5.pth.tar cat.jpg holiday/ 'more/*.png'
    tnt-flax predict runs/pets photos/ --features --out=features.parquet
    tnt-flax predict runs/tags photos/ --threshold=0.5 --out=predictions.csv
    tnt-flax predict runs/teacher train/ --logits=logits.safetensors

A path is a file, a folder (with all images below it), a pattern, or - for a list of files on stdin.
Images are preprocessed as in evaluation. The last line on stdout is one JSON object. Exit code 1
means that no image could be read, 2 that the input was wrong.
"""

import argparse
import contextlib
import glob
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

import numpy as np

from tnt_flax.core.errors import InputError, RunError, as_input_error, printable
from tnt_flax.core.files import as_unicode, open_table
from tnt_flax.data.images import log_left_out
from tnt_flax.data.labels import SEPARATOR
from tnt_flax.data.sources.names import images_below, natural_key, read_lines
from tnt_flax.data.stored_logits import open_logits
from tnt_flax.runtime import host
from tnt_flax.tools.command_line import Parser, policy_arguments, weights_arguments

STDIN = "-"
ON_INTERRUPT = "nothing was written"


def add_arguments(parser: Parser) -> None:
    parser.add_weights()
    add = parser.add_argument
    add("paths", metavar="PATH", nargs="+", help="a file, a folder, a pattern, or - for stdin")
    add("--top", type=int, default=5, help="predictions per image")
    text = "all classes of an image with a greater probability"
    add("--threshold", type=float, metavar="P", help=text)
    add("--out", type=pathlib.Path, help="table to write: .csv, .jsonl or .parquet")
    add("--batch-size", type=int, default=64, help="images per batch")
    add("--threads", type=int, default=8, help="threads that decode images")
    add("--class-list", help="file with one class name per line")
    add("--features", action="store_true", help="write feature vectors instead of predictions")
    text = "write logits instead, for distillation: a .safetensors file"
    add("--logits", type=pathlib.Path, metavar="FILE", help=text)
    parser.add_policy()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints or writes the predictions; returns the numbers of images and of unreadable ones.

    Raises:
        InputError: a path that is not there, a folder without images, a table of another kind, or
            weights that `load_classifier` refuses.
    """
    from tnt_flax.inference.classifier import load_classifier

    if args.features and not args.out:
        raise InputError("--features needs a table: --out=FILE.parquet, .jsonl or .csv")
    if args.logits and (args.out or args.features or args.threshold is not None):
        raise InputError("--logits writes nothing else: leave out --out, --features, --threshold")
    out = args.out or args.logits
    with contextlib.ExitStack() as stack:
        if args.out:
            write_row = stack.enter_context(open_table(args.out, columns(args)))
        files = find_images(args.paths, sys.stdin)
        host.cache_compilations()
        classifier = load_classifier(
            **weights_arguments(args), **policy_arguments(args), class_list=args.class_list
        )
        counts = {"images": 0, "unreadable": 0}
        outcomes, write = with_progress(outcomes_of(classifier, files, args), len(files))
        if args.logits:
            shape = files, classifier.model.num_classes
            names = classifier.class_names if args.class_list else classifier.stored_class_names
            store_row = stack.enter_context(open_logits(args.logits, *shape, names))
        for file, (result, error) in zip(map(as_unicode, files), outcomes, strict=True):
            counts["unreadable" if error else "images"] += 1
            if error:
                named = as_unicode(error if file in as_unicode(error) else f"{file}: {error}")
                write(printable(f"left out: {named}"), file=sys.stderr)
            if args.logits:
                store_row(result)
            elif args.out:
                write_row({"image": file, "error": error} | row_of(result, error, args))
            elif not error:
                write(printable(f"{file}: {as_text(result)}"), file=sys.stdout)
        if not counts["images"] and out:
            raise RunError(f"no image could be read: {ON_INTERRUPT}")
    return counts | ({"out": str(out)} if out else {})


def outcomes_of(classifier: Any, files: list[str], args: argparse.Namespace) -> Iterable[Any]:
    """Returns an iterable of (result, error) for each file."""
    reading = dict(batch_size=args.batch_size, threads=args.threads)
    if args.features:
        return classifier.feature_outcomes(files, **reading)
    if args.logits:
        return classifier.logit_outcomes(files, **reading)
    return classifier.outcomes(files, args.top, threshold=args.threshold, **reading)


def with_progress(items: Iterable[Any], total: int) -> tuple[Iterable[Any], Callable[..., None]]:
    """Returns `items` with a progress bar, if tqdm is installed, and what prints beside the bar."""
    if importlib.util.find_spec("tqdm") is None:
        return items, print
    from tqdm import tqdm

    return tqdm(items, total=total, unit="image", disable=None, file=sys.stderr), tqdm.write


def failed(result: dict[str, Any]) -> bool:
    return not result["images"]


def columns(args: argparse.Namespace) -> dict[str, type]:
    """Returns name and type of each column of the table."""
    found = {"image": str, "error": str}
    if args.features:
        return found | {"features": np.ndarray}
    if args.threshold is not None:
        return found | {"label": str, "probabilities": np.ndarray}
    for rank in range(1, args.top + 1):
        found |= {f"label_{rank}": str, f"probability_{rank}": float, f"index_{rank}": int}
    return found


def row_of(result: Any, error: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the values of the columns for an image, except for its name and the error."""
    if args.features:
        return {"features": result}
    if args.threshold is None:
        return ranked(result)
    if error:
        return {}
    probabilities = np.array([each.probability for each in result], np.float32)
    label = SEPARATOR.join(each.label for each in result) or SEPARATOR
    return {"label": label, "probabilities": probabilities}


def as_text(predictions: Iterable[Any]) -> str:
    return "  ".join(f"{a.label} {a.probability:.1%}" for a in predictions) or "no class"


def ranked(predictions: Iterable[Any]) -> dict[str, Any]:
    """Returns the values of the columns of predictions."""
    values = {}
    for rank, prediction in enumerate(predictions, start=1):
        values |= {f"{field}_{rank}": value for field, value in prediction._asdict().items()}
    return values


def find_images(paths: Iterable[str], stdin: TextIO) -> list[str]:
    """Returns the files that `paths` match, in order; the files of a folder in natural order.

    Files given by name may have any suffix; in folders, only files with an image suffix match.
    Raises InputError for a path without a match.
    """
    files: list[str] = []
    for path in paths:
        if path == STDIN:
            data = stdin.buffer.read()  # NUL ends a name after `find -print0`
            found = read_lines(data.replace(b"\0", b"\n"), "surrogateescape")
        elif os.path.isdir(path):
            found = _below(path)
        elif os.path.exists(path):
            found = [path]
        else:
            matches = sorted(glob.glob(os.path.expanduser(path), recursive=True), key=natural_key)
            found = [f for m in matches for f in (_below(m) if os.path.isdir(m) else [m])]
        if not found:
            if path == STDIN:
                raise InputError("there is no file name on stdin: one per line")
            what = "has no images" if os.path.isdir(path) else "does not exist"
            raise InputError(f"{path} {what}: give image files, folders of them, or patterns")
        files += found
    return files


def _below(folder: str) -> list[str]:
    with as_input_error(f"cannot read {folder}"):
        found, left_out = images_below(folder)
    log_left_out(left_out, folder)
    return [os.path.join(folder, file) for file in found]
