# SPDX-License-Identifier: Apache-2.0
"""Data sources: image folders, tars, webdataset shards, tfds data sets, scikit-learn's digits.

A source is a sequence of records, see `Source`. Sources pickle, because worker processes get a
copy.
"""

import itertools
import logging
from typing import Protocol

import numpy as np

from tnt_flax.core.errors import InputError, did_you_mean, require_extras
from tnt_flax.data.sources.folder import Holdout, ImageFolder

logger = logging.getLogger("tnt_flax")

KINDS = ("folder", "imagenet_tars", "webdataset", "tfds", "digits")
NUM_DIGITS_TEST = 360  # a fifth of the 1,797 digits


class Source(Protocol):
    """A sequence of labeled images.

    `source[i]` returns (image, label) and may raise OSError. The image is an encoded file or uint8
    pixels [H, W] or [H, W, C]. The label is an int; in a multi-label source, which also has an
    attribute `max_labels`, it is int32 [max_labels] with the classes of an image (possibly none)
    padded with -1.
    """

    class_names: tuple[str, ...]  # names of the labels
    # A source that knows all labels without reading the images also has `labels`, int [records] or
    # int [records, max_labels]; see `labels_of`.
    storage_path: str  # exists while the data set is reachable, see `storage.is_unavailable`

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]: ...

    def name_of(self, index: int) -> str:
        """Returns the name of record `index` for messages."""


def open_source(
    kind: str,
    split: str,
    *,
    root: str = "",
    name: str = "",
    class_list: str = "",
    eval_labels: str = "",
    holdout: Holdout | None = None,
    multi_label: bool = False,
) -> Source:
    """Opens a split of a data set.

    Args:
        kind: one of KINDS.
        split: name of the split; for webdataset also a pattern, for tfds also a slice.
        root: folder of the data; for tfds its data_dir, "" for tfds' default.
        name: name of the data set in tfds.
        class_list: file with the class names in order, for folders, tars and shards.
        eval_labels: labels of the validation tar, for "imagenet_tars".
        holdout: how to divide a folder without an evaluation split; ignored for other kinds.
        multi_label: accept tfds data sets whose images have several labels.

    Raises:
        InputError: the kind is unknown, an argument is missing or does not apply to the kind, or
            the source reports an error.
    """
    if kind not in KINDS:
        raise InputError(
            f"data.source={kind!r} is not known{did_you_mean(kind, KINDS)}: choose one of "
            f"{', '.join(KINDS)}"
        )
    if class_list and kind in ("tfds", "digits"):
        raise InputError(
            f"data.class_list is for folders, tars and shards, not for kind {kind!r}: unset it"
        )
    if eval_labels and kind != "imagenet_tars":
        raise InputError(f"data.eval_labels is for kind 'imagenet_tars', not {kind!r}: unset it")
    if not root and kind not in ("tfds", "digits"):
        raise InputError(f"data.source={kind!r} needs the folder of the data: set data.root")
    if kind == "digits":
        return Digits(split)
    if kind == "folder":
        return ImageFolder(root, split, class_list, holdout)
    if kind == "tfds":
        require_extras('data.source="tfds"', "tfds")
        from tnt_flax.data.sources.tfds import TfdsSource

        return TfdsSource(name, split, root, multi_label=multi_label)
    from tnt_flax.data.sources import archives

    if kind == "imagenet_tars":
        return archives.imagenet_tars(root, split, eval_labels, class_list)
    return archives.webdataset(root, split, class_list)


def check_same_classes(train: Source, evaluation: Source) -> None:
    """Raises InputError unless every label means the same class in both splits."""
    ours, theirs = train.class_names, evaluation.class_names
    for label, (a, b) in enumerate(itertools.zip_longest(ours, theirs, fillvalue="no class")):
        if a != b:
            raise InputError(
                f"training and evaluation splits differ ({len(ours)} and {len(theirs)} classes): "
                f"label {label} is {a!r} in training and {b!r} in evaluation"
            )


def labels_of(source: Source) -> np.ndarray:
    """Returns the labels of all records: int [records], or [records, L] padded with -1.

    Reads all records of a source without an attribute `labels`, which may take minutes.
    """
    labels = getattr(source, "labels", None)
    if labels is None:
        logger.info("reading the labels of %d records", len(source))
        labels = [source[i][1] for i in range(len(source))]
    return np.asarray(labels)


class Digits:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; no download.

    The values 0..16 are scaled to uint8 0..255. A fixed random permutation, not stratified by
    class, assigns 360 images to "test" (or "validation") and 1,437 to "train".
    """

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        split = "test" if split == "validation" else split
        if split not in ("train", "test"):
            raise InputError(f"the digits have no split {split!r}: choose train or test")
        digits = load_digits()
        order = np.random.Generator(np.random.Philox(key=0)).permutation(len(digits.target))
        rows = order[:NUM_DIGITS_TEST] if split == "test" else order[NUM_DIGITS_TEST:]
        self._images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
        self.labels = digits.target[rows]
        self._split = split
        self.class_names = tuple(str(name) for name in digits.target_names)
        self.storage_path = ""  # in memory

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self._images[index], int(self.labels[index])

    def name_of(self, index: int) -> str:
        return f"digits {self._split} image {index}"
