# SPDX-License-Identifier: Apache-2.0
"""Opens a weights file of any framework, recognized by its content, without running code from it.

Tensors are read on demand. `states` finds the networks among them.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors

from tnt_flax.core.errors import InputError, as_input_error, listed, one_line
from tnt_flax.weights.formats import mindspore, torch
from tnt_flax.weights.formats.restricted_pickle import TRUSTED, NumpyArray, Stub, leaves
from tnt_flax.weights.name_tables import MINDSPORE_TRAINING
from tnt_flax.weights.names import STACKED, unstacked_name

HEADER = "tnt_flax"  # key of the metadata in our own .safetensors files
_NAMES = dict(F16="float16", F32="float32", F64="float64", BF16="bfloat16", BOOL="bool")
SAFETENSORS_DTYPES = _NAMES | dict(I8="int8", I16="int16", I32="int32", I64="int64", U8="uint8")
INDEX = ".index.json"  # of weights in several files, as transformers and accelerate write them
MOST_BLOCKS = 10_000  # a file can claim any number of empty blocks
_PICKLE = "it is a pickle that torch.save did not write (Paddle's are not supported)"
BEGINNINGS = {  # of files that are something else
    b"version https://git-lfs": "it is a git-lfs pointer; fetch the file by `git lfs pull`",
    b"\x80\x02": _PICKLE,
    b"\x80\x04": _PICKLE,
    b"\x89HDF": "it is an HDF5 file, as Keras writes; no published TNT is in that format",
    b"\x1f\x8b": "it is compressed; unpack it with gunzip first",
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, which `read` returns."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclasses.dataclass
class Content:
    """What a file holds."""

    file_format: str  # for messages
    tree: Any  # nested dicts, lists and tuples of tensors (StoredTensor, NumPy), stubs, values
    info: dict[str, Any] = dataclasses.field(default_factory=dict)  # header of our own files
    notes: list[str] = dataclasses.field(default_factory=list)


def open_file(path: pathlib.Path) -> Content:
    """Opens a weights file.

    Raises:
        InputError: no such file, an unknown format, damaged, or a pickled object.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a pipe or device: save the weights to a file first")
    with as_input_error(f"cannot read {path}"), open(path, "rb") as f:
        head = f.read(512)
    if path.name.endswith(INDEX):
        return _open_shards(path)
    if torch.looks_like(head):
        return _open_torch(path)
    if len(head) > 8 and int.from_bytes(head[:8], "little") < 1 << 40 and head[8:9] == b"{":
        return _open_safetensors(path)
    if mindspore.looks_like(head):
        return _open_mindspore(path)
    raise InputError(f"{path} is not a weights file: {_guess(head)}")


def stored_tensor(x: Any) -> Any:
    """Returns a NumPy array as a StoredTensor, and anything else unchanged."""
    x = x.value if isinstance(x, NumpyArray) and x.value is not None else x
    if not isinstance(x, np.ndarray):
        return x
    return StoredTensor(x.shape, x.dtype, functools.partial(np.asarray, x))


def _guess(head: bytes) -> str:
    if not head:
        return "it is empty"
    if head.lstrip()[:1] == b"<":
        return "it is a web page; download the file itself"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it first"
    for start, text in BEGINNINGS.items():
        if head.startswith(start):
            return text
    return "neither torch's (.pth, .bin), nor safetensors, nor a MindSpore checkpoint (.ckpt)"


def _open_safetensors(path: pathlib.Path) -> Content:
    """Opens a .safetensors file; stacked blocks of our own files become one tensor per block."""
    tensors = {}
    try:
        file = safetensors.safe_open(path, framework="numpy")
        info = json.loads((file.metadata() or {}).get(HEADER, "{}"))
        for name in file.keys():
            stored = file.get_slice(name)
            shape = tuple(stored.get_shape())
            dtype = np.dtype(SAFETENSORS_DTYPES.get(stored.get_dtype(), object))
            match = STACKED.fullmatch(name)
            if match and shape and shape[0] <= MOST_BLOCKS:
                for i in range(shape[0]):
                    read = functools.partial(stored.__getitem__, i)
                    tensors[unstacked_name(match, i)] = StoredTensor(shape[1:], dtype, read)
            else:
                read = functools.partial(file.get_tensor, name)
                tensors[name] = StoredTensor(shape, dtype, read)
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path} is not a complete safetensors file: copy or download it again "
            f"({one_line(error)})"
        ) from error
    if not isinstance(info, dict):
        raise InputError(f"{path} has a {HEADER!r} header that is not an object")
    return Content("safetensors", tensors, info)


def _open_shards(path: pathlib.Path) -> Content:
    """Opens the files that an index lists, as one state dict."""
    try:
        files = json.loads(path.read_text("utf-8"))["weight_map"]
        shards = sorted(set(files.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not an index of weights: {one_line(error)}") from error
    if not shards:
        raise InputError(f"{path} lists no weights")
    tree: dict[str, Any] = {}
    for shard in shards:
        if not _is_shard_name(shard):
            raise InputError(f"{path} lists {ascii(shard)[:50]}, which is not a file beside it")
        content = open_file(path.parent / shard)
        tree |= content.tree if isinstance(content.tree, dict) else {}
    if missing := [name for name in files if name not in tree]:
        raise InputError(f"{path} lists {listed(missing, limit=3)}, which its files do not have")
    return Content(f"{len(shards)} files of {content.file_format}", tree, notes=content.notes)


def _is_shard_name(name: Any) -> bool:
    """Whether `name` can be a file of weights beside an index, but not an index itself."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and pathlib.PurePath(name).name == name
        and not name.endswith(INDEX)
    )


def _open_torch(path: pathlib.Path) -> Content:
    content = torch.read(path)
    if isinstance(content, Stub):
        raise InputError(f"{path} holds {described(content)}; {TRUSTED}")
    stubs = {x.name for x in leaves(content) if isinstance(stored_tensor(x), Stub)}
    notes = [f"ignored objects of {listed(sorted(stubs), limit=3)}"] if stubs else []
    return Content("torch file", content, notes=notes)


def described(stub: Stub) -> str:
    return f"an object of {stub.name}, which is not loaded"


def _open_mindspore(path: pathlib.Path) -> Content:
    state = mindspore.read(path)
    ignored = [name for name in state if re.fullmatch(MINDSPORE_TRAINING, name)]
    for name in ignored:
        del state[name]
    notes = (
        [f"ignored {len(ignored)} values of its trainer, such as {ignored[0]}"] if ignored else []
    )
    return Content("MindSpore checkpoint", state, notes=notes)
