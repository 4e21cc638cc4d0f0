# SPDX-License-Identifier: Apache-2.0
"""Names in data sets: lists, splits and their files, classes, image files and their order.

Every source finds its splits, numbers its classes and reads its lists with the functions here.
"""

import codecs
import collections
import dataclasses
import fnmatch
import heapq
import logging
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np

from tnt_flax.core.errors import InputError, as_input_error, did_you_mean, listed
from tnt_flax.data.images import is_image
from tnt_flax.data.sources import storage

logger = logging.getLogger("tnt_flax")

# Folders of file servers, archivers and recycle bins; in lower case.
SYSTEM_FOLDERS = frozenset(
    ("@eadir", "__macosx", "__pycache__", "#recycle", "#snapshot", "$recycle.bin", "lost+found")
    + ("system volume information",)
)
TRAIN_SPLITS = ("train", "training")
EVAL_SPLITS = ("valid", "val", "validation", "dev", "eval", "test", "testing")
TEST_SPLITS = ("test", "testing")
LEFT_OUT = -1  # label of a class that is not in the class list
MOST_CLASSES = 1_000_000  # of labels that are numbers: larger ones are names, such as postal codes


# --------------------------------------------------------------------------------- lists and order


def natural_key(name: str) -> tuple:
    """Sort key that compares runs of digits as numbers and ignores case, as in timm."""
    parts = re.split(r"(\d+)", name.lower())  # text and digits alternate, beginning with text
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


CLASS_ORDERS = {"natural": natural_key, "string": str}  # "string" is the order of torchvision


def read_lines(data: bytes, errors: str = "strict") -> list[str]:
    """Returns the lines of a text that are not blank, with any line ends.

    The text is UTF-8 with or without a byte-order mark, or UTF-16 with one. Raises ValueError for
    other encodings, unless `errors` is "surrogateescape".
    """
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        lines = re.split(r"\r\n|\r|\n", data.decode(encoding, errors))
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise ValueError(
            f"line {line} is not {encoding.removesuffix('-sig').upper()}: save the file as UTF-8"
        ) from None
    return [line for line in lines if line.strip()]


def read_class_list(path: str) -> tuple[str, ...]:
    """Reads a text file with one class per line. Raises InputError, also for repeated names."""
    with as_input_error(f"cannot read the class list {path}"):
        names = [line.strip() for line in read_lines(storage.read_file(path))]
    if repeated := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise InputError(f"class list {path} names {repeated[0]!r} more than once")
    return tuple(names)


class Names(Sequence):
    """Many strings in one array of bytes: a tenth of the memory of a list; pickles fast."""

    def __init__(self, groups: Iterable[Iterable[str]]):
        self._data, sizes = bytearray(), [np.zeros(0, np.int64)]
        for group in groups:
            encoded = [os.fsencode(name) for name in group]
            self._data += b"".join(encoded)
            sizes.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        self._ends = np.concatenate(sizes).cumsum()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(bytes(self._data[start : self._ends[index]]))


# ------------------------------------------------------------------------------------------ splits


def split_names(split: str) -> tuple[str, ...]:
    """Returns the names under which a split may be stored, the preferred one first.

    An evaluation split may be called valid, val or validation; without any of these, it is the test
    split.
    """
    others: tuple[str, ...] = ()
    for group in (TRAIN_SPLITS, TEST_SPLITS, EVAL_SPLITS):
        if split in group:
            others = group
            break
    return (split, *(name for name in others if name != split))


def find_split(split: str, available: Iterable[str]) -> str | None:
    """Returns the one of `available` that is the split, in any case of letters, or None."""
    available = sorted(available)
    by_name = {name.lower(): name for name in reversed(available)} | {n: n for n in available}
    return next((by_name[name] for name in split_names(split) if name in by_name), None)


def report_split(split: str, found: str, where: str) -> None:
    """Logs which part of a data set is read if its name is not the one asked for."""
    if found != split:
        logger.info("%s has no split %r: reading %r", where, split, found)


