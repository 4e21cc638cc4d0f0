# SPDX-License-Identifier: Apache-2.0
"""Images in files of their own: one folder per class, the layout of timm and torchvision."""

import hashlib
import logging
import os
from typing import NamedTuple

import numpy as np

from tnt_flax.core.errors import InputError, as_input_error, listed
from tnt_flax.data.images import count_suffixes, log_left_out
from tnt_flax.data.sources import storage
from tnt_flax.data.sources.label_lists import find_labels, image_stem, number_images
from tnt_flax.data.sources.names import (
    BY_NAME,
    EVAL_SPLITS,
    LEFT_OUT,
    TRAIN_SPLITS,
    ClassOptions,
    Names,
    find_split,
    images_below,
    is_passed_over,
    natural_key,
    number_classes,
    report_split,
)

logger = logging.getLogger("tnt_flax")

KAGGLE_IMAGENET = "ILSVRC/Data/CLS-LOC"  # below it train/ and val/; label lists up to 3 levels up


class Holdout(NamedTuple):
    """The share of training images to evaluate on if the data have no evaluation split."""

    share: float  # of each class
    train_split: str
    eval_split: str

    def part_of(self, split: str) -> str | None:
        """Returns "rest" or "held out" for the two splits, None for others or without a share."""
        parts = {self.train_split: "rest", self.eval_split: "held out"}
        return parts.get(split) if self.share else None


class ImageFiles:
    """A source of image files: `names` are paths below `root`, or absolute, or URLs."""

    def __init__(self, root: str, names: Names, labels: np.ndarray, class_names: tuple[str, ...]):
        self.storage_path, self.class_names = root, class_names
        self.labels = labels  # int32 [records]
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return storage.read_file(self.name_of(index)), int(self.labels[index])

    def name_of(self, index: int) -> str:
        return storage.join(self.storage_path, self._names[index])

    def key_of(self, index: int) -> str:
        """Returns what identifies a record, wherever the data are."""
        return self._names[index]

    def select(self, rows: np.ndarray) -> "ImageFiles":
        """Returns the records of these rows."""
        names = Names([[self._names[row] for row in rows]])
        return ImageFiles(self.storage_path, names, self.labels[rows], self.class_names)


def image_folder(
    root: str,
    split: str,
    classes: ClassOptions = BY_NAME,
    holdout: Holdout | None = None,
    eval_labels: str = "",
) -> ImageFiles:
    """Opens the images `root/split/class/.../image.jpg`.

    Labels number the class folders as `names.number_classes` does: in natural order ("2" before
    "10", as in timm) by default. Images are found at any depth below a class folder and sorted in
    natural order. For the names of splits see `names.split_names`. Hidden folders and those of
    file servers are passed over.

    A split of ImageNet's validation images without class folders gets its labels from
    `eval_labels`, by default one of `label_lists.LABEL_FILES` in `root` or up to three levels above
    (the layout of Kaggle's download, where `root` may also be the folder that holds ILSVRC/).

    `holdout` applies if `root` has no evaluation split: a fixed share of each class's training
    images becomes the evaluation split. `root` may then also hold the class folders directly.

    Raises InputError for folders that are missing, unreadable or empty.
    """
    if storage.is_remote(str(root)):
        raise InputError(
            f"image folders must be local, not {root}: use webdataset shards or tables"
        )
    root = os.path.expanduser(root)
    if os.path.isdir(kaggle := os.path.join(root, KAGGLE_IMAGENET)):
        root = kaggle
    folder, part = _find_split(root, split, holdout)
    if not (found := _folders_in(folder, "split folder")):
        return _flat_folder(root, folder, eval_labels, classes)
    if len(found) == 1 and not classes.evaluation:
        _check_depth(folder, found[0])
    class_names, labels = number_classes(found, classes, folder, exact=True)
    order = [i for i in np.argsort(labels, kind="stable").tolist() if labels[i] != LEFT_OUT]
    sizes, others = [], []

    def images():
        for name in (found[i] for i in order):
            files, left_out = _images_of(folder, name, classes.evaluation)
            sizes.append(len(files))
            others.extend(left_out)
            yield [f"{name}/{file}" for file in files]

    names = Names(images())
    log_left_out(others, folder)
    source = ImageFiles(folder, names, np.repeat(labels[order], sizes), class_names)
    if part:
        source = hold_out(source, holdout.share, part, split)
    if not len(source):
        raise InputError(
            f"no class folder in {folder} has images: add some, or choose other splits"
        )
    return source


