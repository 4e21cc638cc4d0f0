# SPDX-License-Identifier: Apache-2.0
"""Reads and writes weights files of torch without torch.

There are two file formats around the same kind of pickle: a zip archive (torch 1.6 and newer) and
the older stream. Tensors are views of the memory-mapped file: unused ones take no memory, and the
file must not be overwritten in place while they exist.
"""

import math
import mmap
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from tnt_flax.core.errors import InputError
from tnt_flax.core.files import atomic_path
from tnt_flax.weights.formats.restricted_pickle import (
    STORAGES,
    TRUSTED,
    InvalidFile,
    RestrictedUnpickler,
)

ZIP = b"PK\x03\x04"
STREAM = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # the pickled magic number
LOCAL_HEADER = 30  # bytes, without the name and the extra field
ALIGNMENT = 64


def looks_like(head: bytes) -> bool:
    """Whether a file that starts with `head` (64 bytes or more) can be one of torch."""
    return head.startswith((ZIP, STREAM))


def read(path: pathlib.Path) -> Any:
    """Returns the object in the file: dicts, lists, tuples, scalars, strings and NumPy arrays.

    Tensors and parameters of any device are read-only views of the file. All other objects are
    `restricted_pickle.Stub`. Containers may contain themselves: visit them by
    `restricted_pickle.leaves`.

    Raises:
        InputError: no such file, not one of torch, damaged, or a tensor that cannot be loaded
            without running code.
    """
    try:
        with open(path, "rb") as f:
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # a ValueError: the file is empty
        raise InputError(f"{path} cannot be read: {error}") from error
    try:
        if data[: len(ZIP)] == ZIP:
            return _read_zip(data)
        if data[: len(STREAM)] == STREAM:
            return _read_stream(data)
        raise InvalidFile("is not a weights file of torch: give one that torch.save has written")
    except InvalidFile as error:
        raise InputError(f"{path} {error}") from error
    except Exception as error:  # zipfile, struct and pickle raise many types for garbage
        why = type(error).__name__
        raise InputError(f"{path} is damaged: copy or download it again ({why})") from error


