# SPDX-License-Identifier: Apache-2.0
"""The members of a tar file, by their headers alone, and images that are read where they lie.

Reads what POSIX.1-1988 (ustar), GNU tar (long names) and POSIX.1-2001 (pax) write. A tar that is
compressed has no place that a member could be read from; sparse members have no one place.
"""

import dataclasses
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tnt_flax.core.errors import InputError
from tnt_flax.data.sources import storage
from tnt_flax.data.sources.index import Index

BLOCK = 512  # bytes; headers and contents begin at multiples of it
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_REGULAR = b"0\x007"  # "7" is a contiguous file
_WITHOUT_CONTENTS = b"123456"  # links, devices, folders: whatever their header says of a size
_LONGEST_NAME = 2**20  # bytes of an extended header


class Member(NamedTuple):
    name: str
    start: int  # of the contents, in bytes
    size: int


def members(read: storage.Read, start: int, end: int, what: str) -> Iterator[Member]:
    """The regular files of the tar in bytes [start, end); `what` it is called in a message.

    Raises InputError for a tar that is truncated, damaged, compressed or sparse.
    """
    position, override = start, {}  # override: what extended headers say of the next member
    while True:
        header = read(position, BLOCK)
        if len(header) < BLOCK or position + BLOCK > end:
            raise InputError(f"{what} is truncated: it ends at byte {end} without an end mark")
        if not header[0] and not any(header):
            return
        name, size, kind = _fields(header, position, start, what)
        contents = position + BLOCK
        if kind in b"LKxXg":
            if size > _LONGEST_NAME:
                raise InputError(f"{what} is damaged: a name of {size} bytes at byte {position}")
            if kind == b"L":
                override["path"] = read(contents, size).split(b"\0")[0]
            elif kind in b"xX":
                override |= _pax(read(contents, size), position, what)
        else:
            size = int(override.get("size", size))
            name = override.get("path", name).decode("utf-8", "surrogateescape")
            if kind == b"S" or override.get("sparse"):
                raise InputError(f"{what}: {name} is sparse: pack the tar without --sparse")
            override = {}
            if kind in _WITHOUT_CONTENTS:
                size = 0
            if contents + size > end:
                raise InputError(
                    f"{what} is truncated: {name} should end at byte {contents + size}, but it "
                    f"ends at byte {end}: copy or download it again"
                )
            if kind in _REGULAR and not name.endswith("/"):
                yield Member(name, contents, size)
        position = contents + -(-size // BLOCK) * BLOCK


def _fields(header, position, start, what):
    """Name (bytes), size and type of a header whose checksum is right."""
    try:
        checksum = int(header[148:156].strip(b" \0"), 8)
        size = header[124:136]
        if size[0] & 0x80:  # GNU: binary, for more than 8 GiB
            size = int.from_bytes(size[1:], "big")
        else:
            size = int(size.strip(b" \0") or b"0", 8)
    except ValueError:
        checksum = -1
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        for magic, how in _COMPRESSED.items():
            if position == start and header.startswith(magic):
                raise InputError(
                    f"{what} is compressed ({how}), so nothing in it can be read at random: "
                    "decompress it"
                )
        wrong = "is no tar" if position == start else f"is damaged at byte {position}"
        raise InputError(f"{what} {wrong}: there is no tar header")
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0]
    if prefix and header[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return name, size, header[156:157]


def _pax(data, position, what):
    """Of the records "LENGTH KEY=VALUE\\n" those that say where and what the next member is."""
    found = {}
    while data := data.lstrip(b"\0"):
        length, _, rest = data.partition(b" ")
        key, equals, value = rest[: int(length or b"0") - len(length) - 1].partition(b"=")
        if not equals or not length.isdigit():
            raise InputError(f"{what} is damaged: no pax header at byte {position}")
        if key in (b"path", b"size"):
            found[key.decode()] = value.removesuffix(b"\n")
        elif key.startswith(b"GNU.sparse"):
            found["sparse"] = True
        data = data[int(length) :]
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class TarImages:
    """Images in tar files, where `labels[k]` is the label of those with the text number k."""

    index: Index
    labels: np.ndarray  # int32 [texts]
    class_names: tuple[str, ...]

    @property
    def place(self) -> str:
        return self.index.files[0]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return self.index.read(index), int(self.labels[self.index.text[index]])

    def name_of(self, index: int) -> str:
        path, start, _ = self.index.place(index)
        try:  # the index keeps no names; the header in front of the contents has the (short) one
            header = storage.read(path, start - BLOCK, BLOCK)
            name = tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
        except (OSError, tarfile.HeaderError):
            name = "?"
        return f"{path}: {name} (at byte {start})"