def hold_out(source, share: float, part: str, split: str):
    """Returns the held-out images of a source ("held out"), or the rest ("rest").

    Neither is empty for a class of two images. Images are chosen by a hash of their keys, so adding
    an image moves at most one or two others between the parts. The source is an `ImageFiles` or an
    `IndexedImages`.

    Raises InputError if no image can be held out.
    """
    labels, size = source.labels, len(source)
    digests = (hashlib.sha256(os.fsencode(source.key_of(i))).digest()[:8] for i in range(size))
    hashes = np.frombuffer(b"".join(digests), ">u8")
    counts = np.bincount(labels, minlength=len(source.class_names))
    wanted = np.minimum(np.maximum(np.round(share * counts), 1), counts - 1)
    order = np.lexsort((hashes, labels))
    rank = np.empty(size, np.int64)
    rank[order] = np.arange(size) - np.repeat(counts.cumsum() - counts, counts)
    held_out = rank < wanted[labels]
    if part == "held out":
        where = source.storage_path
        if not held_out.any():
            raise InputError(f"no class in {where} has two images, so none can be held out")
        message = "%s has no split %r: holding out a fixed set of %d images"
        logger.warning(message, where, split, held_out.sum())
    return source.select(np.flatnonzero(held_out == (part == "held out")))


def _find_split(root, split, holdout):
    """Returns the folder with the class folders, and the part of it if it must be divided."""
    existing = _folders_in(root, "data set root")
    found = find_split(split, existing)
    if (part := holdout and holdout.part_of(split)) and not find_split(
        holdout.eval_split, existing
    ):
        if train := find_split(holdout.train_split, existing):
            return os.path.join(root, train), part
        if not any(name.lower() in TRAIN_SPLITS + EVAL_SPLITS for name in existing):
            return root, part
    if found:
        report_split(split, found, root)
        return os.path.join(root, found), None
    nested = [
        n for n in existing if find_split(split, _folders_in(os.path.join(root, n), "folder"))
    ]
    hint = f"set data.root={os.path.join(root, nested[0])}, or " if nested else ""
    raise InputError(
        f"no folder {split!r} in {root}: it holds {listed(existing) or 'no folders'}; expected "
        f"{os.path.join(root, split)}/CLASS/IMAGE; {hint}set data.train_split and data.eval_split "
        "to its folders, or data.holdout=0.2 to evaluate on a fifth of its images"
    )


def _flat_folder(root, folder, eval_labels, classes):
    """Opens a folder of ImageNet's validation images, with labels from a list."""
    with as_input_error(f"cannot read the split folder {folder}"):
        files, _ = images_below(folder)
    if not files:
        raise InputError(f"no class folders in {folder}: expected {folder}/CLASS/IMAGE")
    if eval_labels:
        path = storage.join(root, eval_labels)
    else:
        parents = [os.path.normpath(os.path.join(root, *[".."] * up)) for up in range(4)]
        try:
            path = find_labels(parents, f"the images in {folder}")
        except InputError as error:
            raise InputError(
                f"no class folders in {folder}: expected {folder}/CLASS/IMAGE; if these are "
                f'ImageNet\'s validation images: {error}; for other lists, data.source="table"'
            ) from None
    stems = list(map(image_stem, files))
    class_names, label_of = number_images(path, stems, classes)
    labels = np.array([label_of[stem] for stem in stems], np.int32)
    rows = np.flatnonzero(labels != LEFT_OUT)
    return ImageFiles(folder, Names([[files[row] for row in rows]]), labels[rows], class_names)


def _folders_in(path, what):
    """Returns the names of the folders with data in `path`, in natural order."""
    with as_input_error(f"cannot read the {what} {path}"):
        names = [entry.name for entry in os.scandir(path) if entry.is_dir()]
    return sorted((name for name in names if not is_passed_over(name)), key=natural_key)


def _check_depth(folder, only):
    """Raises InputError if the only class folder holds folders but no files: they are classes."""
    path = os.path.join(folder, only)
    with as_input_error(f"cannot read the class folder {path}"):
        names = [name for name in os.listdir(path) if not is_passed_over(name)]
    inner = sorted(name for name in names if os.path.isdir(os.path.join(path, name)))
    if inner and len(inner) == len(names):
        raise InputError(
            f"{folder} has one class folder, {only!r}, with the folders {listed(inner)}: if those "
            f"are splits, set data.root={path}; if they are classes, move them up into {folder}"
        )


def _images_of(folder, class_name, may_be_empty):
    path = os.path.join(folder, class_name)
    with as_input_error(f"cannot read the class folder {path}"):
        files, others = images_below(path)
    if not files and not may_be_empty:
        kinds = count_suffixes(others)
        held = f"Pillow decodes none of {kinds}; " if kinds else ""
        raise InputError(f"class folder {path} has no images: {held}add some, or remove it")
    return files, others
