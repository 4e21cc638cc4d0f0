# SPDX-License-Identifier: Apache-2.0
"""Unpickles the content of torch files without running anything that a file names.

A pickle is a program that may call any importable function. `RestrictedUnpickler` never imports:
`find_class` returns entries of a whitelist, whose functions check their arguments and return views
of the file, or a `Stub` for every other name. Calling a stub, or setting its items or attributes,
has no effect, so a trainer's objects beside the weights are harmless.

The base class is `pickle._Unpickler`, the Python implementation. The C implementation hashes
dictionary keys before anything can look at them: a 1 MB pickle with a deeply nested tuple as a key
overflows the stack and ends the process, and 60 nested pairs of shared tuples take forever. It also
allocates its memo by the index in LONG_BINPUT. A scan of the opcodes cannot see what is on the
stack, so it cannot prevent the first two. Here, keys are checked first, the memo is a dictionary,
unneeded opcodes (EXT, INST, PERSID, ...) are refused, and reads are bounded.
"""

import dataclasses
import math
import mmap
import pickle
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

LARGEST = 2**28  # bytes of one pickle, which may include large objects of a trainer
MOST_READS = 2**21  # one or two per opcode; a TNT-B with its optimizer state takes 0.1 million
MOST_ELEMENTS = 2**48
MOST_AXES = 32
KEYS = (str, int, float, bool, type(None))
DENSE = "save dense tensors of float32, float16 or bfloat16 instead"
TRUSTED = "if you trust its source, load it there and save only its state_dict"
# NumPy's equivalents of torch's storage types.
STORAGES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "BoolStorage": np.dtype("bool"),
    "ByteStorage": np.dtype("uint8"),
    "CharStorage": np.dtype("int8"),
    "DoubleStorage": np.dtype("float64"),
    "FloatStorage": np.dtype("float32"),
    "HalfStorage": np.dtype("float16"),
    "IntStorage": np.dtype("int32"),
    "LongStorage": np.dtype("int64"),
    "ShortStorage": np.dtype("int16"),
}


NUMBERS = frozenset("f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 b1".split())  # NumPy's codes


class InvalidFile(Exception):
    """A file is damaged or not supported. The message continues a sentence that starts with it."""


@dataclasses.dataclass(eq=False)
class Stub:
    """An inert placeholder for a class, function or object of the file."""

    name: str  # "module.qualified_name"


@dataclasses.dataclass(eq=False)
class NumpyArray(Stub):
    """A pickled array of numbers; one of objects has no value."""

    name: str = "numpy.ndarray"
    value: np.ndarray | None = None


@dataclasses.dataclass(eq=False)
class EncodedBytes(Stub):
    """Bytes, which protocol 2 stores as text."""

    name: str = "_codecs.encode"
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Storage:
    dtype: np.dtype
    size: int  # in elements
    raw: memoryview | None  # None if its place in the file is not known yet


def leaves(content: Any) -> Iterator[Any]:
    """Yields the keys and values of nested dicts, lists and tuples, each container once."""
    visited, pending = set(), [content]
    while pending:
        value = pending.pop()
        if not isinstance(value, dict | list | tuple):
            yield value
        elif id(value) not in visited:
            visited.add(id(value))
            pending += [*value, *value.values()] if isinstance(value, dict) else value


class _Opcodes(dict):
    """The method for each supported opcode."""

    def __missing__(self, code: int):
        raise InvalidFile(f"uses pickle opcode {bytes([code])}, which no weights file needs")


# Opcodes that only push, pop or look up plain values.
INHERITED = [
    getattr(pickle, name)[0]
    for name in (
        "PROTO MARK STOP POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
        "BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES EMPTY_LIST EMPTY_DICT EMPTY_TUPLE "
        "TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL "
        "STACK_GLOBAL BINPERSID"
    ).split()
]


