# SPDX-License-Identifier: Apache-2.0
"""Where images come from: folders, tars, shards, tfds' files, or scikit-learn's digits.

A source is a sequence of records. `len(source)` counts them; `source[i]` is `(image, label)`, where
the image is either the encoded file (bytes) or uint8 pixels [H, W] or [H, W, C], and the label an
int; `source.class_names` names the labels; `source.name_of(i)` is what a message calls record i.
Who asks for a source with `several_labels` may get one with `most_labels`: there a label is int32
[most_labels], the classes of an image, which may be none, padded with -1.
Reading a record may raise OSError; `source.place` is there as long as the data set can be reached
(see `storage.is_away`). Sources pickle, because worker processes get a copy.
"""

import difflib
import hashlib
import os
import pathlib
import sys
from typing import NamedTuple, Protocol

import numpy as np

from tnt_flax.core.errors import InputError
from tnt_flax.data.sources import storage
from tnt_flax.data.sources.imagenet import imagenet_tars
from tnt_flax.data.sources.names import is_image, natural_key, order_classes, some, split_names
from tnt_flax.data.sources.tfds import TfdsSource
from tnt_flax.data.sources.webdataset import webdataset

KINDS = ("folder", "imagenet_tars", "webdataset", "tfds", "digits")
# Names of folders that are splits rather than classes.
LIKE_SPLITS = {"train", "training", "val", "valid", "validation", "eval", "test", "testing"}
NUM_DIGITS_TEST = 360  # a fifth of the 1,797 digits


class Holdout(NamedTuple):
    """Which share of a folder's training images to evaluate on where it has no others."""

    share: float  # of each class
    train_split: str
    eval_split: str


class Source(Protocol):
    """The interface of this file, for annotations."""

    class_names: tuple[str, ...]
    place: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]: ...

    def name_of(self, index: int) -> str: ...


def open_source(
    kind: str,
    split: str,
    *,
    root: str = "",
    name: str = "",
    class_list: str = "",
    eval_labels: str = "",
    holdout: Holdout | None = None,
    several_labels: bool = False,
) -> Source:
    """Opens the `split` of a data set.

    `kind` is "folder", "imagenet_tars" or "webdataset" (all below `root`, and optionally with a
    `class_list`; the tars with `eval_labels`), "tfds" (`name`, and `root` as its data_dir; empty
    means tfds' default) or "digits". A folder without the split to evaluate on is divided as
    `holdout` says; other kinds pass over it. Without `several_labels` a tfds data set with images
    of several classes is refused. Raises InputError for an unknown kind, for an argument that the
    kind needs but did not get, and for whatever the source itself finds wrong.
    """
    if kind not in KINDS:
        guess = difflib.get_close_matches(kind.lower(), KINDS, n=1, cutoff=0.0)[0]
        raise InputError(
            f"unknown kind of data set {kind!r}: did you mean {guess!r}? ({', '.join(KINDS)})"
        )
    if class_list and kind in ("tfds", "digits"):
        raise InputError(
            f"data.class_list is for folders, tars and shards, not for kind {kind!r}: unset it"
        )
    if eval_labels and kind != "imagenet_tars":
        raise InputError(f"data.eval_labels is for kind 'imagenet_tars', not {kind!r}: unset it")
    if kind == "folder":
        return ImageFolder(root, split, class_list, holdout)
    if kind == "imagenet_tars":
        return imagenet_tars(root, split, eval_labels, class_list)
    if kind == "webdataset":
        return webdataset(root, split, class_list)
    if kind == "tfds":
        return TfdsSource(name, split, root, several_labels=several_labels)
    return Digits(split)


def check_same_classes(train: Source, evaluation: Source) -> None:
    """Raises InputError unless label k means the same class in both splits."""
    ours, theirs = train.class_names, evaluation.class_names
    if ours == theirs:
        return
    counts = f"{len(ours)} and {len(theirs)} classes"
    for label, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            raise InputError(
                f"training and evaluation splits differ ({counts}): label {label} is {a!r} in "
                f"training and {b!r} in evaluation"
            )
    longer = "training" if len(ours) > len(theirs) else "evaluation"
    extra = max(ours, theirs, key=len)[min(len(ours), len(theirs))]
    raise InputError(
        f"training and evaluation splits differ ({counts}): {extra!r} is only in {longer}"
    )


# ----------------------------------------------------------------------------------- image folder


