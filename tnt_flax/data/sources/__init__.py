# SPDX-License-Identifier: Apache-2.0
"""Data sources: folders, tables, Parquet, tars, webdataset shards, tfds data sets, the digits.

A source is a sequence of records, see `Source`. Sources pickle, because worker processes get a
copy.
"""

import functools
import logging
import unicodedata
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from tnt_flax.core.errors import InputError, did_you_mean, listed, require_extras
from tnt_flax.data.sources.folder import Holdout, image_folder
from tnt_flax.data.sources.names import BY_NAME, LEFT_OUT, ClassOptions, find_split, number_classes

KINDS = ("folder", "table", "imagenet_tars", "webdataset", "tfds", "digits")
logger = logging.getLogger("tnt_flax")
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


def stores_several_labels(source: Source) -> bool:
    """True if the label of a record is an array of classes, see `Source.__getitem__`."""
    return getattr(source, "max_labels", None) is not None


def open_source(
    kind: str,
    split: str,
    *,
    root: str = "",
    name: str = "",
    classes: ClassOptions = BY_NAME,
    columns: Sequence[str] = ("", "", ""),
    eval_labels: str = "",
    holdout: Holdout | None = None,
    multi_label: bool = False,
) -> Source:
    """Opens a split of a data set.

    Args:
        kind: one of KINDS.
        split: name of the split; for shards and tables also a path or pattern, for tfds a slice.
        root: folder of the data; for tfds its data_dir, "" for tfds' default.
        name: name of the data set in tfds.
        classes: how the classes are numbered.
        columns: for "table": image, label and split, see `table.Columns`.
        eval_labels: labels of ImageNet's validation images, for "imagenet_tars" and "folder".
        holdout: how to divide a folder or table without an evaluation split.
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
    if eval_labels and kind not in ("imagenet_tars", "folder"):
        raise InputError(
            f"data.eval_labels is for kinds 'imagenet_tars' and 'folder', not {kind!r}: unset it"
        )
    if any(columns) and kind != "table":
        raise InputError(f"columns are for kind 'table', not {kind!r}: unset data.*_column")
    if not root and kind not in ("tfds", "digits"):
        raise InputError(f"data.source={kind!r} needs the folder of the data: set data.root")
    if kind == "digits":
        return choose_classes(Digits(split), classes)
    if kind == "folder":
        return image_folder(root, split, classes, holdout, eval_labels)
    if kind == "tfds":
        require_extras('data.source="tfds"', "tfds")
        from tnt_flax.data.sources.tfds import TfdsSource

        return choose_classes(TfdsSource(name, split, root, multi_label=multi_label), classes)
    if kind == "table":
        from tnt_flax.data.sources.table import Columns, open_table

        return open_table(root, split, Columns(*columns), classes, holdout)
    from tnt_flax.data.sources import archives

    if kind == "imagenet_tars":
        return archives.imagenet_tars(root, split, eval_labels, classes)
    return archives.webdataset(root, split, classes)


def open_split(
    data: Any, split: str, *, evaluation: bool = False, multi_label: bool = False
) -> Source:
    """Opens a split of the data set that a config describes; see `open_source`.

    Args:
        data: the group `data` of a config.
        split: name of the split.
        evaluation: the split may lack classes of the class list.
        multi_label: accept images with several labels.
    """
    columns = (data.image_column, data.label_column, data.split_column)
    return open_source(
        data.source,
        split,
        root=data.root,
        name=data.name,
        classes=ClassOptions(data.class_list, data.class_order, data.subset, evaluation),
        columns=columns,
        eval_labels=data.eval_labels,
        holdout=Holdout(data.holdout, data.train_split, data.eval_split),
        multi_label=multi_label,
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


def with_classes(evaluation: Source, class_names: Sequence[str]) -> Source:
    """Returns the evaluation split with the labels of training; it may lack classes.

    Raises InputError if it has a class that is not in `class_names`, those of training.
    """
    if tuple(evaluation.class_names) == tuple(class_names):
        return evaluation
    # macOS writes the letters of a name in another Unicode form than Linux and Windows.
    composed = functools.partial(unicodedata.normalize, "NFC")
    label_of = {name: label for label, name in enumerate(class_names)}
    label_of = {composed(name): label for name, label in label_of.items()} | label_of
    spelled = [n if n in label_of else composed(n) for n in evaluation.class_names]
    if unknown := [name for name in spelled if name not in label_of]:
        raise InputError(
            f"the evaluation split has the class {unknown[0]!r}, which is not one of the "
            f"{len(class_names)} of training ({listed(class_names)})"
            f"{did_you_mean(unknown[0], class_names)}: remove it, or set "
            "data.class_list and data.subset=true"
        )
    labels = np.array([label_of[name] for name in spelled], np.int32)
    present = set(labels.tolist())
    lacking = [name for label, name in enumerate(class_names) if label not in present]
    if lacking:
        logger.warning("the evaluation split has no images of %s", listed(lacking))
    return Relabeled(evaluation, tuple(class_names), labels)


def choose_classes(source: Source, options: ClassOptions) -> Source:
    """Returns `source` with the classes of a class list, in its order; `source` if there is none.

    With `options.subset` the labels of all records are read once.
    Raises InputError if the class list does not have all classes, unless `options.subset`.
    """
    if not options.class_list:
        return source
    where = source.name_of(0)
    names, labels = number_classes(source.class_names, options, where, exact=True)
    rows = None
    if (labels == LEFT_OUT).any():
        rows = np.flatnonzero(labels[labels_of(source)] != LEFT_OUT)
    return Relabeled(source, names, labels, rows)


class Relabeled:
    """`source` with other labels: `labels[k]` instead of k; only `rows` of it, if given."""

    def __init__(
        self,
        source: Source,
        class_names: tuple[str, ...],
        labels: np.ndarray,
        rows: np.ndarray | None = None,
    ):
        self.source, self.class_names, self._labels, self._rows = source, class_names, labels, rows
        self.storage_path = source.storage_path
        if (max_labels := getattr(source, "max_labels", None)) is not None:
            self.max_labels = max_labels

    def __len__(self) -> int:
        return len(self.source) if self._rows is None else len(self._rows)

    def _row(self, index: int) -> int:
        return index if self._rows is None else int(self._rows[index])

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]:
        image, label = self.source[self._row(index)]
        if isinstance(label, int):
            return image, int(self._labels[label])
        return image, np.where(label < 0, label, self._labels[label])

    @property
    def labels(self) -> np.ndarray:
        labels = labels_of(self.source)
        labels = np.where(labels < 0, labels, self._labels[labels])
        return labels if self._rows is None else labels[self._rows]

    def name_of(self, index: int) -> str:
        return self.source.name_of(self._row(index))


class Digits:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; no download.

    The values 0..16 are scaled to uint8 0..255. A fixed random permutation, not stratified by
    class, assigns 360 images to "test" (or "validation") and 1,437 to "train".
    """

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        found = find_split(split, ("train", "test"))
        if not found:
            raise InputError(f"the digits have no split {split!r}: choose train or test")
        split = found
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
