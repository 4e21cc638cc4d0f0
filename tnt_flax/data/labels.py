# SPDX-License-Identifier: Apache-2.0
"""Class names of ImageNet, and the mapping from a data set's labels to a network's classes.

ImageNet's 1,000 classes are sorted by synset, the order of all published weights. Their names are
WordNet's (imagenet_classes.LICENSE).
"""

import functools
import importlib.resources
import json
import logging
import re
from collections.abc import Sequence

import numpy as np

from tnt_flax.core.errors import InputError, as_input_error, listed
from tnt_flax.data.sources import Source, labels_of, storage, stores_several_labels
from tnt_flax.data.sources.names import natural_key, read_class_list

logger = logging.getLogger("tnt_flax")
IMAGENET_SUBSETS = {"imagenet-a": "a", "imagenet-r": "r"}  # marks in imagenet_classes.tsv
NO_LABEL = -1
SEPARATOR = "|"  # between the classes of an image in the name of its class
_VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})")


# -------------------------------------------------------------------------------- ImageNet classes


@functools.cache
def _imagenet() -> dict[str, tuple[str, str]]:
    """Maps each synset to its (subsets, name)."""
    file = importlib.resources.files("tnt_flax.data") / "imagenet_classes.tsv"
    rows = (line.split("\t") for line in file.read_text("utf-8").splitlines())
    return {synset: (subsets, name) for synset, subsets, name in rows}


def imagenet_synsets(subset: str | None = None) -> tuple[str, ...]:
    """Returns ("n01440764", ...): all synsets, or the 200 of "imagenet-a" or "imagenet-r"."""
    mark = IMAGENET_SUBSETS[subset] if subset else ""
    return tuple(synset for synset, (marks, _) in _imagenet().items() if mark in marks)


def readable_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Replaces synsets by words ("tench, Tinca tinca"); other names are unchanged."""
    return tuple(_imagenet().get(name, ("", name))[1] for name in class_names)


def names_or_imagenet(
    class_names: Sequence[str] | None, num_classes: int
) -> tuple[str, ...] | None:
    """Returns the class names; without any, ImageNet's synsets for 1,000 classes, else None."""
    if class_names is not None:
        return tuple(class_names)
    return imagenet_synsets() if num_classes == len(_imagenet()) else None


