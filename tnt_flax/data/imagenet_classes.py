# SPDX-License-Identifier: Apache-2.0
"""ImageNet's 1,000 classes: their order, their names, and which of them the smaller test sets have.

The order is that of the synsets, which every system's published weights have. The names are
WordNet's (imagenet_classes.LICENSE).
"""

import functools
import importlib.resources
from collections.abc import Sequence

SUBSETS = {"imagenet-a": "a", "imagenet-r": "r"}  # as imagenet_classes.tsv marks them


@functools.cache
def _rows() -> tuple[tuple[str, str, str], ...]:
    """(synset, subsets, name) of each class."""
    file = importlib.resources.files("tnt_flax.data") / "imagenet_classes.tsv"
    lines = file.read_text("utf-8").splitlines()
    return tuple(tuple(line.split("\t")) for line in lines)


def synsets(subset: str | None = None) -> tuple[str, ...]:
    """("n01440764", ...): all of them, or those of "imagenet-a" or "imagenet-r", 200 each."""
    mark = SUBSETS[subset] if subset else ""
    return tuple(synset for synset, marks, _ in _rows() if mark in marks)


@functools.cache
def _names() -> dict[str, str]:
    return {synset: name for synset, _, name in _rows()}


def readable(class_names: Sequence[str]) -> tuple[str, ...]:
    """Words for classes that are called by their synsets ("tench, Tinca tinca"), others as is."""
    return tuple(_names().get(name, name) for name in class_names)


def known_names(class_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...] | None:
    """What weights call their classes; those of 1,000 classes without names are ImageNet's."""
    if class_names is not None:
        return tuple(class_names)
    return synsets() if num_classes == len(_rows()) else None


def in_words(class_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """What to call the classes of weights: words where they are known, else their numbers."""
    known = known_names(class_names, num_classes)
    return readable(known or tuple(map(str, range(num_classes))))
