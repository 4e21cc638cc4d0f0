# SPDX-License-Identifier: Apache-2.0
"""Checks every image of a data set: corrupt files, and images that training converts silently.

    tnt-flax check-data --config=tnt_s --config.data.root=IMAGENET
    tnt-flax check-data --config=tnt_s --config.data.root=IMAGENET \\
        --split=both --out=findings.jsonl

With --out, every finding is a line of JSON in that file, and an interrupted check resumes with the
same command. The last line on stdout is one JSON object with the number of findings of each kind.
Exit code 0 means that no image is corrupt, 1 that some are, 2 that the input was wrong.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import itertools
import json
import logging
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from tnt_flax.core.errors import InputError, RunError, as_input_error, one_line
from tnt_flax.core.files import as_unicode
from tnt_flax.data.images import (
    TIMM,
    CorruptImageError,
    EmptyFileError,
    HugeImageError,
    Policy,
    decode,
    open_image,
    unusual,
)
from tnt_flax.data.sources import Source, with_classes
from tnt_flax.tools.command_line import Parser

logger = logging.getLogger(__name__)
ON_INTERRUPT = "with --out, the same command resumes"
MEANING = {  # kinds of findings, in the order of the table
    "corrupt": 'stops training; with data.corrupt="skip", replaced by the next image',
    "empty": "zero bytes; also counted as corrupt",
    "huge": "more pixels than data.max_pixels; also counted as corrupt",
    "rotated": "EXIF orientation, which training ignores unless data.exif=true",
    "animated": "several frames; only the first is used",
    "16-bit": "more than 8 bits; grey above 255 is white unless data.deep_pixels is set",
    "cmyk": "converted to RGB without a color profile",
    "palette": "indexed colors; converted to RGB",
    "alpha": "hidden pixels become visible unless data.background is a color",
    "grey": "one channel; repeated three times",
    "small": "a side below 32 pixels",
}
SMALL = 32  # pixels
FEW = 10  # classes with fewer images are reported
SHOWN = 3  # examples per finding, and classes with the fewest and most images
CHUNK = 256  # records between two progress lines in the file
# Keys of config.data that do not affect the check.
OTHER_KEYS = ("image_size", "crop_fraction", "mean", "std", "corrupt", "threads", "workers")


def add_arguments(parser: Parser) -> None:
    parser.add_config()
    choices = ["train", "eval", "both"]
    parser.add_argument("--split", choices=choices, default="train", help="records to read")
    parser.add_argument("--out", metavar="FILE", help="file for all findings, as lines of JSON")


def run(args: argparse.Namespace) -> dict[str, Any]:
    return check_data(args.config, args.split, args.out)


def failed(result: dict[str, Any]) -> bool:
    return result["corrupt"] > 0


def check_data(config: ConfigDict, split: str = "train", out: str | None = None) -> dict[str, Any]:
    """Checks one split or both and prints a table for each; returns the counts over all splits.

    Raises:
        InputError: the config, the data set as a whole or `out` is wrong.
    """
    from tnt_flax.training.experiment import Experiment

    experiment = Experiment(config)
    splits = ("train", "eval") if split == "both" else (split,)
    sources = {
        name: experiment.data.open_source(config.data[f"{name}_split"], evaluation=name == "eval")
        for name in splits
    }
    if split == "both" and not experiment.data.is_multi_label(sources["train"]):
        try:
            with_classes(sources["eval"], sources["train"].class_names)
        except InputError as error:  # which ends a training run, but not this check
            logger.warning("%s", error)
    checked = {key: value for key, value in config.data.items() if key not in OTHER_KEYS}
    checked["records"] = {name: len(source) for name, source in sources.items()}
    file, earlier = open_findings(out, checked) if out else (None, [])
    totals = collections.Counter({"images": 0, "classes": 0})
    with file or contextlib.nullcontext():
        for name, source in sources.items():
            lines = [line for line in earlier if line["split"] == name]
            start = lines[-1]["checked"] if lines else 0
            for chunk in check_records(source, start, config.data.threads, experiment.data.policy):
                if file:
                    append(file, [{"split": name} | line for line in chunk])
                lines += chunk
            totals["images"] += len(source)
            totals["classes"] = max(totals["classes"], len(source.class_names))
            totals.update(summarize(lines, source, config.data[f"{name}_split"]))
    return dict(totals) | ({"out": str(file.name)} if file else {})


def summarize(lines: list[dict[str, Any]], source: Source, split: str) -> dict[str, int]:
    """Prints a table of the findings in a split; returns the number of each kind."""
    names = list(map(as_unicode, source.class_names))
    images = np.zeros(len(names), int)
    for line in lines:
        for label, count in line.get("labels", {}).items():
            images[int(label)] += count
    none, few = int((images == 0).sum()), int(((images > 0) & (images < FEW)).sum())
    found = collections.Counter(line.get("finding") for line in lines)

    print(f"{split}: {len(source):,} images, {len(names):,} classes\n")
    print(f"{'finding':<10}{'images':>9}  meaning")
    for kind, meaning in MEANING.items():
        print(f"{kind:<10}{found[kind]:>9,}  {meaning}")
        examples = (line for line in lines if line.get("finding") == kind)
        for line in itertools.islice(examples, SHOWN):
            print(f"    {line['name']}: {line['detail']}")
        if found[kind] > SHOWN:
            print("    ...")
    order = np.argsort(images, kind="stable")
    fewest, most = (
        ", ".join(f"{names[label]} {images[label]:,}" for label in labels[:SHOWN])
        for labels in (order, order[::-1])
    )
    print(f"\nclasses without images: {none:,}\nclasses with fewer than {FEW} images: {few:,}")
    print(f"fewest images: {fewest}\nmost images: {most}\n")
    counts = {kind: found[kind] for kind in MEANING}
    return counts | {"classes_with_none": none, "classes_with_few": few}


def check_records(
    source: Source, start: int, threads: int, policy: Policy
) -> Iterator[list[dict[str, Any]]]:
    """Yields the findings of the records from `start` on, in chunks that end with the progress."""
    check = functools.partial(check_record, source, policy)
    bar = tqdm(total=len(source), initial=start, unit="image", disable=None, file=sys.stderr)
    with bar, concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for begin in range(start, len(source), CHUNK):
            end = min(begin + CHUNK, len(source))
            labels: collections.Counter[int] = collections.Counter()
            lines = []
            for label, found in pool.map(check, range(begin, end)):
                lines += found
                labels.update(() if label is None else (label,))
                bar.update()
            yield [*lines, {"checked": end, "labels": labels}]


def check_record(
    source: Source, policy: Policy, index: int
) -> tuple[int | None, list[dict[str, Any]]]:
    """Returns label and findings of a record. The label is None if the record cannot be read."""
    label, class_name = None, None
    try:
        image, label = source[index]
        class_name = source.class_names[label]
        found = inspect_image(image, policy)
    except OSError as error:  # the file vanished, the disk failed
        found = {"corrupt": f"cannot be read: {error.strerror or error}"}
    about = {"index": index, "name": as_unicode(source.name_of(index)), "class": class_name}
    return label, [about | {"finding": kind, "detail": text} for kind, text in found.items()]


def inspect_image(image: bytes | np.ndarray, policy: Policy = TIMM) -> dict[str, str]:
    """Returns the findings about an image: kind -> detail."""
    found = {}
    try:
        opened = open_image(image, policy)
        found = unusual(opened)
        width, height = decode(opened, policy).size
    except CorruptImageError as error:
        found["corrupt"] = str(error)
        if kind := {EmptyFileError: "empty", HugeImageError: "huge"}.get(type(error)):
            found[kind] = str(error)
        return found
    if min(width, height) < SMALL:
        found["small"] = f"{width} x {height} pixels"
    return found


# ------------------------------------------------------------------------------ the findings file

KEY = "findings_of"  # in the first line


def open_findings(out: str, data: dict[str, Any]) -> tuple[BinaryIO, list[dict[str, Any]]]:
    """Opens a file of findings and progress for appending, so that an interrupted check resumes.

    The first line describes the data. Lines after the last progress line ("checked") are from an
    interrupted chunk: they are dropped and the chunk is checked again.

    Args:
        out: the file.
        data: description of the data. If the file has another one, the check restarts.

    Returns:
        The file, and its lines up to the last progress line.

    Raises:
        InputError: the file cannot be written, or it exists and has no findings.
    """
    path = pathlib.Path(out).expanduser()
    with as_input_error(f"cannot write --out={out}"):
        file = open(path, "a+b")
    file.seek(0)
    lines, first, kept = file.readlines(), _encode({KEY: data}), []
    if lines[:1] == [first]:
        whole = (i for i, line in enumerate(lines) if line.endswith(b"\n"))
        progress = [i for i in whole if b'"checked": ' in lines[i]]
        kept = lines[: max(progress, default=0) + 1]
    elif lines and not first.startswith(lines[0]):  # else interrupted in the first line
        if KEY.encode() not in lines[0]:
            file.close()
            raise InputError(f"--out={out} exists and has no findings: choose another file")
        logger.info(f"{path} is of another data set or config: restarting")
    file.truncate(sum(map(len, kept)))
    if not kept:
        append(file, [{KEY: data}])
    return file, [json.loads(line) for line in kept[1:]]


def append(file: BinaryIO, lines: list[dict[str, Any]]) -> None:
    """Appends lines of JSON. Raises RunError if the file cannot be written."""
    try:
        file.write(b"".join(map(_encode, lines)))
        file.flush()
    except OSError as error:
        raise RunError(f"cannot write {file.name}: {one_line(error)}") from None


def _encode(line: dict[str, Any]) -> bytes:
    return (as_unicode(json.dumps(line, ensure_ascii=False)) + "\n").encode()