class RestrictedUnpickler(pickle._Unpickler):
    """Unpickles `data[start:end]`, or the pickle at its start, in bounded time and memory.

    `load` returns dicts, lists, tuples, scalars, strings, arrays (views of `raw`) and stubs. They
    may contain themselves, or repeat their parts so often that a plain recursion takes forever:
    visit them by `leaves`.

    Args:
        data: the file.
        start, end: the part of it that holds the pickle.
        raw: the bytes of each storage. None reads tensors as stubs.
    """

    def __init__(
        self,
        data: bytes | mmap.mmap,
        start: int,
        end: int,
        raw: Mapping[str, memoryview] | None = None,
    ):
        self.source, self.raw = _Source(data, start, end), raw  # `source.position` is the end
        self.storages: dict[str, Storage] = {}  # all that the pickle refers to
        super().__init__(self.source)

    def find_class(self, module: str, name: str) -> Any:
        asked = f"{module[:200]}.{name[:200]}"
        if asked in WHITELIST:
            return WHITELIST[asked]
        return Stub(re.sub(r"[^\w.<>]", "?", asked, flags=re.ASCII)[:120])

    def persistent_load(self, pid: Any) -> Storage:
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise InvalidFile("refers to something that is not a storage: refused")
        dtype, key, _, size, *view = pid[1:]
        if not isinstance(dtype, np.dtype) or view not in ([], [None]):
            name = f" {dtype.name}" if isinstance(dtype, Stub) else ""
            raise InvalidFile(f"has a storage of an unknown kind{name}: {DENSE}")
        if type(key) is not str or not _are_counts((size,)):
            raise InvalidFile("has a storage of an absurd size: refused")
        raw = None
        if self.raw is not None:
            raw, wanted = self.raw.get(key, memoryview(b"")), size * dtype.itemsize
            if len(raw) != wanted:
                raise InvalidFile(
                    f"is damaged: storage {ascii(key)[:20]} has {len(raw)} bytes, its tensors need "
                    f"{wanted}"
                )
        self.storages[key] = Storage(dtype, size, raw)
        return self.storages[key]

    # Opcodes that would act on objects in the base class.

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if isinstance(function, Stub):
            return  # a stub is also its result
        if type(function) is not types.FunctionType or type(arguments) is not tuple:
            raise InvalidFile(f"asks to call {_kind(function)} in an unknown way: refused")
        self.stack[-1] = function(*arguments)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments, which no whitelisted name takes
        self.load_reduce()

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is NumpyArray:
            target.value = _numpy_array(state)
        elif isinstance(target, np.dtype):
            if type(state) is not tuple or state[1:2] not in (("<",), ("|",), ("=",)):
                raise InvalidFile("has a NumPy array that is not little-endian: refused")
        elif not isinstance(target, dict | Stub):  # `_metadata` of a state_dict is not needed
            raise InvalidFile(f"asks to set attributes of {_kind(target)}: refused")

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Stub):
            raise InvalidFile(f"asks to append to {_kind(target)}: refused")

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Stub):
            return
        if type(target) is not dict or len(items) % 2:
            raise InvalidFile(f"asks to set items of {_kind(target)}: refused")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing nested tuples can take forever, and larger integers can all collide.
            if not isinstance(key, (*KEYS, Stub)) or (type(key) is int and abs(key) >= 2**63):
                raise InvalidFile(f"has a dict with {_kind(key)} as a key: refused")
            target[key] = value

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Stub("builtins.frozenset"))

    dispatch = _Opcodes({code: pickle._Unpickler.dispatch[code] for code in INHERITED})
    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: lambda self: self._extend([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self._extend(self.pop_mark()),
        pickle.SETITEM[0]: lambda self: self._set_items([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self._set_items(self.pop_mark()),
        pickle.EMPTY_SET[0]: lambda self: self.append(Stub("builtins.set")),
        pickle.ADDITEMS[0]: lambda self: self._extend(self.pop_mark()),
        pickle.FROZENSET[0]: load_frozenset,
        pickle.FRAME[0]: lambda self: self.read(8),  # frames only help to read ahead
    }


class _Source:
    """The file that the unpickler reads: `data[start:end]`, with limits."""

    def __init__(self, data: bytes | mmap.mmap, start: int, end: int):
        self.data, self.position, self.end = data, start, end
        self.limit = start + LARGEST
        self.reads = 0

    def read(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        self.reads += 1
        if self.position > self.end:
            raise InvalidFile("is cut off: copy or download it again")
        if self.position > self.limit or self.reads > MOST_READS:
            raise InvalidFile("holds an absurdly long pickle: refused")
        return self.data[start : self.position]

    def readline(self) -> bytes:
        end = self.data.find(b"\n", self.position, min(self.end, self.position + 256))
        if end < 0:
            raise InvalidFile("is damaged: it holds a name without an end")
        return self.read(end + 1 - self.position)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _are_counts(numbers: Any) -> bool:
    """Whether `numbers` is a short tuple of integers that are small enough for NumPy."""
    return (
        type(numbers) is tuple
        and len(numbers) <= MOST_AXES
        and all(type(n) is int and 0 <= n <= MOST_ELEMENTS for n in numbers)
    )


def _rebuild_tensor(
    storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None
) -> np.ndarray | Stub:
    """Returns a view of a storage. `metadata` has flags such as "conj" and "neg"."""
    if type(storage) is not Storage or metadata:
        raise InvalidFile("has a tensor that is more than a view of a storage: refused")
    if not all(map(_are_counts, (size, stride, (offset,)))) or len(stride) != len(size):
        raise InvalidFile("has a tensor of an absurd shape: refused")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    elements = math.prod(size)
    if elements > storage.size or (elements and last >= storage.size):
        raise InvalidFile(
            f"has a tensor {size} that leaves its storage of {storage.size} elements: refused"
        )
    if storage.raw is None:
        return Stub("torch.Tensor")
    bytes_per_element = storage.dtype.itemsize
    start = offset * bytes_per_element if elements else 0
    strides = tuple(step * bytes_per_element for step in stride)
    return np.ndarray(size, storage.dtype, storage.raw, start, strides)


def _rebuild_tensor_v3(
    storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None
) -> np.ndarray | Stub:
    """Returns a view of a storage of bytes, for the dtypes that have no storage type."""
    if type(storage) is not Storage or not isinstance(dtype, np.dtype):
        return Stub("torch._utils._rebuild_tensor_v3")
    size_in_elements = storage.size * storage.dtype.itemsize // dtype.itemsize
    typed = Storage(dtype, size_in_elements, storage.raw)
    return _rebuild_tensor(typed, offset, size, stride, metadata=metadata)


def _rebuild_device_tensor(data, dtype, device, requires_grad) -> Stub:
    """Returns the NumPy array that torch-xla saves for a tensor on a TPU."""
    return data if isinstance(data, NumpyArray) else Stub("torch.Tensor")


def _rebuild_from_type(function, kind, arguments, state) -> Any:
    """Returns a tensor with attributes, without them; of a subclass, a stub."""
    plain = isinstance(kind, Stub) and kind.name in ("torch.Tensor", "torch.nn.parameter.Parameter")
    if not plain or function not in (_rebuild_tensor, _rebuild_tensor_v3):
        return Stub("torch._tensor._rebuild_from_type_v2") if not isinstance(kind, Stub) else kind
    return function(*arguments)


def _numpy_dtype(text, *flags) -> np.dtype | Stub:
    """Returns the dtype of a number, as `numpy.dtype("f4", False, True)` does."""
    return np.dtype(f"<{text}") if text in NUMBERS else Stub("numpy.dtype")


def _numpy_array(state) -> np.ndarray | None:
    """Returns the array that `ndarray.__setstate__` would make; None if it is not of numbers."""
    match state:
        case (
            int(),
            tuple(shape),
            np.dtype() as dtype,
            bool(fortran),
            EncodedBytes() | bytes() as data,
        ):
            data = data.text.encode("latin1") if isinstance(data, EncodedBytes) else data
            if not _are_counts(shape) or math.prod(shape) * dtype.itemsize != len(data):
                raise InvalidFile("has a NumPy array of an absurd shape: refused")
            return np.ndarray(shape, dtype, data, order="F" if fortran else "C")
    return None


# The names that have a meaning here; every other name is a stub.
WHITELIST = {f"torch.{name}": dtype for name, dtype in STORAGES.items()} | {
    "torch.storage.UntypedStorage": np.dtype("uint8"),
    "collections.OrderedDict": lambda: {},
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    **{f"torch.{name}": np.dtype(name) for name in ("uint16", "uint32", "uint64")},
    "torch._utils._rebuild_device_tensor_from_numpy": _rebuild_device_tensor,
    "torch._utils._rebuild_xla_tensor": _rebuild_device_tensor,  # before torch 2
    "collections.defaultdict": lambda *_: {},
    "_codecs.encode": lambda text, encoding: EncodedBytes(text=text),
    "__builtin__.bytes": lambda *_: EncodedBytes(),  # without any
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray._reconstruct": lambda *_: NumpyArray(),  # NumPy 1
    "numpy._core.multiarray._reconstruct": lambda *_: NumpyArray(),
}
