# SPDX-License-Identifier: Apache-2.0
"""From the labels of one data set to the classes of a network that was trained on another."""

import json
import re
from collections.abc import Sequence

import numpy as np

from tnt_flax.core.errors import InputError
from tnt_flax.data import imagenet_classes
from tnt_flax.data.sources import Source, storage
from tnt_flax.data.sources.names import read_class_list, some

REAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
NO_LABEL = -1


def to_network(
    data_names: Sequence[str], network_names: Sequence[str] | None, num_classes: int
) -> np.ndarray:
    """The network's class of each label of a data set, int32 [labels].

    By name, where the network has all the names of the data; one to one, where the weights brought
    no names and there are as many. 1,000 classes without names are ImageNet's, and to a network of
    ImageNet's classes the names 0, 1, ... 999 are these, in order (as ImageNet-V2's folders are).

    Raises:
        InputError: none of these.
    """
    known = imagenet_classes.known_names(network_names, num_classes)
    position = {name: i for i, name in enumerate(known or ())}
    synsets = imagenet_classes.synsets()
    if set(position) == set(synsets) and list(data_names) == [str(i) for i in range(len(synsets))]:
        data_names = synsets
    unknown = [name for name in data_names if name not in position]
    if not unknown:
        return np.array([position[name] for name in data_names], np.int32)
    if network_names is None and len(data_names) == num_classes:
        return np.arange(num_classes, dtype=np.int32)
    theirs = some(known) if known else "of unknown names"
    raise InputError(
        f"the weights have {num_classes} classes ({theirs}), none of which is {unknown[0]!r} of "
        f"the data's {len(data_names)} ({some(data_names)})"
    )


def chosen(
    spelled: str, network_names: Sequence[str] | None, num_classes: int
) -> tuple[int, ...] | None:
    """The classes that `eval.classes` leaves to a network, as it numbers them; None is all.

    "imagenet-a" and "imagenet-r" are the 200 of these data sets; else it is a file with a name on
    each line. Raises InputError for a name that the network does not have.
    """
    if not spelled:
        return None
    if spelled in imagenet_classes.SUBSETS:
        names = imagenet_classes.synsets(spelled)
    else:
        try:
            names = read_class_list(spelled)
        except InputError as error:
            known = " nor ".join(imagenet_classes.SUBSETS)
            raise InputError(f"eval.classes={spelled!r} is neither {known}: {error}") from None
    if not names:
        raise InputError(f"eval.classes={spelled!r} names no class")
    return tuple(sorted(to_network(names, network_names, num_classes).tolist()))


class Relabeled:
    """`source` with rows of `labels`, int32 [records, K], of ImageNet's classes."""

    def __init__(self, source: Source, labels: np.ndarray):
        self.source, self.labels, self.most_labels = source, labels, labels.shape[1]
        self.class_names, self.name_of = imagenet_classes.synsets(), source.name_of
        self.place = source.place

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int):
        return self.source[index][0], self.labels[index]


def real_labels(path: str, source: Source) -> np.ndarray:
    """The ReaL labels (arXiv 2006.07159) of each record, int32 [records, most], padded with -1.

    `path` is their real.json: for each validation image of ImageNet, in the order of the names, the
    classes that are in it, of which there may be none.

    Raises:
        InputError: the file is another, or a record is not called as ImageNet's are.
    """
    try:
        labels = json.loads(storage.read_file(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the ReaL labels {path}: {reason}") from None
    classes = range(len(imagenet_classes.synsets()))
    if not isinstance(labels, list) or not all(
        isinstance(of_one, list) and all(label in classes for label in of_one) for of_one in labels
    ):
        raise InputError(f"{path} is not ReaL's real.json: a list of lists of numbers below 1000")
    most = max(map(len, labels), default=0)
    table = np.full((len(source), max(most, 1)), NO_LABEL, np.int32)
    for record in range(len(source)):
        match = REAL_NAME.search(source.name_of(record))
        if not match or not 0 < int(match[1]) <= len(labels):
            raise InputError(
                f"{source.name_of(record)} is no image of ImageNet's validation split, such as "
                f"ILSVRC2012_val_00000001.JPEG, of which {path} has {len(labels)}"
            )
        of_one = labels[int(match[1]) - 1]
        table[record, : len(of_one)] = of_one
    return table