def find_files(
    root: str, split: str, name: re.Pattern, *, may_be_missing: bool = False
) -> list[str]:
    """Returns the paths of the files of a split, in natural order.

    A name of a split means the files in the folder of that name, or else the files whose name has
    it as a word ("train-00000-of-00294.parquet"): in `root` or, if that has none, in one of its
    subfolders. A path or pattern below `root` means the files that match; braces keep their order.

    Args:
        root: folder or URL.
        split: name, see `split_names`; path; or pattern ("{000000..000146}", "*").
        name: pattern of the names of files to consider.
        may_be_missing: return [] if there are none.

    Raises:
        InputError: there are none (unless `may_be_missing`), or several subfolders have some.
    """
    if re.search(r"[{*?\[]", split) or name.fullmatch(os.path.basename(split)):
        found = [p for one in expand_braces(storage.join(root, split)) for p in _glob(one, name)]
        looked_for = [split]
    else:
        found, below = _files_of(root, split, name), {}
        if not found:
            folders = (f for f in storage.list_folder(root) if not is_passed_over(f))
            for folder in (storage.join(root, f) for f in folders):
                if storage.is_folder(folder) and (files := _files_of(folder, split, name)):
                    below[folder] = files
        if len(below) > 1:
            raise InputError(f"{root} has the split {split!r} in {listed(below)}: set data.root")
        found = found or next(iter(below.values()), [])
        looked_for = [f"{split}/*", f"*{split}*"]
    if not found and not may_be_missing:
        raise InputError(
            f"no files {' or '.join(looked_for)} in {root}, which holds "
            f"{listed(storage.list_folder(root)) or 'nothing'}: set data.train_split or "
            "data.eval_split to a file or pattern"
        )
    return found


def _files_of(folder, split, pattern):
    names = storage.list_folder(folder)
    files = sorted(filter(pattern.fullmatch, names), key=natural_key)
    for candidate in split_names(split):
        found = [
            path
            for name in names
            if candidate in (name, name.lower()) and storage.is_folder(storage.join(folder, name))
            for path in _glob(storage.join(folder, f"{name}/*"), pattern)
        ]
        found = found or [storage.join(folder, name) for name in files if has_word(name, candidate)]
        if found:
            report_split(split, candidate, folder)
            return found
    return []


def has_word(name: str, word: str) -> bool:
    """True if a file name has the word, in any case of letters: "x_train2.csv" has "train"."""
    return bool(re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z])", name, re.IGNORECASE))


