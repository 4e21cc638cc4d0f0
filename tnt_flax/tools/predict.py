# SPDX-License-Identifier: Apache-2.0
"""Classifies images with weights of any framework: class names and probabilities.

    tnt-flax predict tnt_s_81.5.pth.tar cat.jpg holiday/ 'more/*.png'
    find photos -name '*.jpg' | tnt-flax predict runs/pets - --out=predictions.csv

A path is a file, a folder (with all images below it), a pattern, or - for a list of files on stdin.
Images are preprocessed as in the evaluation of the weights. Unreadable images are reported and
left out. The last line on stdout is one JSON object. Exit code 1 means that no image could be read,
2 that the input was wrong.
"""

import argparse
import contextlib
import glob
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

from tnt_flax.core.errors import InputError, RunError
from tnt_flax.core.files import open_table
from tnt_flax.data.images import is_image
from tnt_flax.data.sources.names import natural_key
from tnt_flax.runtime import host
from tnt_flax.tools.command_line import Parser, add_weights_options, weights_arguments

STDIN = "-"
ON_INTERRUPT = "no table was written"


def add_arguments(parser: Parser) -> None:
    add_weights_options(parser)
    add = parser.add_argument
    add("paths", metavar="PATH", nargs="+", help="a file, a folder, a pattern, or - for stdin")
    add("--top", type=int, default=5, help="predictions per image")
    add("--out", type=pathlib.Path, help="table to write: .csv, .jsonl or .parquet")
    add("--batch-size", type=int, default=64, help="images per batch")
    add("--threads", type=int, default=8, help="threads that decode images")
    add("--class-list", help="file with one class name per line")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints or writes the predictions; returns the numbers of images and of unreadable ones.

    Raises:
        InputError: a path that is not there, a folder without images, a table of another kind, or
            weights that `load_classifier` refuses.
    """
    from tnt_flax.inference.classifier import load_classifier

    table = open_table(args.out, columns(args.top)) if args.out else contextlib.nullcontext()
    with table as write_row:
        files = find_images(args.paths, sys.stdin)
        host.cache_compilations()
        classifier = load_classifier(**weights_arguments(args), class_list=args.class_list)
        counts = {"images": 0, "unreadable": 0}
        outcomes = classifier.outcomes(files, args.top, args.batch_size, args.threads)
        outcomes, write = with_progress(outcomes, len(files))
        for file, (predictions, error) in zip(map(as_text, files), outcomes, strict=True):
            counts["unreadable" if error else "images"] += 1
            if error:
                write(f"left out: {error}", file=sys.stderr)
            if write_row:
                write_row(row(file, predictions, error))
            elif not error:
                text = "  ".join(f"{a.label} {a.probability:.1%}" for a in predictions)
                write(f"{file}: {text}", file=sys.stdout)
        if not counts["images"] and write_row:
            raise RunError("no image could be read: no table was written")
    return counts | ({"out": str(args.out)} if args.out else {})


def with_progress(items: Iterable[Any], total: int) -> tuple[Iterable[Any], Callable[..., None]]:
    """Returns `items` with a progress bar, if tqdm is installed, and what prints beside the bar."""
    if importlib.util.find_spec("tqdm") is None:
        return items, print
    from tqdm import tqdm

    return tqdm(items, total=total, unit="image", disable=None, file=sys.stderr), tqdm.write


def failed(result: dict[str, Any]) -> bool:
    return not result["images"]


def as_text(file: str) -> str:
    """Returns a printable file name: names need not be valid Unicode."""
    return os.fsencode(file).decode("utf-8", "replace")


def columns(top: int) -> dict[str, type]:
    """Returns name and type of each column of the table."""
    ranked = {}
    for rank in range(1, top + 1):
        ranked |= {f"label_{rank}": str, f"probability_{rank}": float, f"index_{rank}": int}
    return {"image": str, "error": str} | ranked


def row(file: str, predictions: Iterable[Any], error: str | None) -> dict[str, Any]:
    values = {"image": file, "error": error}
    for rank, prediction in enumerate(predictions, start=1):
        values |= {f"{field}_{rank}": value for field, value in prediction._asdict().items()}
    return values


def find_images(paths: Iterable[str], stdin: Iterable[str]) -> list[str]:
    """Returns the files that `paths` match, in order; the files of a folder in natural order.

    Files given by name may have any suffix; in folders, only files with an image suffix match.
    Raises InputError for a path without a match.
    """
    files: list[str] = []
    for path in paths:
        if path == STDIN:
            found = [line.rstrip("\n") for line in stdin if line.strip()]
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
    found = []
    for directory, subfolders, names in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [os.path.join(directory, name) for name in names if is_image(name)]
    return sorted(found, key=natural_key)
