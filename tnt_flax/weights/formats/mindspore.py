# SPDX-License-Identifier: Apache-2.0
"""MindSpore's .ckpt files, read and written without MindSpore.

    Checkpoint   1: Value, repeated
    Value        1: tag     2: TensorProto     3: MapTensorProto
    TensorProto  1: dims, repeated     2: tensor_type     3: tensor_content

Such a file is one protobuf message; a tensor of more than `SLICE` bytes is several Values with the
same tag. The walker below reads it from a memory map and leaves the content where it lies: the
protobuf library would hold a file of 260 MB three times. It takes what MindSpore writes and
refuses all else, fields that protobuf would pass over included: there they are a sign of damage.
"""

import itertools
import math
import mmap
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from tnt_flax.core.errors import InputError

SLICE = 512 * 2**20  # what MindSpore puts into one Value
CRC_MARK, CRC_BYTES = b"crc_num", 10  # save_checkpoint(crc_check=True) ends with these
ENCRYPTED = tuple(mode + b"\x5e\x3a\x7f" for mode in (b"\xd8", b"\xd9", b"\xda"))
NUMBER, BYTES = 0, 2  # protobuf's wire types
MAX_DIMS = 32
_WHOLE = "Int8 Int16 Int32 Int64 UInt8 UInt16 UInt32 UInt64 Float16 Float32 Float64 Bool"
DTYPES = {name: np.dtype(name.lower()) for name in _WHOLE.split()}
DTYPES["BFloat16"] = np.dtype(ml_dtypes.bfloat16)
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Fault(Exception):
    """What is wrong with a file, and what to do about it."""

    def __init__(self, fault: str, advice: str = "fetch or copy it again"):
        super().__init__(f"{fault[:300]}; {advice}")


class _Part(NamedTuple):
    """One Value: a tensor, or a slice of one."""

    tag: str
    dims: tuple[int, ...]
    kind: str
    content: memoryview


