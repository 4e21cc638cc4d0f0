# SPDX-License-Identifier: Apache-2.0
"""Opens a weights file of any framework, recognized by its content, without running code from it.

The result is one flat set of named tensors, which are read on demand.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors

from tnt_flax.core.errors import InputError, listed, one_line
from tnt_flax.weights.formats import mindspore, torch
from tnt_flax.weights.formats.restricted_pickle import TRUSTED, Stub, leaves
from tnt_flax.weights.name_tables import MINDSPORE_TRAINING
from tnt_flax.weights.names import STACKED, unstacked_name

HEADER = "tnt_flax"  # key of the metadata in our own .safetensors files
# Keys of the weights in trainers' checkpoints: huawei's and timm's, DeiT's, mmengine's.
RAW_STATES = ("state_dict", "model")
EMA_STATES = ("state_dict_ema", "model_ema", "ema_state_dict")
# Prefixes that wrappers add to all names.
WRAPPERS = re.compile(r"((module|_orig_mod|model|network|_backbone|_network)\.)*")
_NAMES = dict(F16="float16", F32="float32", F64="float64", BF16="bfloat16", BOOL="bool")
SAFETENSORS_DTYPES = _NAMES | dict(I8="int8", I16="int16", I32="int32", I64="int64", U8="uint8")
MOST_BLOCKS = 10_000  # a file can claim any number of empty blocks
# Counters among the tensors of some EMA weights.
COUNTERS = ("steps", "n_averaged")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, which `read` returns."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclasses.dataclass
class Content:
    """The weights in a file."""

    file_format: str  # for messages
    tensors: dict[str, StoredTensor]
    info: dict[str, Any] = dataclasses.field(default_factory=dict)  # header of our own files
    weights: str | None = None  # "ema" or "raw" if the file states it
    notes: list[str] = dataclasses.field(default_factory=list)


def open_file(path: pathlib.Path, weights: str) -> Content:
    """Opens a weights file.

    Args:
        path: the file.
        weights: "ema" or "raw", for files that hold both.

    Raises:
        InputError: no such file, an unknown format, damaged, a tensor that cannot be loaded without
            running code, or no set of named tensors.
    """
    try:
        with open(path, "rb") as f:
            head = f.read(512)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if torch.looks_like(head):
        return _open_torch(path, weights)
    if len(head) > 8 and int.from_bytes(head[:8], "little") < 1 << 40 and head[8:9] == b"{":
        return _open_safetensors(path)
    if mindspore.looks_like(head):
        return _open_mindspore(path)
    raise InputError(f"{path} is not a weights file: {_guess(head)}")


def _stored(arrays: Mapping[str, np.ndarray]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(x.shape, x.dtype, functools.partial(np.asarray, x))
        for name, x in arrays.items()
    }


def _guess(head: bytes) -> str:
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer; fetch the file itself with `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "it is a web page; download the file itself"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it first"
    if head[:2] == b"\x80\x02" or head[:2] == b"\x80\x04":
        return "it is a pickle that torch.save did not write (Paddle's are not supported)"
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
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is not a complete safetensors file: {one_line(error)}") from error
    if not isinstance(info, dict):
        raise InputError(f"{path} has a {HEADER!r} header that is not an object")
    return Content("safetensors", tensors, info)


def _open_torch(path: pathlib.Path, weights: str) -> Content:
    content = torch.read(path)
    if isinstance(content, Stub):
        raise InputError(f"{path} holds {_described(content)}; {TRUSTED}")
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    raw = next((key for key in RAW_STATES if _is_state(content.get(key))), None)
    ema = next((key for key in EMA_STATES if _is_state(content.get(key))), None)
    state, which, notes = content, None, []
    if ema and weights == "ema":
        state, which = content[ema], "ema"
        notes.append(f"took the EMA weights, {ema}; weights='raw' takes {raw or 'nothing'}")
    elif raw:
        state, which = content[raw], "raw"
        notes.append(f"took {raw}; " + (f"{ema} is there too" if ema else "there is no EMA"))
    elif ema:
        raise InputError(f"{path} holds only EMA weights ({ema}): set weights='ema'")
    if not _is_state(state):
        found = [
            ascii(key)[:50] + (f" ({_described(x)})" if isinstance(x, Stub) else "")
            for key, x in state.items()
        ]
        raise InputError(f"{path} holds no set of named tensors, but {listed(found) or 'nothing'}")
    for name, x in state.items():
        if isinstance(x, Stub):
            raise InputError(f"{path}: {name!r} is not a tensor, but {_described(x)}")
    if ignored := {x.name for x in leaves(content) if isinstance(x, Stub)}:
        notes.append(f"ignored objects of {listed(sorted(ignored), limit=3)}")
    state, more = _unwrapped(state)
    return Content("torch file", _stored(state), weights=which, notes=notes + more)


def _described(stub: Stub) -> str:
    return f"an object of {stub.name}, which is not loaded"


def _open_mindspore(path: pathlib.Path) -> Content:
    state = mindspore.read(path)
    ignored = [name for name in state if re.fullmatch(MINDSPORE_TRAINING, name)]
    for name in ignored:
        del state[name]
    state, notes = _unwrapped(state)
    if ignored:
        notes.append(f"ignored {len(ignored)} values of its trainer, such as {ignored[0]}")
    return Content("MindSpore checkpoint", _stored(state), notes=notes)


def _is_state(state: Any) -> bool:
    """Whether `state` is a dictionary of named tensors, some of which may not be loadable."""
    return (
        isinstance(state, dict)
        and all(isinstance(k, str) for k in state)
        and all(isinstance(x, np.ndarray | Stub) for x in state.values())
        and any(isinstance(x, np.ndarray) for x in state.values())
    )


def _unwrapped(state: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Removes counters, and prefixes of wrappers that all names share; returns notes on both."""
    notes = [f"ignored {name}, a counter" for name in COUNTERS if name in state]
    state = {name: x for name, x in state.items() if name not in COUNTERS}
    prefix = WRAPPERS.match(os.path.commonprefix(list(state)))[0]
    state = {name.removeprefix(prefix): x for name, x in state.items()}
    return state, notes + ([f"removed the prefix {prefix!r}"] if prefix else [])