def display_names(class_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Returns readable class names, or "0", "1", ... if the names are unknown."""
    known = names_or_imagenet(class_names, num_classes)
    return readable_names(known or tuple(map(str, range(num_classes))))


# ------------------------------------------------------------------------------- labels to classes


def map_to_network(
    data_names: Sequence[str], network_names: Sequence[str] | None, num_classes: int
) -> np.ndarray:
    """Maps each label of a data set to the network's class of that name.

    A network without class names has ImageNet's if it has 1,000 classes. For a network with
    ImageNet's classes, data names "0", "1", ..., "999" are class numbers (as in ImageNet-V2's
    folders). If the network's names are unknown and the counts are equal, labels are not changed.

    `network_names` is None for weights without class names; `num_classes` is the network's.
    Returns int32 [labels]. Raises InputError if the network has no class for a name.
    """
    known = names_or_imagenet(network_names, num_classes)
    position = {name: i for i, name in enumerate(known or ())}
    synsets = imagenet_synsets()
    if set(position) == set(synsets) and list(data_names) == [str(i) for i in range(len(synsets))]:
        data_names = synsets
    unknown = [name for name in data_names if name not in position]
    if not unknown:
        return np.array([position[name] for name in data_names], np.int32)
    if network_names is None and len(data_names) == num_classes:
        if warning := class_order_warning(data_names):
            logger.warning(warning)
        return np.arange(num_classes, dtype=np.int32)
    described = listed(known) if known else "of unknown names"
    raise InputError(
        f"the weights have {num_classes} classes ({described}) and none is called {unknown[0]!r}, "
        f"one of the data's {len(data_names)} ({listed(data_names)})"
    )


def class_order_warning(data_names: Sequence[str]) -> str | None:
    """Returns a warning for weights without class names, if the order of the data is uncertain.

    torchvision and Keras number classes in the order of strings ("1", "10", "2"), timm and this
    package in natural order ("1", "2", "10"). Returns None where both are equal, or the data are in
    another order.
    """
    natural, strings = sorted(data_names, key=natural_key), sorted(data_names)
    if list(data_names) != natural or natural == strings:
        return None
    first = next(i for i, (a, b) in enumerate(zip(natural, strings, strict=True)) if a != b)
    here, there = (", ".join(names[first : first + 3]) for names in (natural, strings))
    return (
        f"warning: the weights bring no class names, so classes are taken in natural order ({here} "
        f"from class {first}); torchvision and Keras sort them as strings ({there}): for weights "
        "trained there, set data.class_order='string' or data.class_list=FILE"
    )


def select_classes(
    selection: str, network_names: Sequence[str] | None, num_classes: int
) -> tuple[int, ...] | None:
    """Returns the network's classes that `eval.classes` restricts predictions to; None for all.

    `selection` is "", "imagenet-a", "imagenet-r" or the path of a file with one class name per
    line. `network_names` and `num_classes` are those of `map_to_network`.
    Raises InputError for a file that cannot be read and for a name that the network does not have.
    """
    if not selection:
        return None
    if selection in IMAGENET_SUBSETS:
        names = imagenet_synsets(selection)
    else:
        try:
            names = read_class_list(selection)
        except InputError as error:
            known = " nor ".join(IMAGENET_SUBSETS)
            raise InputError(f"eval.classes={selection!r} is neither {known}: {error}") from None
    if not names:
        raise InputError(f"eval.classes={selection!r} names no class")
    return tuple(sorted(map_to_network(names, network_names, num_classes).tolist()))


# ---------------------------------------------------------------------------- several labels


class LabelRows:
    """`source` with other labels: rows of int32 [records, L] with indices of `class_names`."""

    def __init__(self, source: Source, labels: np.ndarray, class_names: Sequence[str]):
        self.source, self.labels, self.max_labels = source, labels, labels.shape[1]
        self.class_names, self.name_of = tuple(class_names), source.name_of
        self.storage_path = source.storage_path

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int):
        return self.source[index][0], self.labels[index]


def split_names(source: Source, class_names: Sequence[str] = ()) -> Source:
    """Returns `source` with the classes "a" and "b" for records of the class "a|b".

    The classes are `class_names`, by default all parts of the source's names in natural order. A
    source with several labels already is returned unchanged, as is one without such names if
    `class_names` is empty.

    Raises InputError if a part is none of `class_names`.
    """
    several = class_names or any(SEPARATOR in name for name in source.class_names)
    if stores_several_labels(source) or not several:
        return source
    parts = [list(filter(None, name.split(SEPARATOR))) for name in source.class_names]
    found = sorted({part for name in parts for part in name}, key=natural_key)
    position = {name: i for i, name in enumerate(class_names or found)}
    if unknown := [part for part in found if part not in position]:
        raise InputError(f"no training image has the class {unknown[0]!r} of an evaluation image")
    table = np.full((len(parts), max(map(len, parts))), NO_LABEL, np.int32)
    for row, names in zip(table, parts, strict=True):
        row[: len(names)] = [position[name] for name in names]
    return LabelRows(source, table[labels_of(source)], tuple(position))


# ------------------------------------------------------------------------------------ ReaL labels


def read_real_labels(path: str, source: Source) -> np.ndarray:
    """Reads the ReaL labels (arXiv 2006.07159) of each record.

    `path` is their real.json: a list of classes (possibly empty) for each validation image of
    ImageNet, in the order of the file names.
    Returns int32 [records, K], padded with -1, for up to K labels per image. Raises InputError if
    the file is not real.json or a record is not named like a validation image.
    """
    with as_input_error(f"cannot read the ReaL labels {path}"):
        labels = json.loads(storage.read_file(path))
    classes = range(len(_imagenet()))
    if not isinstance(labels, list) or not all(
        isinstance(row, list) and all(label in classes for label in row) for row in labels
    ):
        raise InputError(f"{path} is not ReaL's real.json: a list of lists of numbers below 1000")
    max_labels = max(map(len, labels), default=0)
    table = np.full((len(source), max(max_labels, 1)), NO_LABEL, np.int32)
    for record in range(len(source)):
        match = _VALIDATION_IMAGE.search(source.name_of(record))
        if not match or not 0 < int(match[1]) <= len(labels):
            raise InputError(
                f"{source.name_of(record)} is not named like one of the {len(labels)} validation "
                f"images in {path} (such as ILSVRC2012_val_00000001.JPEG)"
            )
        row = labels[int(match[1]) - 1]
        table[record, : len(row)] = row
    return table
