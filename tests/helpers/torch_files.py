# SPDX-License-Identifier: Apache-2.0
"""Builders of torch files, opcode by opcode, that torch itself would not write."""

import io
import pickle
import struct
import zipfile

import numpy as np

from tnt_flax.weights.formats.restricted_pickle import Stub
from tnt_flax.weights.formats.torch import STREAM


def assert_same(found, expected):
    if isinstance(expected, dict):
        assert isinstance(found, dict) and list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected) and len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif expected is Stub:
        assert isinstance(found, Stub)
    elif isinstance(expected, np.ndarray):
        assert type(found) is np.ndarray
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()
    else:
        assert type(found) is type(expected) and found == expected


SIX = bytes(range(24))  # as float32
SIX_IN_STREAM = struct.pack("<q", 6) + SIX


def opcodes(value) -> bytes:
    """What pushes a value, without the first and the last opcode of a pickle."""
    return pickle.dumps(value, 2)[2:-1]


def global_name(module, attribute) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def program(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def archive(content: bytes, storages=None, *, method=zipfile.ZIP_STORED, **other: bytes) -> bytes:
    files = {"data.pkl": content} | other
    files |= {f"data/{key}": x for key, x in (storages or {"0": SIX}).items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as f:
        for key, x in files.items():
            f.writestr(f"x/{key.replace('__', '/')}", x)
    return buffer.getvalue()


def stream(content, keys=("0",), storages=SIX_IN_STREAM, *, version=1001, little_endian=True):
    system = {"little_endian": little_endian}
    parts = [pickle.dumps(x, 2) for x in (version, system)] + [content, pickle.dumps(list(keys), 2)]
    return STREAM + b"".join(parts) + storages


def tensor(offset, size, stride, *, count=6, kind=("torch", "FloatStorage"), key="0", rest=b""):
    """A view of a storage, such as `SIX`, which holds six float32."""
    parts = [
        global_name("torch._utils", "_rebuild_tensor_v2"),
        b"((",
        opcodes("storage"),
        global_name(*kind),
    ]
    parts += [opcodes(key), opcodes("cuda:0"), opcodes(count), rest, b"tQ"]
    parts += [opcodes(x) for x in (offset, size, stride, False)]
    return b"".join(parts) + global_name("collections", "OrderedDict") + b")RtR"