class ImageFolder:
    """timm's and torchvision's layout, `root/split/class/.../image.jpg`.

    Labels number the class folders in natural order ("2" before "10", timm's order), or in the
    order of `class_list`, a text file with one class folder's name per line. Below a class folder
    images are found at any depth and sorted in natural order; names beginning with a dot are
    skipped. The split "validation" (or "val") is the folder `validation` or else `val`.

    With a `holdout`, a root that lacks the split to evaluate on, or lacks both and holds the class
    folders itself, is divided: a share of each class, the same each time, is evaluated on.
    """

    def __init__(self, root: str, split: str, class_list: str = "", holdout: Holdout | None = None):
        folder, part = _find_split(root, split, holdout)
        self.folder = self.place = str(folder)
        self.class_names = order_classes(_class_folders(folder), class_list, self.folder)
        self._files = []  # paths relative to the folder, as text: an ImageNet has 1.3 million
        self._labels = []
        for label, class_name in enumerate(self.class_names):
            files = _images_below(folder / class_name)
            if not files:
                raise InputError(
                    f"class folder {folder / class_name} has no images: add some, or remove it"
                )
            if part:
                files = _part_of(files, class_name, part, holdout.share)
            self._files += [os.path.join(class_name, file) for file in files]
            self._labels += [label] * len(files)
        if part == "held out":
            if not self._files:
                raise InputError(f"no class in {folder} has two images, so none can be held out")
            print(
                f"{root} has no split {split!r}: holding out {len(self)} of the images in "
                f"{folder}, the same each time",
                file=sys.stderr,
            )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        with open(self.name_of(index), "rb") as file:
            return file.read(), self._labels[index]

    def name_of(self, index: int) -> str:
        return os.path.join(self.folder, self._files[index])


def _find_split(root, split, holdout):
    """The folder with the class folders, and whether it is to be divided: which part is meant."""
    if not root:
        raise InputError("an image folder needs its root directory: set data.root")
    if storage.is_remote(str(root)):
        raise InputError(f"an image folder is read from a disk, not {root}: pack it as webdataset")
    root = pathlib.Path(root).expanduser()
    existing = _folders_in(root, "data set root")

    def folder_of(split):
        return next((root / name for name in split_names(split) if name in existing), None)

    if holdout and holdout.share and folder_of(holdout.eval_split) is None:
        part = {holdout.train_split: "rest", holdout.eval_split: "held out"}.get(split)
        if folder := folder_of(holdout.train_split):
            return folder, part
        if part and not {name.lower() for name in existing} & LIKE_SPLITS:
            return root, part
    if folder := folder_of(split):
        return folder, None
    wanted = split_names(split)
    raise InputError(
        f"no folder {' or '.join(repr(name) for name in wanted)} in {root}: it holds "
        f"{some(existing)}; expected {root / wanted[0]}/CLASS/IMAGE, or set data.train_split and "
        "data.eval_split to its folders, or data.holdout=0.2 to evaluate on a fifth of its images"
    )


def _part_of(files, class_name, part, share):
    """The held-out files of a class, or the rest; each of them has one at least, if there are two.

    By a hash of the name: a further image does not move those that are there between the parts,
    but for one or two at the border.
    """

    def key(file):
        return hashlib.sha256(f"{class_name}/{file}".encode("utf-8", "surrogateescape")).digest()

    count = min(max(round(share * len(files)), 1), len(files) - 1)
    held_out = set(sorted(files, key=key)[:count])
    return [file for file in files if (file in held_out) == (part == "held out")]


def _class_folders(folder):
    class_names = _folders_in(folder, "split folder")
    if not class_names:
        raise InputError(f"no class folders in {folder}: expected {folder}/CLASS/IMAGE")
    return class_names


def _folders_in(path, what):
    """The names of the visible folders in `path`, in natural order."""
    try:
        entries = [entry for entry in os.scandir(path) if entry.is_dir()]
    except OSError as error:
        raise InputError(f"cannot read the {what} {path}: {error.strerror}") from None
    return sorted((e.name for e in entries if not e.name.startswith(".")), key=natural_key)


def _images_below(folder):
    """Paths of the images below a class folder, relative to it, in natural order."""
    files = []
    for directory, subfolders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if is_image(name):
                files.append(os.path.relpath(os.path.join(directory, name), folder))
    return sorted(files, key=natural_key)


def _refuse(error):
    # os.walk would silently leave out what it cannot list.
    raise InputError(f"cannot read the class folder {error.filename}: {error.strerror}")


# ----------------------------------------------------------------------------------------- digits


class Digits:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: small, embedded, no download.

    The values 0..16 are scaled to uint8 0..255. "test" (or "validation") is 360 of them, drawn by
    a fixed permutation of all (not stratified by class), "train" the other 1,437. Another `seed`
    draws another test split.
    """

    def __init__(self, split: str, seed: int = 0):
        from sklearn.datasets import load_digits

        split = "test" if split == "validation" else split
        if split not in ("train", "test"):
            raise InputError(f"the digits have no split {split!r}: choose train or test")
        digits = load_digits()
        order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(digits.target))
        rows = order[:NUM_DIGITS_TEST] if split == "test" else order[NUM_DIGITS_TEST:]
        self._images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
        self._labels = digits.target[rows]
        self._split = split
        self.class_names = tuple(str(name) for name in digits.target_names)
        self.place = ""  # in memory: nothing is ever away

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self._images[index], int(self._labels[index])

    def name_of(self, index: int) -> str:
        return f"digits {self._split} image {index}"