def looks_like(head: bytes) -> bool:
    """Whether a file is MindSpore's, encrypted ones included, by its first 512 bytes or more."""
    try:
        value, at = _varint(head, 0)
        _, at = _varint(head, at)
        tag, at = _varint(head, at)
        length, at = _varint(head, at)
    except _Fault:
        return head.startswith(ENCRYPTED)
    name, after = head[at : at + length], head[at + length : at + length + 1]
    is_name = length > 0 and name.isascii() and name.decode().isprintable()
    is_plain = value == tag == (1 << 3 | BYTES) and is_name and after in (b"\x12", b"\x1a")
    return is_plain or head.startswith(ENCRYPTED)


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a .ckpt by name, in the order of the file; nobody can write into them.

    They are views into the file, not necessarily aligned, or copies where it holds them in slices.
    What `append_dict` added is among them: numbers and strings as arrays of rank 0.

    Raises:
        InputError: the file is missing, damaged, encrypted, or holds a type unknown to numpy.
    """
    try:
        with open(path, "rb") as f:
            if not os.fstat(f.fileno()).st_size:
                raise _Fault("it is empty")
            return _read(memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from error
    except _Fault as fault:
        raise InputError(f"{path} is not a readable MindSpore checkpoint: {fault}") from fault


def write(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a .ckpt that `mindspore.load_checkpoint` reads, in one atomic step.

    Raises:
        InputError: a type that such files do not have, or a tensor without elements.
        OSError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            for tag, array in tensors.items():
                f.writelines(_messages(tag, np.asarray(array)))
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(view: memoryview) -> dict[str, np.ndarray]:
    if bytes(view[:4]) in ENCRYPTED:
        raise _Fault("it is encrypted", "load it in MindSpore with its key, save it without one")
    end = len(view) - len(CRC_MARK) - CRC_BYTES
    if end >= 0 and view[end : end + len(CRC_MARK)] == CRC_MARK:
        if zlib.crc32(view[:end]) != int.from_bytes(view[-CRC_BYTES:], "big"):
            raise _Fault("its CRC-32 does not match its content")
        view = view[:end]
    parts = (_part(value) for _, value in _fields(view, {1: BYTES}))
    tensors = {}
    for tag, group in itertools.groupby(parts, key=lambda part: part.tag):
        if tag in tensors:
            raise _Fault(f"{tag!r} occurs twice")
        tensors[tag] = _array(list(group))
    return tensors


def _part(view: memoryview) -> _Part:
    fields = list(itertools.islice(_fields(view, {1: BYTES, 2: BYTES, 3: BYTES}), 3))
    numbers = [number for number, _ in fields]
    if numbers == [1, 3]:
        raise _Fault("it holds a hash table (MapParameter)", "save the network without it")
    if numbers != [1, 2]:
        raise _Fault("an entry is not one name and one tensor")
    (_, tag), (_, tensor) = fields
    fields = _fields(tensor, {1: NUMBER, 2: BYTES, 3: BYTES})
    fields = list(itertools.islice(fields, MAX_DIMS + 3))  # damage may look like a million dims
    numbers = [number for number, _ in fields]
    if numbers[-2:] != [2, 3] or set(numbers[:-2]) - {1}:
        raise _Fault("a tensor is not dims, type and content")
    *dims, kind, content = (value for _, value in fields)
    return _Part(_text(tag, "utf-8"), tuple(dims), _text(kind, "utf-8"), content)


def _array(parts: list[_Part]) -> np.ndarray:
    tag, dims, kind, content = parts[0]
    if any(part[:3] != (tag, dims, kind) for part in parts):
        raise _Fault(f"the slices of {tag!r} differ in shape or type")
    content = content if len(parts) == 1 else b"".join(part.content for part in parts)
    if kind == "str":  # numpy's: four bytes for a character
        array = np.array(_text(content, "utf-32-le"))
        array.flags.writeable = False
        return array
    if kind not in DTYPES:
        raise _Fault(f"{tag!r} is of type {kind!r}", f"known are {', '.join(DTYPES)}")
    dims = () if dims == (0,) and content else dims  # a scalar, in older versions
    if len(dims) > MAX_DIMS or math.prod(dims) * DTYPES[kind].itemsize != len(content):
        raise _Fault(f"{tag!r} has {len(content)} bytes, not those of {kind}{list(dims)}")
    if kind == "Bool" and np.frombuffer(content, np.uint8).max(initial=0) > 1:
        raise _Fault(f"{tag!r} is of type Bool, but has other bytes than 0 and 1")
    try:
        return np.ndarray(dims, DTYPES[kind], content)
    except ValueError as error:  # no bytes at all, but dims beyond what numpy can count
        raise _Fault(f"{tag!r} has impossible dims {list(dims)}") from error


def _text(view: memoryview | bytes, encoding: str) -> str:
    try:
        return str(view, encoding)
    except UnicodeDecodeError as error:
        raise _Fault(f"a text in it is not {encoding}") from error


def _fields(view: memoryview, wire: dict[int, int]) -> Iterator[tuple[int, int | memoryview]]:
    """The number and the value of every field of a message; `wire` says which may occur."""
    at = 0
    while at < len(view):
        key, at = _varint(view, at)
        number, kind = key >> 3, key & 7
        if wire.get(number) != kind:
            raise _Fault(f"unexpected field {number} of wire type {kind}")
        value, at = _varint(view, at)
        if kind == BYTES:
            start, at = at, at + value
            if at > len(view):
                raise _Fault(f"a field of {value} bytes where {len(view) - start} are left")
            value = view[start:at]
        yield number, value


def _varint(view: memoryview | bytes, at: int) -> tuple[int, int]:
    """The number that begins at index `at`, and the index after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            raise _Fault("it ends in the middle of a number")
        byte = view[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _Fault("a number in it has more than 64 bits")


def _messages(tag: str, array: np.ndarray) -> Iterator[bytes | memoryview]:
    """The Values of one tensor: for each slice what precedes the content, then the content."""
    if array.dtype.kind == "U" and not array.ndim:
        kind, dims, content = "str", (0,), str(array).encode("utf-32-le") or bytes(4)
    else:
        array = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
        kind, dims = NAMES.get(array.dtype), array.shape
        if kind is None or not array.size:
            raise InputError(
                f"{tag!r} is {array.dtype}{list(dims)}: a MindSpore checkpoint has no tensors "
                f"without elements, and of types only {', '.join(DTYPES)}; convert it or leave it"
            )
        content = array.reshape(-1).view(np.uint8).data
    head = b"".join(b"\x08" + _number(dim) for dim in dims) + _field(2, kind.encode())
    for start in range(0, len(content), SLICE):
        piece = content[start : start + SLICE]
        tensor = head + b"\x1a" + _number(len(piece))
        value = _field(1, tag.encode()) + b"\x12" + _number(len(tensor) + len(piece)) + tensor
        yield b"\x0a" + _number(len(value) + len(piece)) + value
        yield piece


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | BYTES]) + _number(len(content)) + content


def _number(value: int) -> bytes:
    septets = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([septet | 128 for septet in septets[:-1]] + septets[-1:])
