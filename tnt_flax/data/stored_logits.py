# SPDX-License-Identifier: Apache-2.0
"""Files of stored logits: safetensors with a row and a name for each image.

The tensors are `logits` float32 [N, K]; `readable` bool [N], False for rows without logits; and
`names` uint8, the names of the images in UTF-8, separated by zero bytes. The metadata has the names
of the classes as a JSON list, `class_names`, if they are known.
"""

import contextlib
import functools
import json
import logging
import os
import pathlib
import struct
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import safetensors

from tnt_flax.core.errors import InputError, one_line
from tnt_flax.core.files import as_unicode, open_new
from tnt_flax.data.labels import map_to_network

TENSORS = {"logits", "names", "readable"}
logger = logging.getLogger("tnt_flax")


@contextlib.contextmanager
def open_logits(
    path: pathlib.Path,
    names: Sequence[str],
    num_classes: int,
    class_names: Sequence[str] | None = None,
) -> Iterator[Callable[[np.ndarray | None], None]]:
    """Opens a file for atomic writing; yields `write(row)`, to call once for each name in order.

    A row is float32 [num_classes], or None for an unreadable image. Rows are not held in memory.

    Raises:
        InputError: `path` cannot be written.
        RunError: the disk is full.
    """
    text = "\0".join(as_unicode(os.path.abspath(name)) for name in names).encode()
    sizes = {
        "logits": ("F32", [len(names), num_classes], 4 * len(names) * num_classes),
        "readable": ("BOOL", [len(names)], len(names)),
        "names": ("U8", [len(text)], len(text)),
    }
    header, end = {"__metadata__": {"class_names": json.dumps(class_names)}}, 0
    for name, (dtype, shape, size) in sizes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    readable = bytearray()
    nothing = np.full(num_classes, np.nan, "<f4")
    with open_new(path) as file:

        def write(row):
            readable.append(row is not None)
            file.write((nothing if row is None else row.astype("<f4")).tobytes())

        file.write(struct.pack("<Q", len(encoded)) + encoded)
        yield write
        file.write(readable + text)


def is_logits_file(path: str) -> bool:
    """True if `path` is a file of stored logits."""
    try:
        return set(safetensors.safe_open(path, framework="numpy").keys()) == TENSORS
    except (OSError, safetensors.SafetensorError):  # no file, or of another format
        return False


class RecordLogits:
    """The stored logits of each record of a data set: `logits[record]` is float32 [classes].

    Rows are read on demand. Rows and records are matched by the paths of the images, or by their
    paths below the folder that all images share.

    Args:
        path: see `open_logits`.
        names: of the records.
        class_names: of the data. The file may have further classes, in any order.

    Raises:
        InputError: the file lacks a record or a class.
    """

    def __init__(self, path: str, names: Sequence[str], class_names: Sequence[str]):
        self._path = path
        try:
            stored = bytes(self._file.get_tensor("names")).decode().split("\0")
            readable = self._file.get_tensor("readable")
            _, num_classes = self._file.get_slice("logits").get_shape()
            known = json.loads((self._file.metadata() or {}).get("class_names", "null"))
        except (ValueError, safetensors.SafetensorError) as error:
            raise InputError(f"{path} is not a file of stored logits: {one_line(error)}") from None
        columns = map_to_network(class_names, known, num_classes)
        whole = np.array_equal(columns, np.arange(num_classes))
        self._columns = slice(None) if whole else columns
        names = [as_unicode(os.path.abspath(name)) for name in names]
        row_of = {name: i for i, name in enumerate(stored) if readable[i]}
        theirs = ours = ""
        if not row_of.keys() & names:  # the data have moved
            theirs, ours = _shared_folder(stored), _shared_folder(names)
            row_of = {os.path.relpath(name, theirs): i for name, i in row_of.items()}
            names = [os.path.relpath(name, ours) for name in names]
        if missing := [name for name in names if name not in row_of]:
            raise InputError(
                f"{path} has no logits of {len(missing)} of the {len(names)} training images, such "
                f"as {missing[0]}: write them by tnt-flax predict TEACHER FOLDER --logits={path}"
            )
        if ours != theirs:
            logger.warning(f"warning: images below {ours} get the logits of {theirs}")
        self._rows = np.array([row_of[name] for name in names], np.int64)

    @functools.cached_property
    def _file(self):
        return safetensors.safe_open(self._path, framework="numpy")

    @functools.cached_property
    def _logits(self):
        return self._file.get_slice("logits")

    def __getstate__(self):  # worker processes open the file themselves
        return {k: x for k, x in vars(self).items() if k not in ("_file", "_logits")}

    def __getitem__(self, record: int) -> np.ndarray:
        return self._logits[int(self._rows[record])][self._columns]


def _shared_folder(names: Sequence[str]) -> str:
    return os.path.commonpath([os.path.dirname(name) for name in names])
