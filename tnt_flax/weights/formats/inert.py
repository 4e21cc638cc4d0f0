# SPDX-License-Identifier: Apache-2.0
"""What the names in a torch pickle stand for: inert values, made by pure functions.

Whatever a file passes to them ends as a value or as a Fault. None of them finds, imports, calls or
changes anything but the value that it makes.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

MOST_ELEMENTS = 2**48
MOST_AXES = 32
TRUSTED = "if you trust where it comes from, load it there and save its state_dict alone"


class Fault(Exception):
    """What is wrong with a file: the rest of a sentence that begins with its name."""


class Namespace(dict):
    """The values of a pickled argparse.Namespace."""

    def set_state(self, state: Any) -> None:
        if type(state) is not dict or self:
            raise Fault("has an argparse.Namespace without values: refused")
        self.update(state)


@dataclasses.dataclass(frozen=True)
class Known:
    """What stands for a name that a pickle may mention."""

    name: str
    make: Callable[..., Any] | None = None  # for REDUCE and NEWOBJ
    storage: np.dtype | None = None  # of the elements, if the name is a storage type
    dtype: str | None = None  # if the name is a dtype of torch


@dataclasses.dataclass(frozen=True)
class Storage:
    key: str
    dtype: np.dtype
    size: int  # in elements


@dataclasses.dataclass(frozen=True)
class Tensor:
    storage: Storage
    offset: int  # this and the strides are in elements of `dtype`
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    def view(self, raw: memoryview) -> np.ndarray:
        """The tensor in `raw`, the bytes of its storage: a view of them, read-only if they are."""
        step = self.dtype.itemsize
        strides = tuple(step * n for n in self.strides)
        offset = self.offset * step if math.prod(self.shape) else 0
        return np.ndarray(self.shape, self.dtype, raw, offset, strides)


class NumpyDtype:
    """A dtype of numbers, in the two steps in which numpy pickles it."""

    def __init__(self, code: str):
        self.code, self.order = code, "="

    def set_state(self, state: Any) -> None:
        order = state[1] if type(state) is tuple and len(state) > 1 else None
        if order not in ("<", ">", "|"):
            raise Fault("has a numpy array of unknown byte order: refused")
        self.order = order

    def whole(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class NumpyArray:
    """An array of numbers, empty until its state is set."""

    value: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5 or type(state[2]) is not NumpyDtype:
            raise Fault("has a numpy array without a dtype: refused")
        shape, dtype, content = state[1], state[2].whole(), state[4]
        fits = _sensible(shape) and type(content) is bytes
        if not fits or len(content) != math.prod(shape) * dtype.itemsize:
            raise Fault("has a numpy array of the wrong size: refused")
        self.value = np.ndarray(shape, dtype, content, order="F" if state[3] else "C")

    def whole(self) -> np.ndarray:
        if self.value is None:
            raise Fault("has a numpy array without content: refused")
        return self.value


def _sensible(numbers: tuple) -> bool:
    """As a shape or as strides. Then no product or sum of them is slow, or too much for numpy."""
    return (
        type(numbers) is tuple
        and len(numbers) <= MOST_AXES
        and all(type(n) is int and 0 <= n <= MOST_ELEMENTS for n in numbers)
        and math.prod(n or 1 for n in numbers) <= MOST_ELEMENTS
    )


def _rebuild_tensor(storage, offset, size, stride, *extra, dtype=None) -> Tensor:
    """`extra`: requires_grad and hooks, which are of no use here, and flags such as "conjugate"."""
    if type(storage) is not Storage or any(extra[2:]):
        raise Fault("has a tensor that is more than a view of a storage: refused")
    if not _sensible(size) or not _sensible((offset,)) or type(stride) is not tuple:
        raise Fault("has a tensor of an absurd shape: refused")
    if len(stride) != len(size) or not all(_sensible((step,)) for step in stride):
        raise Fault("has a tensor with absurd strides: refused")
    dtype = dtype or storage.dtype
    room = storage.size * storage.dtype.itemsize // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > room or (math.prod(size) and last >= room):
        raise Fault(f"has a tensor {size} that leaves its storage of {room} elements: refused")
    return Tensor(storage, offset, size, stride, dtype)


def _rebuild_tensor_v3(storage, offset, size, stride, gradient, hooks, dtype, *flags) -> Tensor:
    if not isinstance(dtype, Known) or dtype.dtype not in DTYPES:
        raise Fault(f"has a tensor of {getattr(dtype, 'dtype', None)}: refused")
    found = np.dtype(DTYPES[dtype.dtype])
    return _rebuild_tensor(storage, offset, size, stride, gradient, hooks, *flags, dtype=found)


def _rebuild_parameter(tensor, *_) -> Tensor:
    if type(tensor) is not Tensor:
        raise Fault("has a parameter without a tensor: refused")
    return tensor


def _size(numbers=()) -> tuple:
    if not _sensible(numbers):
        raise Fault("has a torch.Size without numbers: refused")
    return numbers


def _device(kind, index=None) -> str:
    if type(kind) is not str or len(kind) > 50 or type(index) not in (int, type(None)):
        raise Fault("has a torch.device without a name: refused")
    return kind if index is None else f"{kind}:{index}"


def _encode(text, encoding) -> bytes:
    """How numpy's bytes are written in protocol 2."""
    if type(text) is not str or encoding != "latin1":
        raise Fault("asks for an encoding other than latin1: refused")
    return text.encode("latin1")


