# SPDX-License-Identifier: Apache-2.0
"""Reads the pickles inside torch files without running what they ask for.

A pickle is a program. Python's own unpickler can be told which names to find, but still lets a file
size its memo and set attributes of what it found. This machine knows the opcodes and the names that
weights files use and makes inert values: nothing is imported or looked up, only the functions in
`inert` are called, and work and memory stay in proportion to the bytes read.
"""

import mmap
import pickletools
import re
import struct
import sys
from typing import Any

from tnt_flax.weights.formats.inert import (
    KNOWN,
    MOST_ELEMENTS,
    TRUSTED,
    Fault,
    Known,
    Namespace,
    NumpyArray,
    NumpyDtype,
    Storage,
    Tensor,
)

LARGEST = 2**22  # bytes of one pickle; those of a training checkpoint are below 1 MB
DEEPEST = 64  # dicts in lists in dicts
MOST_ARGUMENTS = 8
KEYS = (str, int, float, bool, type(None))  # hashing a tuple of tuples may take forever


class Machine:
    """Runs the one pickle that starts at `position`; afterwards `position` is where it ended."""

    def __init__(self, data: bytes | mmap.mmap, position: int, end: int):
        self.data, self.start, self.position = data, position, position
        self.end = min(end, position + LARGEST)
        self.cut_off = "is cut off" if self.end == end else "holds an absurdly long pickle"
        self.stack, self.marks, self.memo, self.work = [], [], {}, 0
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        """The object, for `plain`. Raises Fault, or for garbage whatever its values lead to."""
        while (code := self.take(1)) != b".":
            if code not in STEPS:
                known = pickletools.code2op.get(code.decode("latin1"))
                name = f"opcode {known.name}" if known else f"unknown opcode {code[0]}"
                raise Fault(f"uses the pickle {name}, which no weights file needs: refused")
            STEPS[code](self)
        return self.stack.pop()

    def plain(self, value: Any, raw: dict[str, memoryview], depth: int = 0) -> Any:
        """`value` as a tree of Python and numpy values; `raw` has the bytes of each storage."""
        self.charge(1)
        if depth > DEEPEST:
            raise Fault("nests its content deeper than any weights file: refused")
        if isinstance(value, dict):
            return type(value)((k, self.plain(v, raw, depth + 1)) for k, v in value.items())
        if isinstance(value, list | tuple):
            return type(value)(self.plain(v, raw, depth + 1) for v in value)
        if isinstance(value, Tensor):
            return value.view(raw[value.storage.key])
        if isinstance(value, NumpyArray):
            return value.whole()
        if isinstance(value, NumpyDtype):
            return value.whole().name
        if isinstance(value, Known) and value.dtype:
            return value.dtype
        if isinstance(value, Known | Storage):
            name = value.name if isinstance(value, Known) else "a storage without a tensor"
            raise Fault(f"holds {name}, which is no weight: refused")
        return value

    def charge(self, work: int) -> None:
        """A few bytes can ask for the same work again and again, or for a tree without an end."""
        self.work += work
        if self.work > 4 * (self.position - self.start) + 1000:
            raise Fault("repeats its content beyond reason: refused")

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > self.end:
            raise Fault(f"{self.cut_off}: copy or download it again")
        return self.data[start : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, min(self.end, self.position + 256))
        if end < 0:
            raise Fault("is damaged: it holds a name without an end")
        return self.take(end + 1 - self.position)[:-1].decode()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Fault("is damaged: it refers to a value that it does not hold")
        self.push(self.memo[index])

    def pop(self, count: int) -> list[Any]:
        if not 0 <= count <= len(self.stack):
            raise Fault("is damaged: its pickle takes values that are not there")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def pop_to_mark(self) -> list[Any]:
        return self.pop(len(self.stack) - self.marks.pop())

    def find(self, module: str, name: str) -> None:
        if type(module) is not str or type(name) is not str:
            raise Fault("asks to run something without a name: refused")
        known = KNOWN.get(f"{module} {name}")
        if known is None:
            asked = re.sub(r"[^\w.<>]", "?", f"{module}.{name}", flags=re.ASCII)[:120]
            top = asked.partition(".")[0]
            if top in sys.stdlib_module_names or top in ("__builtin__", "numpy", "torch"):
                raise Fault(
                    f"asks to run {asked}: refused. It is not a plain weights file; {TRUSTED}"
                )
            raise Fault(f"holds an object of {asked}, not only weights: refused; {TRUSTED}")
        self.push(known)

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Fault(f"asks to append to a {type(target).__name__}: refused")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise Fault(f"asks to set items of a {type(target).__name__}: refused")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Larger integers can be chosen so that all of them collide.
            if type(key) not in KEYS or (type(key) is int and abs(key) >= 2**63):
                raise Fault(f"has a dict with a {type(key).__name__} as a key: refused")
            target[key] = value

    def call(self) -> None:
        function, arguments = self.pop(2)
        if not isinstance(function, Known) or not function.make or type(arguments) is not tuple:
            name = getattr(function, "name", type(function).__name__)
            raise Fault(f"asks to call {name} in an unknown way: refused")
        if len(arguments) > MOST_ARGUMENTS:  # passing them on is work, too
            raise Fault(f"asks to call {function.name} with {len(arguments)} arguments: refused")
        if function.name == "_codecs encode":
            self.charge(sum(len(x) for x in arguments if isinstance(x, str)))
        self.push(function.make(*arguments))

    def build(self) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, Namespace | NumpyDtype | NumpyArray):
            self.charge(len(state) if isinstance(state, dict) else 1)
            target.set_state(state)
        elif type(target) is not dict:  # the _metadata of a state_dict is of no use here
            raise Fault(f"asks to set attributes of a {type(target).__name__}: refused")

    def find_storage(self) -> None:
        (name,) = self.pop(1)
        if type(name) is not tuple or len(name) not in (5, 6) or name[0] != "storage":
            raise Fault("refers to something that is no storage: refused")
        kind, key, _, size, *view = name[1:]
        if not isinstance(kind, Known) or kind.storage is None or view not in ([], [None]):
            raise Fault("has a storage of an unknown kind: refused")
        if type(key) is not str or type(size) is not int or not 0 <= size <= MOST_ELEMENTS:
            raise Fault("has a storage of an absurd size: refused")
        storage = Storage(key, kind.storage, size)
        if self.storages.setdefault(key, storage) != storage:
            raise Fault(f"describes storage {key[:20]!a} in two ways: refused")
        self.push(storage)


