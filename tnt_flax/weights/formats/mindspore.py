# SPDX-License-Identifier: Apache-2.0
"""Reads and writes MindSpore's .ckpt files without MindSpore.

A file is one protobuf message: the `Checkpoint` of MindSpore's `train/checkpoint.proto`, whose part
for tensors is declared in `SCHEMA`. A tensor of more than `SLICE` bytes is stored as several values
with the same tag. Only what MindSpore writes is accepted: an unknown or repeated field, which
protobuf would ignore, is a sign of damage. Reading takes about three times the size of the file in
memory at its peak, as protobuf keeps copies; the arrays take its size.
"""

import itertools
import math
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from tnt_flax.core.errors import InputError
from tnt_flax.core.files import write_atomic
from tnt_flax.weights.formats.restricted_pickle import InvalidFile

SCHEMA = {  # message: its fields, numbered from 1
    "Tensor": ["repeated int64 dims", "required bytes type", "required bytes content"],
    "Value": ["required bytes tag", "optional Tensor tensor"],
    "Checkpoint": ["repeated Value value"],
}
SLICE = 512 * 2**20  # largest content of one value
LARGEST = 2**31 - 1  # bytes of a protobuf message
CRC_MARK, CRC_BYTES = b"crc_num", 10  # the end of a file of save_checkpoint(crc_check=True)
ENCRYPTED = tuple(mode + b"\x5e\x3a\x7f" for mode in (b"\xd8", b"\xd9", b"\xda"))
# The first value: its length, the length of its name (one or two bytes), the name, the next tag.
START = re.compile(
    rb"\n[\x80-\xff]{0,9}[\0-\x7f]\n([\x01-\x7f]|[\x80-\xff][\x01-\x7f])[ -~]+[\x12\x1a]"
)
MAX_DIMS = 32
_NUMPY = "Int8 Int16 Int32 Int64 UInt8 UInt16 UInt32 UInt64 Float16 Float32 Float64 Bool"
DTYPES = {name: np.dtype(name.lower()) for name in _NUMPY.split()}
DTYPES["BFloat16"] = np.dtype(ml_dtypes.bfloat16)
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _checkpoint_class() -> type[message.Message]:
    """Returns the message class `Checkpoint` of `SCHEMA`."""
    package = "tnt_flax.mindspore"
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package)
    for name, fields in SCHEMA.items():
        declared = file.message_type.add(name=name)
        for number, (label, kind, field) in enumerate(map(str.split, fields), 1):
            declared.field.add(
                name=field,
                number=number,
                label=f"LABEL_{label.upper()}",
                type="TYPE_MESSAGE" if kind in SCHEMA else f"TYPE_{kind.upper()}",
                type_name=f".{package}.{kind}" if kind in SCHEMA else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.Checkpoint"))


Checkpoint = _checkpoint_class()


def looks_like(head: bytes) -> bool:
    """Whether a file that starts with `head` (512 bytes) is MindSpore's, possibly encrypted."""
    return head.startswith(ENCRYPTED) or START.match(head) is not None


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a .ckpt by name, in the order of the file, as read-only arrays.

    They include the numbers of `append_dict`, as arrays of rank 0. Strings are left out.

    Raises:
        InputError: the file is missing, damaged or encrypted, or has a type unknown to NumPy.
    """
    try:
        return _read(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from error
    except InvalidFile as error:
        raise InputError(f"{path} is not a readable MindSpore checkpoint: {error}") from error


def write(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a .ckpt that `mindspore.load_checkpoint` reads, in one atomic step.

    Raises:
        InputError: a dtype that such files do not have, or a tensor without elements.
        OSError: the disk is full, or the folder is not writable.
    """

    def write_values(file) -> None:
        for tag, array in tensors.items():
            file.writelines(_messages(tag, np.asarray(array)))

    write_atomic(path, write_values, fsync=True)


def _invalid(fault: str, advice: str = "fetch or copy it again") -> InvalidFile:
    return InvalidFile(f"{fault[:300]}; {advice}")


def _read(data: bytes) -> dict[str, np.ndarray]:
    if data[:4] in ENCRYPTED:
        raise _invalid("it is encrypted", "load it in MindSpore with its key, save it without one")
    if len(data) > LARGEST:
        raise _invalid("it has more than 2 GiB", "save the weights without the optimizer state")
    end = len(data) - len(CRC_MARK) - CRC_BYTES
    if end >= 0 and data[end : end + len(CRC_MARK)] == CRC_MARK:
        if zlib.crc32(memoryview(data)[:end]) != int.from_bytes(data[-CRC_BYTES:], "big"):
            raise _invalid("its CRC-32 does not match its content")
        data = data[:end]
    tensors = {}
    for tag, values in itertools.groupby(_parsed(data).value, key=lambda value: value.tag):
        name = tag.decode(errors="backslashreplace")
        if name in tensors:
            raise _invalid(f"{name!r} occurs twice")
        tensors[name] = _array(name, list(values))
    return {name: x for name, x in tensors.items() if x is not None}


def _parsed(data: bytes) -> Any:
    checkpoint = Checkpoint()
    try:
        checkpoint.ParseFromString(data)
    except (message.DecodeError, RecursionError) as error:
        raise _invalid("its protobuf message is damaged or cut off") from error
    if not all(value.HasField("tensor") for value in checkpoint.value):
        raise _invalid("a value in it has no tensor", "save it without hash tables (MapParameter)")
    checkpoint.DiscardUnknownFields()
    complete = checkpoint.IsInitialized()
    sizes = [value.ByteSize() for value in checkpoint.value] if complete else []
    if len(data) != sum(1 + max(1, math.ceil(size.bit_length() / 7)) + size for size in sizes):
        raise _invalid("it has missing, repeated or unknown fields")
    return checkpoint


def _array(name: str, values: list[Any]) -> np.ndarray | None:
    """Returns the tensor that is stored in `values`, its slices; None for a string."""
    first = values[0].tensor
    dims, kind = tuple(first.dims), first.type.decode(errors="backslashreplace")
    if any((v.tensor.dims, v.tensor.type) != (first.dims, first.type) for v in values):
        raise _invalid(f"the slices of {name!r} differ in shape or type")
    content = b"".join(value.tensor.content for value in values)
    if kind == "str":
        return None
    if kind not in DTYPES:
        raise _invalid(f"{name!r} is of type {kind!r}", f"known are {', '.join(DTYPES)}")
    dims = () if dims == (0,) and content else dims  # a scalar, in older versions
    if len(dims) > MAX_DIMS or math.prod(dims) * DTYPES[kind].itemsize != len(content):
        raise _invalid(f"{name!r} has {len(content)} bytes, not those of {kind}{list(dims)}")
    try:
        return np.ndarray(dims, DTYPES[kind], content)
    except ValueError as error:  # negative, or without elements but beyond NumPy's range
        raise _invalid(f"{name!r} has impossible dims {list(dims)}") from error


def _messages(tag: str, array: np.ndarray) -> Iterator[bytes]:
    """Yields one message per slice of a tensor. A file is their concatenation."""
    array = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
    kind = NAMES.get(array.dtype)
    if kind is None or not array.size:
        raise InputError(
            f"{tag!r} is {array.dtype}{list(array.shape)}: a MindSpore checkpoint has no tensors "
            f"without elements, and only the types {', '.join(DTYPES)}; convert or remove it"
        )
    content = array.reshape(-1).view(np.uint8).data
    for start in range(0, len(content), SLICE):
        piece = bytes(content[start : start + SLICE])
        tensor = {"dims": array.shape, "type": kind.encode(), "content": piece}
        yield Checkpoint(value=[{"tag": tag.encode(), "tensor": tensor}]).SerializeToString()
