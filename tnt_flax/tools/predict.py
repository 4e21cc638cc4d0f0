# SPDX-License-Identifier: Apache-2.0
"""Classifies images by weights of any system: class names and probabilities.

    python -m tnt_flax.tools.predict tnt_s_81.5.pth.tar cat.jpg holiday/ 'more/*.png'
    find photos -name '*.jpg' | python -m tnt_flax.tools.predict runs/pets - --out=answers.csv

A path is a file, a folder (with all images below it), a pattern, or - for a list of files on stdin.
Images are prepared as in the evaluation of the weights. One that cannot be read is reported, and
the rest goes on. The last line on stdout is one JSON object. Exit code 1 means that not one image
could be read, 2 is bad input.
"""

import contextlib
import glob
import os
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from tnt_flax.core.errors import InputError, RunError
from tnt_flax.core.files import open_table
from tnt_flax.data.sources.names import is_image, natural_key
from tnt_flax.runtime import host
from tnt_flax.tools.command_line import Parser, add_weights_options, run, weights_arguments

STDIN = "-"


def make_parser() -> Parser:
    parser = Parser("python -m tnt_flax.tools.predict", __doc__)
    add_weights_options(parser)
    add = parser.add_argument
    add("paths", metavar="PATH", nargs="+", help="a file, a folder, a pattern, or - for stdin")
    add("--top", type=int, default=5, help="answers per image")
    add("--out", type=pathlib.Path, help="a table to write: .csv, .jsonl or .parquet")
    add("--batch-size", type=int, default=64, help="images at a time")
    add("--threads", type=int, default=8, help="that read and decode")
    add("--class-list", help="a file with the name of a class on each line")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run(
        make_parser(),
        predict,
        argv,
        on_interrupt="no table was written",
        failed=lambda result: not result["images"],
    )


def predict(args: Any) -> dict[str, Any]:
    """Prints or writes the answers; returns how many images there were, read and unreadable.

    Raises:
        InputError: a path that is not there, a folder without images, a table of another kind, or
            weights that `load_classifier` refuses.
    """
    from tnt_flax.inference.classifier import load_classifier

    with open_table(args.out, columns(args.top)) if args.out else contextlib.nullcontext() as table:
        files = find_images(args.paths, sys.stdin)
        host.cache_compilations()
        classifier = load_classifier(**weights_arguments(args), class_list=args.class_list)
        counts = {"images": 0, "unreadable": 0}
        outcomes = classifier.outcomes(files, args.top, args.batch_size, args.threads)
        bar = tqdm(total=len(files), unit="image", disable=None, file=sys.stderr)
        with bar:
            for file, (answers, error) in zip(map(as_text, files), outcomes, strict=True):
                counts["unreadable" if error else "images"] += 1
                if error:
                    bar.write(f"left out: {error}", file=sys.stderr)
                if table:
                    table.write(row(file, answers, error))
                elif not error:
                    said = "  ".join(f"{a.label} {a.probability:.1%}" for a in answers)
                    bar.write(f"{file}: {said}", file=sys.stdout)
                bar.update()
        if not counts["images"] and table:
            raise RunError("not one image could be read: no table was written")
    return counts | ({"out": str(args.out)} if args.out else {})


def as_text(file: str) -> str:
    """A file's name as it can be printed: names need not be Unicode."""
    return os.fsencode(file).decode("utf-8", "replace")


def columns(top: int) -> dict[str, type]:
    """Of the table: name and type."""
    ranked = {}
    for rank in range(1, top + 1):
        ranked |= {f"label_{rank}": str, f"probability_{rank}": float, f"index_{rank}": int}
    return {"image": str, "error": str} | ranked


def row(file: str, answers: Iterable[Any], error: str | None) -> dict[str, Any]:
    values = {"image": file, "error": error}
    for rank, answer in enumerate(answers, start=1):
        values |= {f"{field}_{rank}": value for field, value in answer._asdict().items()}
    return values


def find_images(paths: Iterable[str], stdin: Iterable[str]) -> list[str]:
    """The files that `paths` mean, in their order; those of a folder in natural order.

    Files that are named are taken whatever they are called, of a folder those that are called as
    images are. Raises InputError for a path that means no file at all.
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


if __name__ == "__main__":
    sys.exit(main())