def _read_zip(data: mmap.mmap) -> Any:
    ranges = _zip_ranges(data)
    roots = [name[: -len("data.pkl")] for name in ranges if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise InvalidFile(
            "is a zip archive, but not of torch: give the file that torch.save has written"
        )
    root = roots[0]
    start, end = ranges.get(root + "byteorder", (0, 0))
    if data[start : min(end, start + 9)] not in (b"", b"little"):
        raise InvalidFile("is big-endian: save it again on a little-endian machine")
    start, end = ranges[root + "data.pkl"]
    raw = {
        name.removeprefix(f"{root}data/"): memoryview(data)[first:last]
        for name, (first, last) in ranges.items()
        if name.startswith(f"{root}data/")
    }
    return RestrictedUnpickler(data, start, end, raw).load()


def _zip_ranges(data: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Returns the start and end of each file in the archive, which do not overlap."""
    with zipfile.ZipFile(data) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    if any(x.filename.endswith("/constants.pkl") or "/code/" in x.filename for x in entries):
        raise InvalidFile(f"is a TorchScript program, not weights: {TRUSTED}")
    ranges, last_end = {}, 0
    for entry in entries:
        name = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x41:
            raise InvalidFile(
                "is a compressed or encrypted archive: unpack it and torch.save it again"
            )
        header = entry.header_offset
        if data[header : header + len(ZIP)] != ZIP or header < last_end:
            raise InvalidFile("is damaged: the entries of its archive overlap or are missing")
        name_size, extra_size = struct.unpack("<HH", data[header + 26 : header + LOCAL_HEADER])
        start = header + LOCAL_HEADER + name_size + extra_size
        last_end = start + entry.file_size
        if entry.compress_size != entry.file_size or last_end > len(data):
            raise InvalidFile("is cut off: copy or download it again")
        local_name = data[header + LOCAL_HEADER : header + LOCAL_HEADER + name_size]
        if local_name != name or entry.filename in ranges:
            raise InvalidFile("is damaged: the entries of its archive have ambiguous names")
        ranges[entry.filename] = (start, last_end)
    return ranges


def _read_stream(data: mmap.mmap) -> Any:
    """Reads version, system, content and keys, then the storages, then the content again."""
    values, storages, ends = [], {}, [len(STREAM)]
    for _ in range(4):
        unpickler = RestrictedUnpickler(data, ends[-1], len(data))
        values.append(unpickler.load())
        storages |= unpickler.storages
        ends.append(unpickler.source.position)
    version, system, _, keys = values
    if version != 1001:
        raise InvalidFile("is of an unknown version: save it with a newer torch")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise InvalidFile("is big-endian: save it again on a little-endian machine")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InvalidFile("is damaged: it has no list of storages")
    if sorted(keys) != sorted(storages):
        raise InvalidFile("is damaged: its list of storages does not match its tensors")
    raw, position = {}, ends[-1]
    for key in keys:
        (elements,) = struct.unpack("<q", data[position : position + 8])
        start, position = position + 8, position + 8 + elements * storages[key].dtype.itemsize
        if not start <= position <= len(data):
            raise InvalidFile("is cut off: copy or download it again")
        raw[key] = memoryview(data)[start:position]
    return RestrictedUnpickler(data, ends[2], ends[3], raw).load()


def write(path: pathlib.Path, content: Any) -> None:
    """Writes a file for `torch.load(path, weights_only=True)` in one atomic step.

    The same content gives the same bytes.

    Args:
        path: the file.
        content: nested dicts with string keys and lists of arrays, strings, numbers, bools and
            None. Each array becomes a tensor with its own storage.

    Raises:
        InputError: the content has another type in it.
    """
    arrays = []
    try:
        program = b"\x80\x02" + b"".join(_pickle(content, arrays)) + b"."
    except InvalidFile as error:
        raise InputError(f"{path} cannot be written: {error}") from error
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        _add(archive, "data.pkl", program)
        _add(archive, "byteorder", b"little")
        for key, array in enumerate(arrays):
            _add(archive, f"data/{key}", memoryview(np.asarray(array).reshape(-1).view(np.uint8)))
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Adds a file with aligned content, by an extra field of the header, as torch does."""
    info = zipfile.ZipInfo(f"archive/{name}")  # of 1980-01-01
    info.create_system = 0
    large = len(content) * 1.05 > zipfile.ZIP64_LIMIT  # as zipfile decides
    header = LOCAL_HEADER + len(info.filename) + 20 * large + 4
    padding = -(archive.fp.tell() + header) % ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    archive.writestr(info, content)


def _pickle(value: Any, arrays: list[Any]) -> Iterator[bytes]:
    """Yields the opcodes for `value` and appends its arrays to `arrays`."""
    if isinstance(value, dict):
        yield b"}("
        for key, item in value.items():
            if type(key) is not str:
                raise InvalidFile(f"the key {ascii(key)[:50]} of a dict is not a string")
            yield _pickle_plain(key)
            yield from _pickle(item, arrays)
        yield b"u"
    elif isinstance(value, list):
        yield b"]("
        for item in value:
            yield from _pickle(item, arrays)
        yield b"e"
    elif type(value) in (str, int, float, bool, type(None)):
        yield _pickle_plain(value)
    elif getattr(value, "dtype", None) in NAMES and hasattr(value, "shape"):
        yield from _pickle_tensor(value.shape, NAMES[value.dtype], str(len(arrays)))
        arrays.append(value)
    else:
        kind = getattr(value, "dtype", type(value).__name__)
        raise InvalidFile(f"torch cannot read {kind} with weights_only=True")


def _pickle_plain(value: Any) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]  # without PROTO and STOP


def _pickle_tensor(shape: tuple[int, ...], storage: str, key: str) -> Iterator[bytes]:
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    yield b"ctorch._utils\n_rebuild_tensor_v2\n(("
    yield _pickle_plain("storage") + f"ctorch\n{storage}\n".encode()
    yield from map(_pickle_plain, (key, "cpu", math.prod(shape)))
    yield b"tQ"
    yield from map(_pickle_plain, (0, shape, strides, False))
    yield b"ccollections\nOrderedDict\n)RtR"  # no hooks


NAMES = {dtype: storage for storage, dtype in STORAGES.items()}
