# SPDX-License-Identifier: Apache-2.0
"""Checks every image of a data set: corrupt files, and images that training converts silently.

    python -m tnt_flax.tools.check_data --config=configs/tnt_s.py --config.data.root=IMAGENET
    python -m tnt_flax.tools.check_data --config=configs/tnt_s.py --config.data.root=IMAGENET \\
        --split=both --out=findings.jsonl

With --out, every finding is a line of JSON in that file, and an interrupted check resumes with the
same command. The last line on stdout is one JSON object with the number of findings of each kind.
Exit code 0 means that no image is corrupt, 1 that some are, 2 that the input was wrong.
"""

import collections
import concurrent.futures
import contextlib
import io
import json
import logging
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from tnt_flax.core.errors import InputError, RunError, one_line
from tnt_flax.data.sources import Source
from tnt_flax.data.transforms import CorruptImageError, decode
from tnt_flax.tools.command_line import Parser, run

logger = logging.getLogger(__name__)
MEANING = {  # kinds of findings, in the order of the table
    "corrupt": 'stops training; with data.corrupt="skip", replaced by the next image',
    "empty": "zero bytes; also counted as corrupt",
    "huge": "more pixels than Pillow opens; also counted as corrupt",
    "rotated": "EXIF orientation, which training ignores, as timm does",
    "animated": "several frames; only the first is used",
    "16-bit": "more than 8 bits per channel; gray values above 255 become white",
    "cmyk": "converted to RGB without a color profile",
    "palette": "indexed colors; converted to RGB",
    "alpha": "transparency is dropped; hidden pixels become visible",
    "grey": "one channel; repeated three times",
    "small": "a side below 32 pixels",
}
SMALL = 32  # pixels
FEW = 10  # classes with fewer images are reported
SHOWN = 3  # examples per finding; classes with the fewest and most images
CHUNK = 256  # records between two progress lines in the file
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
# Keys of config.data that do not affect the check.
OTHER_KEYS = ("image_size", "crop_fraction", "mean", "std", "corrupt", "threads", "workers")


def make_parser() -> Parser:
    parser = Parser("python -m tnt_flax.tools.check_data", __doc__, takes_config=True)
    choices = ["train", "eval", "both"]
    parser.add_argument("--split", choices=choices, default="train", help="records to read")
    parser.add_argument("--out", metavar="FILE", help="file for all findings, as lines of JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run(
        make_parser(),
        lambda args: check_data(args.config, args.split, args.out),
        argv,
        on_interrupt="with --out, the same command resumes",
        failed=lambda result: bool(result["corrupt"]),
    )


def check_data(config: ConfigDict, split: str = "train", out: str | None = None) -> dict[str, Any]:
    """Checks one split or both and prints a table for each; returns the counts over all splits.

    Raises:
        InputError: the config, the data set as a whole or `out` is wrong.
    """
    from tnt_flax.training.experiment import Experiment

    experiment = Experiment(config)
    splits = ("train", "eval") if split == "both" else (split,)
    sources = {name: experiment.open_source(config.data[f"{name}_split"]) for name in splits}
    checked = {key: value for key, value in config.data.items() if key not in OTHER_KEYS}
    checked["records"] = {name: len(source) for name, source in sources.items()}
    totals = collections.Counter({"images": 0, "classes": 0})
    with contextlib.closing(FindingsFile(out, checked)) as file:
        for name, source in sources.items():
            summary = Summary(source)
            for line in file.read(name):
                summary.add(line)
            for lines in check_records(source, summary.checked, config.data.threads):
                file.write(name, lines)
                for line in lines:
                    summary.add(line)
            summary.print(config.data[f"{name}_split"])
            totals["images"] += len(source)
            totals["classes"] = max(totals["classes"], len(source.class_names))
            totals.update(summary.result())
    return dict(totals) | ({"out": str(file.path)} if out else {})


class Summary:
    """Counts of one split. Memory does not grow with the number of findings."""

    def __init__(self, source: Source):
        self.source = source
        self.checked = 0
        self.per_class = np.zeros(len(source.class_names), int)
        self.counts: collections.Counter[str] = collections.Counter()
        self.first = collections.defaultdict(list)

    def add(self, line: dict[str, Any]) -> None:
        if "checked" in line:
            self.checked = line["checked"]
            for label, count in line["labels"].items():
                self.per_class[int(label)] += count
            return
        finding = line["finding"]
        self.counts[finding] += 1
        if len(self.first[finding]) < SHOWN:
            self.first[finding].append(f"{line['name']}: {line['detail']}")

    def result(self) -> dict[str, int]:
        return {
            **{finding: self.counts[finding] for finding in MEANING},
            "classes_with_none": int((self.per_class == 0).sum()),
            "classes_with_few": int(((self.per_class > 0) & (self.per_class < FEW)).sum()),
        }

    def print(self, split: str) -> None:
        names, per_class = self.source.class_names, self.per_class
        print(f"{split}: {len(self.source):,} images, {len(names):,} classes\n")
        print(f"{'finding':<10}{'images':>9}  meaning")
        for finding, meaning in MEANING.items():
            print(f"{finding:<10}{self.counts[finding]:>9,}  {meaning}")
            for example in self.first[finding]:
                print(f"    {example}")
            if self.counts[finding] > SHOWN:
                print("    ...")
        order = np.argsort(per_class, kind="stable")
        few = self.result()
        print(f"\n{'classes':<10}{'number':>9}  classes and number of images")
        for title, which, count in (
            ("none", order, few["classes_with_none"]),
            (f"below {FEW}", order[few["classes_with_none"] :], few["classes_with_few"]),
            ("least", order, None),
            ("most", order[::-1], None),
        ):
            listed = which[: SHOWN if count is None else min(count, SHOWN)]
            text = ", ".join(f"{names[label]} {per_class[label]:,}" for label in listed)
            text += ", ..." if (len(names) if count is None else count) > len(listed) else ""
            print(f"{title:<10}{'' if count is None else f'{count:,}':>9}  {text}".rstrip())
        print()


