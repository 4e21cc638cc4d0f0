# SPDX-License-Identifier: Apache-2.0
"""Unpickles the content of torch files without running anything that a file names.

A pickle is a program that may call any importable function. `RestrictedUnpickler` never imports:
`find_class` returns entries of a whitelist, whose functions check their arguments and return plain
values, or a `Stub` for every other name. Calling a stub, or setting its items or attributes, has no
effect, so a trainer's objects beside the weights are harmless.

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
import pickletools
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

LARGEST = 2**28  # bytes of one pickle, which may include NumPy arrays such as a trainer's history
MOST_READS = 2**21  # one or two per opcode; a TNT-B with its optimizer state takes 0.1 million
DEEPEST = 64  # levels of dictionaries and lists
MOST_ARGUMENTS = 8
MOST_ELEMENTS = 2**48
MOST_AXES = 32
KEYS = (str, int, float, bool, type(None))
TRUSTED = "if you trust its source, load it there and save only its state_dict"


class InvalidFile(Exception):
    """A file is damaged or not supported. The message continues a sentence that starts with it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stub:
    """An inert placeholder for a class, function or object of the file."""

    name: str  # "module.qualified_name"


@dataclasses.dataclass(frozen=True, eq=False)
class Whitelisted(Stub):
    """A name that weights files need."""

    make: Callable[..., Any] | None = None  # called by REDUCE and NEWOBJ
    storage: np.dtype | None = None  # element type, if the name is a storage type
    dtype: str | None = None  # if the name is a dtype of torch


@dataclasses.dataclass(frozen=True)
class Storage:
    key: str
    dtype: np.dtype
    size: int  # in elements


@dataclasses.dataclass(frozen=True)
class Tensor:
    storage: Storage
    offset: int  # offset and strides count elements of `dtype`
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    def view(self, raw: memoryview) -> np.ndarray:
        """Returns the tensor as a view of `raw`, the bytes of its storage."""
        step = self.dtype.itemsize
        strides = tuple(step * n for n in self.strides)
        offset = self.offset * step if math.prod(self.shape) else 0
        return np.ndarray(self.shape, self.dtype, raw, offset, strides)


