# SPDX-License-Identifier: Apache-2.0
"""Names in data sets: class lists, image files, and their natural order."""

import collections
import re
from collections.abc import Sequence

from tnt_flax.core.errors import InputError
from tnt_flax.data.sources import storage


def natural_key(name: str) -> tuple:
    """Sort key that compares runs of digits as numbers and ignores case, as in timm."""
    parts = re.split(r"(\d+)", name.lower())  # text and digits alternate, beginning with text
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def split_names(split: str) -> tuple[str, ...]:
    """Returns the names under which a split may be stored: "val" and "validation" are synonyms."""
    return ("validation", "val") if split in ("validation", "val") else (split,)


def read_class_list(path: str) -> tuple[str, ...]:
    """Reads a text file with one class per line. Raises InputError, also for repeated names."""
    with storage.as_input_error(f"cannot read the class list {path}"):
        lines = storage.read_file(path).decode().splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if repeated := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise InputError(f"class list {path} names {repeated[0]!r} more than once")
    return tuple(names)


def order_classes(found: Sequence[str], class_list: str, where: str) -> tuple[str, ...]:
    """Returns the classes `found` in the order of a class list, or unchanged if that is "".

    Raises InputError unless the class list names exactly the classes found in `where`.
    """
    if not class_list:
        return tuple(found)
    names = read_class_list(class_list)
    if different := sorted(set(names) ^ set(found)):
        only = class_list if different[0] in names else where
        raise InputError(
            f"{different[0]!r} is only in {only}: the class list {class_list} must have all "
            f"classes of {where} and no other"
        )
    return names