def expand_braces(pattern: str) -> list[str]:
    """Expands number ranges as a shell does: "{08..11}" counts with leading zeros."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [path for number in numbers for path in expand_braces(f"{before}{number}{after}")]


def _glob(pattern, name):
    """Expands a glob in the last part of a path; a path without one is returned unchanged."""
    folder, base = os.path.split(pattern)
    if not re.search(r"[*?\[]", base):
        return [pattern]
    found = filter(name.fullmatch, fnmatch.filter(storage.list_folder(folder), base))
    return [storage.join(folder, n) for n in sorted(found, key=natural_key)]


# ----------------------------------------------------------------------------------------- classes


@dataclasses.dataclass(frozen=True)
class ClassOptions:
    """How the classes of a data set are numbered.

    Raises InputError for an unknown order, and for a subset without a class list.
    """

    class_list: str = ""  # file with the names in order
    order: str = "natural"  # or "string", of names without a class list
    subset: bool = False  # leave out images of classes that are not in the class list
    evaluation: bool = False  # the split may lack classes of the class list

    def __post_init__(self):
        if self.order not in CLASS_ORDERS:
            raise InputError(
                f"data.class_order={self.order!r} is not known: use {' or '.join(CLASS_ORDERS)}"
            )
        if self.subset and not self.class_list:
            raise InputError(
                "data.subset=true needs data.class_list, a file with the classes to keep"
            )


BY_NAME = ClassOptions()


def number_classes(
    texts: Sequence[str],
    options: ClassOptions,
    where: str,
    *,
    names: Sequence[str] | None = None,
    exact: bool = False,
) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the class names, and the label of each text.

    Without a class list and `names`, texts that are all numbers are labels, and other texts are
    classes in the order of `options`. With a class list, texts are its names or, if they are all
    numbers and not among its names, positions in the list.

    Args:
        texts: the labels as spelled in the data, each once.
        options: see `ClassOptions`.
        where: of the data, for messages.
        names: the classes in order, if the data have such a list.
        exact: the texts are all classes, even if they look like numbers: the names of folders.

    Returns:
        The names, and int32 [texts]: labels, with LEFT_OUT for classes that are left out.

    Raises:
        InputError: the class list cannot be read, lacks a text (unless `options.subset`), or names
            a class that is not there (if `exact`, unless `options.evaluation`); or a text that is a
            label exceeds MOST_CLASSES.
    """
    found, numeric = set(texts), not exact and all(re.fullmatch(r"\d{1,9}", t) for t in texts)
    classes = _class_names(texts, options, names, numeric, where)
    label_of = {name: label for label, name in enumerate(classes)}
    if numeric and not found <= set(classes) and not (options.subset and set(classes) <= found):
        label_of = {text: int(text) for text in texts if int(text) < len(classes)}
    unknown = [text for text in texts if text not in label_of]
    if unknown and not options.subset:
        listing = f"the class list {options.class_list}" if options.class_list else "its list"
        raise InputError(
            f"{where} has the class {unknown[0]!r}, which is not in {listing} of {len(classes)} "
            f"classes{did_you_mean(unknown[0], classes)}: add it, or set data.subset=true with a "
            "class list to leave out its images"
        )
    missing = [name for name in classes if name not in found]
    if missing and exact and not options.evaluation:
        raise InputError(
            f"the class list {options.class_list} names {missing[0]!r}, which is not one of the "
            f"{len(found)} classes in {where} ({listed(sorted(found))}): remove it"
        )
    if unknown and len(unknown) == len(texts):
        raise InputError(f"{where} has none of the classes in {options.class_list}")
    if unknown:
        logger.info("%s: left out %d of %d classes", where, len(unknown), len(texts))
    return classes, np.array([label_of.get(text, LEFT_OUT) for text in texts], np.int32)


def _class_names(texts, options, names, numeric, where):
    """Returns the class names; reports labels that are numbers with gaps."""
    if options.class_list:
        return read_class_list(options.class_list)
    if names is not None:
        return tuple(names)
    if numeric:
        present = set(map(int, texts))
        count = 1 + max(present, default=-1)
        advice = "set data.class_list to a file with the labels that occur, one per line"
        if count > MOST_CLASSES:
            raise InputError(
                f"{where} has the label {count - 1}, but labels that are numbers count from 0: if "
                f"they are names, {advice}"
            )
        if len(present) < count and not options.evaluation:
            empty = [str(label) for label in range(count) if label not in present]
            logger.warning(
                f"{where}: no image has the label {listed(empty)}, so {len(empty)} of {count} "
                f"classes are empty: to leave them out, {advice}"
            )
        return tuple(map(str, range(count)))
    return tuple(sorted(set(texts), key=CLASS_ORDERS[options.order]))


# ------------------------------------------------------------------------------------- image files


def is_passed_over(folder: str) -> bool:
    """True for names of folders that hold no data: hidden ones, thumbnails, recycle bins."""
    return folder.startswith(".") or folder.lower() in SYSTEM_FOLDERS


def images_below(folder: str) -> tuple[list[str], list[str]]:
    """Returns the images below a folder as relative paths, in natural order, and other files.

    Symbolic links are followed. A folder that can be reached in several ways is read once, if
    possible not through a link. Raises OSError if a folder cannot be read.
    """
    found, others, seen, pending = [], [], set(), [(False, "")]
    while pending:
        linked, below = heapq.heappop(pending)
        path = os.path.join(folder, below)
        if (real := os.path.realpath(path)) in seen:
            continue
        seen.add(real)
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a link to itself
                    continue
                if not is_folder and not entry.is_file() and os.path.exists(entry.path):
                    others.append(f"{entry.name} (a pipe or device)")  # reading it would not end
                elif not is_folder:
                    (found if is_image(entry.name) else others).append(below + entry.name)
                elif not is_passed_over(entry.name):
                    item = (linked or entry.is_symlink(), f"{below}{entry.name}/")
                    heapq.heappush(pending, item)
    return sorted(found, key=natural_key), others