class _Opcodes(dict):
    """The method for each supported opcode."""

    def __missing__(self, code: int):
        known = pickletools.code2op.get(chr(code))
        name = f"opcode {known.name}" if known else f"unknown opcode {code}"
        raise InvalidFile(f"uses the pickle {name}, which no weights file needs: refused")


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
    """Unpickles `data[position:end]`, or the pickle at its start, in bounded time and memory.

    After `load`, `position` is the end of the pickle and `storages` has the storages that it
    refers to; `resolve` turns the loaded value into plain values.
    """

    def __init__(self, data: bytes | mmap.mmap, position: int, end: int):
        self.source = _Source(data, position, end)
        super().__init__(self.source)
        self.storages: dict[str, Storage] = {}
        self._stubs: dict[str, Stub] = {}
        self._values = self._characters = 0

    @property
    def position(self) -> int:
        return self.source.position

    def resolve(self, value: Any, raw: dict[str, memoryview], depth: int = 0) -> Any:
        """Returns a loaded value as a tree of Python values, NumPy arrays and stubs.

        `raw` maps the key of each storage to its bytes.
        """
        self._charge(values=1)
        if depth > DEEPEST:
            raise InvalidFile("nests its content deeper than any weights file: refused")
        if isinstance(value, dict):
            return type(value)((k, self.resolve(v, raw, depth + 1)) for k, v in value.items())
        if isinstance(value, list | tuple):
            return type(value)(self.resolve(v, raw, depth + 1) for v in value)
        if isinstance(value, Tensor):
            return value.view(raw[value.storage.key])
        if isinstance(value, _NumpyArray):
            return value.array()
        if isinstance(value, _NumpyDtype):
            return value.dtype().name
        if isinstance(value, Whitelisted) and value.dtype:
            return value.dtype
        if isinstance(value, Whitelisted | Storage):
            name = value.name if isinstance(value, Stub) else "a storage without a tensor"
            raise InvalidFile(f"holds {name}, which is not a weight: refused")
        return value

    def _charge(self, values: int = 0, characters: int = 0) -> None:
        """Bounds the work that a few bytes can request by referring to a value repeatedly."""
        self._values += values
        self._characters += characters
        most_characters = 4 * (self.source.position - self.source.start) + 1000
        if self._values > 2 * self.source.reads + 1000 or self._characters > most_characters:
            raise InvalidFile("repeats its content beyond reason: refused")

    def find_class(self, module: str, name: str) -> Stub:
        asked = f"{module[:200]}.{name[:200]}"
        if found := WHITELIST.get(asked):
            return found
        asked = re.sub(r"[^\w.<>]", "?", asked, flags=re.ASCII)[:120]
        return self._stubs.setdefault(asked, Stub(asked))

    def persistent_load(self, pid: Any) -> Storage:
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise InvalidFile("refers to something that is not a storage: refused")
        kind, key, _, size, *view = pid[1:]
        if not isinstance(kind, Whitelisted) or kind.storage is None or view not in ([], [None]):
            name = f" {kind.name}" if isinstance(kind, Stub) else ""
            raise InvalidFile(f"has a storage of an unknown kind{name}: refused")
        if type(key) is not str or type(size) is not int or not 0 <= size <= MOST_ELEMENTS:
            raise InvalidFile("has a storage of an absurd size: refused")
        storage = Storage(key, kind.storage, size)
        if self.storages.setdefault(key, storage) != storage:
            raise InvalidFile(f"describes storage {key[:20]!a} in two ways: refused")
        return storage

    # Opcodes that would act on objects in the base class.

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments, which no whitelisted name takes
        self.load_reduce()

    def _call(self, function: Any, arguments: Any) -> Any:
        if type(function) is Stub:
            return function  # stands for its result as well
        if getattr(function, "make", None) is None or type(arguments) is not tuple:
            raise InvalidFile(f"asks to call {_kind(function)} in an unknown way: refused")
        if len(arguments) > MOST_ARGUMENTS:
            count = len(arguments)
            raise InvalidFile(f"asks to call {function.name} with {count} arguments: refused")
        if function.make is _encode:
            self._charge(characters=sum(len(x) for x in arguments if isinstance(x, str)))
        return function.make(*arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _Namespace | _NumpyDtype | _NumpyArray):
            self._charge(values=len(state) if isinstance(state, dict) else 1)
            target.set_state(state)
        elif type(target) not in (dict, Stub):  # `_metadata` of a state_dict is not needed
            raise InvalidFile(f"asks to set attributes of {_kind(target)}: refused")

    def load_append(self) -> None:
        self._append([self.stack.pop()])

    def load_appends(self) -> None:
        self._append(self.pop_mark())

    def _append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Stub:
            raise InvalidFile(f"asks to append to {_kind(target)}: refused")

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._set_items([self.stack.pop(), value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Stub:
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise InvalidFile(f"asks to set items of {_kind(target)}: refused")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing nested tuples can take forever, and larger integers can all collide.
            if type(key) not in (*KEYS, Stub) or (type(key) is int and abs(key) >= 2**63):
                raise InvalidFile(f"has a dict with {_kind(key)} as a key: refused")
            target[key] = value

    def load_empty_set(self) -> None:
        self.append(self.find_class("builtins", "set"))

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(self.find_class("builtins", "frozenset"))

    def load_frame(self) -> None:
        self.read(8)  # frames only help to read ahead

    dispatch = _Opcodes({code: pickle._Unpickler.dispatch[code] for code in INHERITED})
    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.EMPTY_SET[0]: load_empty_set,
        pickle.ADDITEMS[0]: load_appends,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.FRAME[0]: load_frame,
    }


class _Source:
    """The file that the unpickler reads: `data[position:end]`, with limits."""

    def __init__(self, data: bytes | mmap.mmap, position: int, end: int):
        self.data, self.start, self.position = data, position, position
        self.end = min(end, position + LARGEST)
        self.too_long = self.end < end
        self.reads = 0

    def read(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        self.reads += 1
        if self.position > self.end and not self.too_long:
            raise InvalidFile("is cut off: copy or download it again")
        if self.position > self.end or self.reads > MOST_READS:
            raise InvalidFile("holds an absurdly long pickle: refused")
        return self.data[start : self.position]

    def readline(self) -> bytes:
        end = self.data.find(b"\n", self.position, min(self.end, self.position + 256))
        if end < 0:
            raise InvalidFile("is damaged: it holds a name without an end")
        return self.read(end + 1 - self.position)


def _kind(value: Any) -> str:
    return value.name if isinstance(value, Stub) else f"a {type(value).__name__.lstrip('_')}"


# What the whitelisted names make. Each function checks its arguments.


class _Namespace(dict):
    """The attributes of an argparse.Namespace."""

    def set_state(self, state: Any) -> None:
        if type(state) is not dict or self:
            raise InvalidFile("has an argparse.Namespace without values: refused")
        self.update(state)


class _NumpyDtype:
    """A numeric dtype, which NumPy pickles in two steps."""

    def __init__(self, code: str):
        self.code, self.order = code, "="

    def set_state(self, state: Any) -> None:
        order = state[1] if type(state) is tuple and len(state) > 1 else None
        if order not in ("<", ">", "|"):
            raise InvalidFile("has a numpy array of unknown byte order: refused")
        self.order = order

    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _NumpyArray:
    """A numeric array, which is empty until its state is set."""

    value: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5 or type(state[2]) is not _NumpyDtype:
            raise InvalidFile("has a numpy array without a dtype: refused")
        shape, dtype, content = state[1], state[2].dtype(), state[4]
        fits = _sensible(shape) and type(content) is bytes
        if not fits or len(content) != math.prod(shape) * dtype.itemsize:
            raise InvalidFile("has a numpy array of the wrong size: refused")
        self.value = np.ndarray(shape, dtype, content, order="F" if state[3] else "C")

    def array(self) -> np.ndarray:
        if self.value is None:
            raise InvalidFile("has a numpy array without content: refused")
        return self.value


def _sensible(numbers: Any) -> bool:
    """Whether a shape or strides are small enough for exact and fast arithmetic in NumPy."""
    return (
        type(numbers) is tuple
        and len(numbers) <= MOST_AXES
        and all(type(n) is int and 0 <= n <= MOST_ELEMENTS for n in numbers)
        and math.prod(n or 1 for n in numbers) <= MOST_ELEMENTS
    )


def _rebuild_tensor(storage, offset, size, stride, *extra, dtype=None) -> Tensor:
    """`extra` is requires_grad and hooks, both ignored, and flags such as "conjugate"."""
    if type(storage) is not Storage or any(extra[2:]):
        raise InvalidFile("has a tensor that is more than a view of a storage: refused")
    if not _sensible(size) or not _sensible((offset,)) or type(stride) is not tuple:
        raise InvalidFile("has a tensor of an absurd shape: refused")
    if len(stride) != len(size) or not all(_sensible((step,)) for step in stride):
        raise InvalidFile("has a tensor with absurd strides: refused")
    dtype = dtype or storage.dtype
    room = storage.size * storage.dtype.itemsize // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > room or (math.prod(size) and last >= room):
        raise InvalidFile(
            f"has a tensor {size} that leaves its storage of {room} elements: refused"
        )
    return Tensor(storage, offset, size, stride, dtype)


def _rebuild_tensor_v3(storage, offset, size, stride, gradient, hooks, dtype, *flags) -> Tensor:
    if not isinstance(dtype, Whitelisted) or dtype.dtype not in DTYPES:
        raise InvalidFile(f"has a tensor of {getattr(dtype, 'dtype', None)}: refused")
    found = DTYPES[dtype.dtype]
    return _rebuild_tensor(storage, offset, size, stride, gradient, hooks, *flags, dtype=found)


def _rebuild_parameter(tensor, *_) -> Tensor:
    if type(tensor) is not Tensor:
        raise InvalidFile("has a parameter without a tensor: refused")
    return tensor


def _size(numbers=()) -> tuple:
    if not _sensible(numbers):
        raise InvalidFile("has a torch.Size without numbers: refused")
    return numbers


def _device(kind, index=None) -> str:
    if type(kind) is not str or len(kind) > 50 or type(index) not in (int, type(None)):
        raise InvalidFile("has a torch.device without a name: refused")
    return kind if index is None else f"{kind}:{index}"


def _encode(text, encoding) -> bytes:
    """Bytes, as protocol 2 pickles them."""
    if type(text) is not str or encoding != "latin1":
        raise InvalidFile("asks for an encoding other than latin1: refused")
    return text.encode("latin1")


def _numpy_dtype(code, *_) -> _NumpyDtype:
    if type(code) is not str or not re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16", code):
        kind = "Python objects" if code in ("O", "O8") else ascii(code)[:20]
        raise InvalidFile(f"holds a numpy array of {kind}: refused; {TRUSTED}")
    return _NumpyDtype(code)


def _numpy_scalar(dtype, content) -> np.generic:
    dtype = dtype.dtype() if type(dtype) is _NumpyDtype else None
    if dtype is None or type(content) is not bytes or len(content) != dtype.itemsize:
        raise InvalidFile("has a numpy scalar of the wrong size: refused")
    return np.frombuffer(content, dtype)[0]


def _numpy_array(kind, *_) -> _NumpyArray:
    if kind is not WHITELIST["numpy.ndarray"]:
        raise InvalidFile("has a numpy array of an unknown class: refused")
    return _NumpyArray()


# NumPy's equivalents of torch's dtypes. Tensors of OTHER_DTYPES are refused.
NUMPY = "bool float16 float32 float64 int16 int32 int64 int8 uint16 uint32 uint64 uint8"
DTYPES = {name: np.dtype(name) for name in NUMPY.split()}
DTYPES |= {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
OTHER_DTYPES = ("complex64", "complex128", "float8_e4m3fn", "float8_e5m2")
STORAGES = dict(BFloat16="bfloat16", Bool="bool", Byte="uint8", Char="int8", Double="float64")
STORAGES |= dict(Float="float32", Half="float16", Int="int32", Long="int64", Short="int16")
STORAGES = {f"{name}Storage": dtype for name, dtype in STORAGES.items()}
FUNCTIONS = {
    "__builtin__.bytes": lambda: b"",
    "_codecs.encode": _encode,
    "argparse.Namespace": lambda: _Namespace(),
    "collections.OrderedDict": lambda: {},
    "numpy.dtype": _numpy_dtype,
    "numpy._core.multiarray._reconstruct": _numpy_array,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray._reconstruct": _numpy_array,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "torch.Size": _size,
    "torch.device": _device,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
}
_ENTRIES = [Whitelisted(name, make=make) for name, make in FUNCTIONS.items()]
_ENTRIES += [Whitelisted(f"torch.{name}", dtype=name) for name in (*DTYPES, *OTHER_DTYPES)]
_ENTRIES += [Whitelisted(f"torch.{x}", storage=DTYPES[name]) for x, name in STORAGES.items()]
_ENTRIES += [Whitelisted("torch.storage.UntypedStorage", storage=DTYPES["uint8"])]
_ENTRIES += [Whitelisted("numpy.ndarray")]
WHITELIST = {entry.name: entry for entry in _ENTRIES}
"""The names that have a meaning here; every other name is a stub."""
