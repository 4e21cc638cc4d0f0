# SPDX-License-Identifier: Apache-2.0
"""What names mean: classes in an order, which gives the labels; splits; files that are images."""

import collections
import os
import re
from collections.abc import Sequence

from tnt_flax.core.errors import InputError
from tnt_flax.data.sources import storage

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
)


def natural_key(name: str) -> tuple:
    """Sorts runs of digits as numbers and ignores case, as timm does; ties by the name itself."""
    parts = re.split(r"(\d+)", name.lower())  # text and digits alternate, beginning with text
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def is_image(name: str) -> bool:
    """By its suffix; hidden files are none (macOS packs a "._NAME" beside every NAME)."""
    base = os.path.basename(name)
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES


def split_names(split: str) -> tuple[str, ...]:
    """What the data of a split may be called: half of the world writes "val" for "validation"."""
    return ("validation", "val") if split in ("validation", "val") else (split,)


def read_class_list(path: str) -> tuple[str, ...]:
    """The names in a text file with one class a line; raises InputError for any it has twice."""
    try:
        lines = storage.read_file(path).decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"cannot read the class list {path}: it is not UTF-8 text") from None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot read the class list {path}: {reason}") from None
    listed = [line.strip() for line in lines if line.strip()]
    if repeated := [name for name, count in collections.Counter(listed).items() if count > 1]:
        raise InputError(f"class list {path} names {repeated[0]!r} more than once")
    return tuple(listed)


def order_classes(
    found: Sequence[str], class_list: str, where: str, kind: str = "folder"
) -> tuple[str, ...]:
    """The classes `found` as they are, or in the order of a class list, which must name them all.

    `where` they were found and what `kind` of thing holds a class ("folder", "tar") is for the
    message of the InputError.
    """
    if not class_list:
        return tuple(found)
    listed = read_class_list(class_list)
    if absent := [name for name in listed if name not in set(found)]:
        raise InputError(f"class list {class_list} names {absent[0]!r}: {where} has no such {kind}")
    if unlisted := [name for name in found if name not in set(listed)]:
        missing = storage.join(where, unlisted[0])
        raise InputError(f"{missing} is not in the class list {class_list}: add it")
    return listed


def some(names: Sequence[str], none: str = "no folders", limit: int = 5) -> str:
    """The first few names, for a message."""
    if not names:
        return none
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