def _form(form: str):
    """Pushes a number."""
    return lambda m: m.push(m.number(form))


def _text(form: str, *decode: str):
    """Pushes bytes, or a string, whose length comes before it."""

    def step(m: Machine) -> None:
        content = m.take(m.number(form))
        m.push(content.decode(*decode) if decode else content)

    return step


def _tuple(count: int):
    return lambda m: m.push(tuple(m.pop(count)))


UTF8 = ("utf-8", "surrogatepass")
STEPS = {
    b"\x80": lambda m: m.take(1),  # PROTO: the opcodes say what is needed
    b"\x95": lambda m: m.take(8),  # FRAME
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": _form("<B"),
    b"M": _form("<H"),
    b"J": _form("<i"),
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
    b"G": _form(">d"),
    b"X": _text("<I", *UTF8),
    b"\x8c": _text("<B", *UTF8),
    b"B": _text("<I"),
    b"C": _text("<B"),
    b"]": lambda m: m.push([]),
    b"}": lambda m: m.push({}),
    b")": _tuple(0),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"t": lambda m: m.push(tuple(m.pop_to_mark())),
    b"a": lambda m: m.append(m.pop(1)),
    b"e": lambda m: m.append(m.pop_to_mark()),
    b"s": lambda m: m.set_items(m.pop(2)),
    b"u": lambda m: m.set_items(m.pop_to_mark()),
    b"q": lambda m: m.remember(m.number("<B")),
    b"r": lambda m: m.remember(m.number("<I")),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"h": lambda m: m.recall(m.number("<B")),
    b"j": lambda m: m.recall(m.number("<I")),
    b"c": lambda m: m.find(m.line(), m.line()),
    b"\x93": lambda m: m.find(*m.pop(2)),
    b"R": Machine.call,
    b"\x81": Machine.call,  # NEWOBJ; the classes in KNOWN are made by being called
    b"b": Machine.build,
    b"Q": Machine.find_storage,
}
"""What each opcode does. Those of torch, and what newer protocols write for the same content."""
