# SPDX-License-Identifier: Apache-2.0
"""Images in one folder per class, the layout of timm and torchvision."""

import hashlib
import logging
import os
import pathlib
from typing import NamedTuple

from tnt_flax.core.errors import InputError, listed
from tnt_flax.data.images import is_image, log_left_out
from tnt_flax.data.sources import storage
from tnt_flax.data.sources.names import natural_key, order_classes, split_names

logger = logging.getLogger("tnt_flax")

# Folder names that are splits rather than classes.
SPLIT_LIKE = {"train", "training", "val", "valid", "validation", "eval", "test", "testing"}


class Holdout(NamedTuple):
    """The share of training images to evaluate on if a folder has no evaluation split."""

    share: float  # of each class
    train_split: str
    eval_split: str


class ImageFolder:
    """A source of the images `root/split/class/.../image.jpg`.

    Labels number the class folders in natural order ("2" before "10", as in timm), or in the order
    of `class_list`, a text file with the name of one class folder per line. Images are found at any
    depth below a class folder and sorted in natural order. Names that begin with a dot are skipped.
    The split "validation" (or "val") is the folder `validation` or else `val`.

    `holdout` applies if `root` has no evaluation split: a fixed share of each class's training
    images becomes the evaluation split. `root` may then also hold the class folders directly.

    Raises InputError for folders that are missing, unreadable or empty.
    """

    def __init__(self, root: str, split: str, class_list: str = "", holdout: Holdout | None = None):
        folder, part = _find_split(root, split, holdout)
        self.storage_path = str(folder)
        found = _folders_in(folder, "split folder")
        if not found:
            raise InputError(f"no class folders in {folder}: expected {folder}/CLASS/IMAGE")
        self.class_names = order_classes(found, class_list, self.storage_path)
        self._files = []  # relative paths as strings: ImageNet has 1.3 million
        self.labels = []
        left_out: list[str] = []
        for label, class_name in enumerate(self.class_names):
            files = _images_below(folder / class_name, left_out)
            if not files:
                raise InputError(
                    f"class folder {folder / class_name} has no images: add some, or remove it"
                )
            if part:
                files = _part_of(files, class_name, part, holdout.share)
            self._files += [os.path.join(class_name, file) for file in files]
            self.labels += [label] * len(files)
        log_left_out(left_out, self.storage_path)
        if part == "held out":
            if not self._files:
                raise InputError(f"no class in {folder} has two images, so none can be held out")
            message = "%s has no split %r: holding out a fixed set of %d images of %s"
            logger.warning(message, root, split, len(self), folder)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        with open(self.name_of(index), "rb") as file:
            return file.read(), self.labels[index]

    def name_of(self, index: int) -> str:
        return os.path.join(self.storage_path, self._files[index])


def _find_split(root, split, holdout):
    """Returns the folder with the class folders, and the part of it if it must be divided."""
    if storage.is_remote(str(root)):
        raise InputError(f"image folders must be local, not {root}: use webdataset shards instead")
    root = pathlib.Path(root).expanduser()
    existing = _folders_in(root, "data set root")

    def folder_of(split):
        return next((root / name for name in split_names(split) if name in existing), None)

    if holdout and holdout.share and folder_of(holdout.eval_split) is None:
        part = {holdout.train_split: "rest", holdout.eval_split: "held out"}.get(split)
        if folder := folder_of(holdout.train_split):
            return folder, part
        if part and not {name.lower() for name in existing} & SPLIT_LIKE:
            return root, part
    if folder := folder_of(split):
        return folder, None
    wanted = split_names(split)
    raise InputError(
        f"no folder {' or '.join(repr(name) for name in wanted)} in {root}: it holds "
        f"{listed(existing) or 'no folders'}; expected {root / wanted[0]}/CLASS/IMAGE, or set "
        "data.train_split and data.eval_split to its folders, or data.holdout=0.2 to evaluate on a "
        "fifth of its images"
    )


def _part_of(files, class_name, part, share):
    """Returns the held-out files of a class, or the rest; neither is empty if there are two files.

    Files are chosen by a hash of their names, so adding an image moves at most one or two others
    between the parts.
    """

    def key(file):
        return hashlib.sha256(f"{class_name}/{file}".encode("utf-8", "surrogateescape")).digest()

    count = min(max(round(share * len(files)), 1), len(files) - 1)
    held_out = set(sorted(files, key=key)[:count])
    return [file for file in files if (file in held_out) == (part == "held out")]


def _folders_in(path, what):
    """Returns the names of the visible folders in `path`, in natural order."""
    with storage.as_input_error(f"cannot read the {what} {path}"):
        names = [entry.name for entry in os.scandir(path) if entry.is_dir()]
    return sorted((name for name in names if not name.startswith(".")), key=natural_key)


def _images_below(folder, left_out):
    """Returns the images below a class folder as relative paths, in natural order.

    Names of other files are added to `left_out`.
    """

    def refuse(error):  # os.walk would silently skip a folder that it cannot list
        raise InputError(f"cannot read the class folder {error.filename}: {error.strerror}")

    files = []
    for directory, subfolders, names in os.walk(folder, followlinks=True, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        below = os.path.relpath(directory, folder)
        images = set(filter(is_image, names))
        files += [os.path.normpath(os.path.join(below, name)) for name in images]
        left_out += set(names) - images
    return sorted(files, key=natural_key)