def _numpy_dtype(code, *_) -> NumpyDtype:
    if type(code) is not str or not re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16", code):
        kind = "Python objects" if code in ("O", "O8") else ascii(code)[:20]
        raise Fault(f"holds a numpy array of {kind}: refused; {TRUSTED}")
    return NumpyDtype(code)


def _numpy_scalar(dtype, content) -> np.generic:
    dtype = dtype.whole() if type(dtype) is NumpyDtype else None
    if dtype is None or type(content) is not bytes or len(content) != dtype.itemsize:
        raise Fault("has a numpy scalar of the wrong size: refused")
    return np.frombuffer(content, dtype)[0]


def _numpy_array(kind, *_) -> NumpyArray:
    if not isinstance(kind, Known) or kind.name != "numpy ndarray":
        raise Fault("has a numpy array of an unknown class: refused")
    return NumpyArray()


# What the dtypes of torch are in numpy; those in OTHER_DTYPES are known by name only.
DTYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "bool": np.bool_,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "int8": np.int8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "uint8": np.uint8,
}
OTHER_DTYPES = ("complex64", "complex128", "float8_e4m3fn", "float8_e5m2")
STORAGES = {
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ShortStorage": "int16",
}
CALLS = {  # each checks what it is given
    "__builtin__ bytes": lambda: b"",
    "_codecs encode": _encode,
    "argparse Namespace": lambda: Namespace(),
    "collections OrderedDict": lambda: {},
    "numpy dtype": _numpy_dtype,
    "numpy._core.multiarray _reconstruct": _numpy_array,
    "numpy._core.multiarray scalar": _numpy_scalar,
    "numpy.core.multiarray _reconstruct": _numpy_array,
    "numpy.core.multiarray scalar": _numpy_scalar,
    "torch Size": _size,
    "torch device": _device,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "torch._utils _rebuild_parameter_with_state": _rebuild_parameter,
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v3": _rebuild_tensor_v3,
}
_VALUES = [Known(name, make=make) for name, make in CALLS.items()]
_VALUES += [Known(f"torch {name}", dtype=name) for name in (*DTYPES, *OTHER_DTYPES)]
_VALUES += [Known(f"torch {x}", storage=np.dtype(DTYPES[name])) for x, name in STORAGES.items()]
_VALUES += [Known("torch.storage UntypedStorage", storage=np.dtype(np.uint8))]
_VALUES += [Known("numpy ndarray")]
KNOWN = {value.name: value for value in _VALUES}
"""Every name that a file may mention, as "module name". There are no others."""