def check_records(source: Source, start: int, threads: int) -> Iterator[list[dict[str, Any]]]:
    """The findings of the records from `start` on, chunk by chunk; each ends with how far it is."""

    def check(index):
        return check_record(source, index)

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


def check_record(source: Source, index: int) -> tuple[int | None, list[dict[str, Any]]]:
    """Returns label and findings of a record. The label is None if the record cannot be read."""
    label, class_name = None, None
    try:
        image, label = source[index]
        class_name = source.class_names[label]
        found = inspect_image(image)
    except OSError as error:  # the file vanished, the disk failed
        found = {"corrupt": f"cannot be read: {error.strerror or error}"}
    about = {"index": index, "name": source.name_of(index), "class": class_name}
    return label, [about | {"finding": kind, "detail": text} for kind, text in found.items()]


def inspect_image(image: bytes | np.ndarray) -> dict[str, str]:
    """Returns the findings about an image: kind -> detail."""
    found = {}
    try:
        width, height = decode(image).size
    except CorruptImageError as error:
        found["corrupt"] = str(error)
        if len(image) == 0:
            return found | {"empty": "0 bytes"}
    else:
        if min(width, height) < SMALL:
            found["small"] = f"{width} x {height} pixels"
    with contextlib.suppress(Exception):  # a damaged header, which `decode` reports
        found |= _of_pixels(image) if isinstance(image, np.ndarray) else _of_file(image)
    return found


def _of_pixels(pixels):
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    return {1: {"grey": "one channel"}, 4: {"alpha": "four channels"}}.get(channels, {})


def _of_file(encoded):
    found = {}
    try:
        image = Image.open(io.BytesIO(encoded))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        return {"huge": str(error).partition(",")[0]}
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # with warnings ignored
        found["huge"] = f"{image.width} x {image.height} pixels"
    # A 16-bit color PNG has the mode RGB; only its tiles show the layout in the file.
    layout = f"{image.mode} {[tile[3] for tile in image.tile]}"
    if image.mode in ("I", "F") or ";16" in layout:
        found["16-bit"] = f"mode {image.mode}"
    if image.mode == "CMYK":
        found["cmyk"] = f"a {image.format}"
    if image.mode in ("P", "PA"):
        found["palette"] = f"a {image.format}"
    if image.has_transparency_data:
        found["alpha"] = f"mode {image.mode}"
    if image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;"):
        found["grey"] = f"mode {image.mode}"
    if getattr(image, "is_animated", False):
        found["animated"] = f"{image.n_frames} frames"
    # Pillow rotates TIFFs itself. In a PNG the tag may follow the pixels: read it only if present.
    if image.format != "TIFF" and (image.format != "PNG" or b"eXIf" in encoded):
        orientation = image.getexif().get(ORIENTATION, 1)
        if orientation != 1:
            found["rotated"] = f"orientation {orientation}"
    return found


# ------------------------------------------------------------------------------ the findings file

KEY = "findings_of"  # in the first line


class FindingsFile:
    """Findings and progress as lines of JSON, so that an interrupted check can resume.

    The first line describes the data. Lines after the last progress line ("checked") are from an
    interrupted chunk: they are dropped and the chunk is checked again.

    Args:
        path: the file; None writes nothing.
        data: description of the data. The check resumes if the file has the same, else restarts.

    Raises:
        InputError: the file cannot be written, or it exists and is of another kind.
    """

    def __init__(self, path: str | None, data: dict[str, Any]):
        self.path = pathlib.Path(path).expanduser() if path else None
        self._file, self._end = None, 0
        if self.path is None:
            return
        try:
            self._file = open(self.path, "a+b")
        except OSError as error:
            raise InputError(f"cannot write --out={path}: {error.strerror}") from None
        first = _encode({KEY: data})
        self._file.seek(0)
        found = self._file.readline()
        if found == first:
            self._end = self._last_checked()
        elif not first.startswith(found):  # else new or interrupted
            if not found.startswith(first[: first.index(b":")]):
                self.close()
                raise InputError(f"--out={path} exists and has no findings: choose another file")
            logger.info(f"{self.path} is of another data set or config: restarting")
        self._file.truncate(self._end)
        if not self._end:
            self._append(first)

    def read(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the lines of `split` from before the check resumed."""
        if not self._end:
            return
        self._file.seek(0)
        self._file.readline()
        while self._file.tell() < self._end:
            line = json.loads(self._file.readline())
            if line.pop("split") == split:
                yield line

    def write(self, split: str, lines: list[dict[str, Any]]) -> None:
        """Appends findings; the last line is the progress.

        Raises:
            RunError: the file cannot be written.
        """
        if self._file is not None:
            self._append(b"".join(_encode({"split": split} | line) for line in lines))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _append(self, text):
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {one_line(error)}") from None

    def _last_checked(self):
        """Returns the end of the last progress line, or of the first line."""
        end = self._file.tell()
        while (line := self._file.readline()).endswith(b"\n"):
            if b'"checked": ' in line and "checked" in json.loads(line):
                end = self._file.tell()
        return end


def _encode(line):
    return (json.dumps(line, ensure_ascii=False) + "\n").encode()


if __name__ == "__main__":
    sys.exit(main())
