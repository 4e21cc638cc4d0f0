# SPDX-License-Identifier: Apache-2.0
"""Pickles in torch files: a trainer's objects, and hostile programs."""

import argparse
import collections
import datetime
import enum
import functools
import os
import pathlib
import pickle
import tracemalloc

import numpy as np
import pytest

from tests.helpers.torch_files import (
    SIX,
    archive,
    assert_same,
    global_name,
    opcodes,
    program,
    stream,
    tensor,
)
from tnt_flax.weights.formats import restricted_pickle, stored_tensor
from tnt_flax.weights.formats.restricted_pickle import Stub, leaves

FORMATS = pytest.mark.parametrize(
    "file_format",
    [archive, functools.partial(stream, keys=(), storages=b"")],
    ids=["zip", "stream"],
)
WHOLE_TENSOR = tensor(0, (6,), (1,))
STATE = opcodes({"__globals__": 1})
REBUILD = global_name("torch._utils", "_rebuild_tensor_v2")
SYSTEM = global_name("posix", "system")


class Call:
    """Pickled as a call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


class Colour(enum.Enum):
    RED = "red"


class History:
    """As mmengine's HistoryBuffer: arrays and functions in its attributes."""

    def __init__(self):
        self._log = np.arange(3.0)
        self._statistics = {"mean": os.path.join, "self": self}


class Keyword:
    def __new__(cls, *, size):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (), {"size": 3}


class Names(list):
    pass


class Config(dict):
    pass


OBJECTS = {
    "pathlib.PosixPath": pathlib.PurePosixPath("a/b"),
    "collections.Counter": collections.Counter(a=1),
    "collections.deque": collections.deque([1, 2], maxlen=3),
    "set": {1, "a"},
    "frozenset": frozenset([(1, 2)]),
    "datetime.datetime": datetime.datetime(2026, 1, 2),
    "functools.partial": functools.partial(print, "marker", end=""),
    "Colour": Colour.RED,
    "History": History(),
    "Keyword": Keyword(size=3),
    "Names": Names("ab"),
    "Config": Config(a=1),
    "complex": 1j,
    "argparse.Namespace": argparse.Namespace(lr=0.1),
    "numpy scalar": np.float64(1.5),
    "numpy object array": np.array([{}]),
    "type": History,
}


def stub_names(content):
    return sorted({x.name for x in leaves(content) if isinstance(x, Stub)})


@pytest.mark.parametrize("protocol", [2, 3, 4])
@FORMATS
def test_objects_beside_the_weights_become_stubs(read, file_format, protocol):
    content = {"before": 1, **OBJECTS, "after": [1.5, OBJECTS["set"]]}
    found = read(file_format(pickle.dumps(content, protocol)))
    assert list(found) == list(content) and found["before"] == 1
    for key in OBJECTS:
        assert isinstance(found[key], Stub) and stored_tensor(found[key]) is found[key], key
    assert found["after"][0] == 1.5 and found["after"][1].name.endswith(".set")
    assert found["collections.Counter"].name == "collections.Counter"
    assert found["History"].name == f"{__name__}.History"


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8", "bool"])
@pytest.mark.parametrize("protocol", [2, 4])
@FORMATS
def test_arrays_of_numbers_are_read(read, file_format, protocol, dtype):
    arrays = [np.arange(6).astype(dtype).reshape(2, 3), np.arange(3).astype(dtype)]
    arrays += [arrays[0].T, np.zeros((0, 2), dtype), np.array(1, dtype)]
    found = read(file_format(pickle.dumps(arrays + arrays[:1], protocol)))
    for expected, x in zip(arrays, found, strict=False):
        assert_same(stored_tensor(x).read(), expected)
    assert found[-1] is found[0]


def test_tensors_of_tpus_and_with_attributes_are_read(read):
    numbers = np.arange(3.0)
    rebuild = global_name("torch._utils", "_rebuild_device_tensor_from_numpy")
    found = read(archive(program(rebuild, b"(", opcodes(numbers), b"NNNtR")))
    assert_same(stored_tensor(found).read(), numbers)

    rebuild = global_name("torch._tensor", "_rebuild_from_type_v2")
    arguments = WHOLE_TENSOR.removeprefix(REBUILD).removesuffix(b"R")
    for kind, is_read in (("Tensor", True), ("Subclass", False)):
        parts = [rebuild, b"(", REBUILD, global_name("torch", kind), arguments, b"}tR"]
        found = read(archive(program(*parts)))
        if is_read:
            assert_same(found, np.frombuffer(SIX, np.float32))
        else:
            assert found.name == "torch.Subclass"


@pytest.mark.parametrize(
    "why, array, change",
    [
        ("not little-endian", np.arange(3, dtype=">f4"), (b"", b"")),
        ("of an absurd shape", np.arange(3.0), (b"K\x03\x85", b"K\x04\x85")),
    ],
)
def test_damaged_arrays_are_refused(refused, why, array, change):
    content = pickle.dumps(array, 2)
    refused(archive(content.replace(*change)), why)


TOUCH = (os.system, ("touch marker",))


@pytest.mark.parametrize(
    "names, content",
    [
        (["posix.system"], pickle.dumps([Call(*TOUCH)], 2)),
        (["posix.system"], pickle.dumps([{"a": [Call(*TOUCH)]}], 4)),  # STACK_GLOBAL
        ([], program(b"]", SYSTEM, b"0Na")),  # POP
        ([f"{open.__module__}.open"], pickle.dumps([Call(open, ("marker", "w"))], 3)),
        (["__builtin__.eval"], pickle.dumps([Call(eval, ("open('marker', 'w')",))], 2)),
        (["builtins.getattr"], pickle.dumps([Call(getattr, ("a", "b"))], 4)),
        (["torch.load"], program(b"]", global_name("torch", "load"), opcodes(("marker",)), b"Ra")),
        (["torch._utils._rebuild_tensor_v2.a"], program(b"]", REBUILD[:-1], b".a\na")),
        (["os.pa?h"], program(b"]cos\npa\x1bh\na")),
        (["posix.system"], program(b"]", SYSTEM, opcodes({"__class__": 1, "name": "x"}), b"ba")),
        (["posix.system"], program(b"]", SYSTEM, opcodes((None, {"name": "x"})), b"ba")),
        (["posix.system"], program(b"]", SYSTEM, b"(NNu(NNeNNsNa", b"(N\x90a")),  # items
        (["posix.system"], program(b"]", SYSTEM, b"}}\x92a")),  # NEWOBJ_EX
        (["posix.system"], program(b"]}", SYSTEM, b"Nsa")),  # as a key
    ],
)
@FORMATS
def test_nothing_is_run(read, tmp_path, monkeypatch, names, content, file_format):
    monkeypatch.chdir(tmp_path)
    found = read(file_format(content))
    assert stub_names(found) == names
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "why, parts",
    [
        ("a dict with a tuple as a key", [b"}N", b"\x85" * 100_000, b"Ns"]),
        ("a dict with a tuple as a key", [b"}", b")q\x00" + b"0h\x00h\x00\x86q\x00" * 60, b"Ns"]),
        ("absurdly long pickle", [b"(" * 2**17]),
        ("absurdly long pickle", [b"]" * 2**17]),
        ("is cut off", [b"B\xff\xff\xff\x7f"]),
        ("refers to something", [b"N", b"\x85" * 100_000, b"Q"]),
        ("is damaged", [b"Nr\xff\xff\xff\x7fj\xfe\xff\xff\x7f"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bombs_are_refused_in_little_memory(refused, monkeypatch, why, parts):
    monkeypatch.setattr(restricted_pickle, "MOST_READS", 2**17)
    content = archive(program(*parts))
    tracemalloc.start()
    refused(content, why)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**19 + 100 * len(content)


@pytest.mark.parametrize(
    "names, parts",
    [
        ([], [b"(" * 50_000, b"t" * 50_000]),
        ([], [b"]q\x00h\x00a"]),  # contains itself
        (["os.path"], [b"]q\x00cos\npath\na", b"h\x00h\x00\x86q\x00" * 60]),  # 2**60 places
        (["builtins.set"], [b"]\x8f()q\x00", b"h\x00h\x00\x86q\x00" * 60, b"\x90a"]),
    ],
    ids=["deep", "recursive", "shared", "shared, in a set"],
)
def test_hostile_content_is_read_and_visited_quickly(read, names, parts):
    assert stub_names(read(archive(program(*parts)))) == names


def test_the_memo_takes_no_more_memory_than_its_values(read):
    tracemalloc.start()
    assert read(archive(program(b"Nr\xff\xff\xff\x7f"))) is None
    assert tracemalloc.get_traced_memory()[1] < 2**19
    tracemalloc.stop()


@pytest.mark.parametrize("limit, content", [("LARGEST", "a" * 1000), ("MOST_READS", [1] * 600)])
def test_a_pickle_has_a_largest_size(refused, monkeypatch, limit, content):
    monkeypatch.setattr(restricted_pickle, limit, 1000)
    for file_format in archive, stream:
        refused(file_format(program(opcodes(content))), "absurdly long pickle")


@pytest.mark.parametrize(
    "why, parts",
    [
        ("asks to set attributes of a function", [REBUILD, STATE, b"b"]),
        ("asks to set attributes of a ndarray", [tensor(0, (6,), (1,)), STATE, b"b"]),
        ("asks to call a str", [opcodes("a"), b")R"]),
        ("asks to call a function", [REBUILD, b"]R"]),
        ("is damaged: .*TypeError", [REBUILD, opcodes((1,) * 9), b"R"]),
        ("asks to set items of a function", [REBUILD, b"(NNu"]),
        ("asks to set items of a dict", [b"}(Nu"]),
        ("asks to append to a dict", [b"}Na"]),
        ("is damaged: .*Unpickling", [b"NN\x93"]),
        (r"opcode b'\\x8b', which", [b"\x8b\xff\xff\xff\x7f"]),  # LONG4
        (r"opcode b'P', which", [b"Pos\n"]),
        (r"opcode b'i', which", [b"(ios\nsystem\n"]),
        (r"opcode b'\\x82', which", [b"\x82\x01"]),  # EXT1
        (r"opcode b'\\x83', which", [b"\x83\x01\x00"]),  # EXT2
        (r"opcode b'\\x84', which", [b"\x84\x01\x00\x00\x00"]),  # EXT4
        (r"opcode b'\\xf0', which", [b"\xf0"]),  # unknown
        ("dict with a tuple as a key", [b"}", opcodes((1,)), b"Ns"]),
        ("dict with a int as a key", [b"}", opcodes(2**64), b"Ns"]),
        ("dict with a bytes as a key", [b"}C\x01aNs"]),
        ("is damaged: .*UnpicklingError", [b"h\x07"]),
        ("is damaged: .*IndexError", [b"\x87"]),
        ("is damaged: .*UnicodeDecodeError", [b"X\x01\x00\x00\x00\xff"]),
        ("a name without an end", [b"cos"]),
        ("is cut off", [b"X\xff\xff\xff\xff"]),
    ],
)
def test_invalid_programs_are_refused(refused, why, parts):
    refused(archive(program(*parts)), why)


# Tensors


@pytest.mark.parametrize(
    "offset, size, stride",
    [
        (1, (6,), (1,)),
        (0, (7,), (1,)),
        (0, (2, 3), (4, 1)),
        (6, (1,), (1,)),
        (0, (2**20, 2**20), (0, 0)),
    ],
)
def test_tensors_stay_in_their_storage(refused, offset, size, stride):
    for file_format in archive, stream:
        content = program(tensor(offset, size, stride))
        refused(file_format(content), r"has a tensor \(.*\) that leaves its storage of 6 elements")


@pytest.mark.parametrize(
    "offset, size, stride",
    [
        (-1, (1,), (1,)),
        (0, (-1,), (1,)),
        (5, (2,), (-1,)),
        (0, (2, 3), (1,)),
        (0, (0, 2**60), (1, 1)),
        (0, (0, 2**40, 2**40), (1, 1, 1)),
        (2**200, (1,), (1,)),
        (0, (1,), (2**200,)),
        (0, (1,) * 40, (1,) * 40),
        (True, (1,), (1,)),
        (0, (1.0,), (1,)),
        (0, (1,), None),
    ],
)
def test_absurd_shapes_are_refused(refused, offset, size, stride):
    refused(archive(program(tensor(offset, size, stride))), "absurd shape|is damaged")


def test_tensors_without_elements_are_read(read):
    for size in ((0,), (3, 0), (0, 2**30)):
        found = read(archive(program(tensor(99, size, (1,) * len(size)))))
        assert found.shape == size and found.dtype == np.float32
    assert read(archive(program(tensor(5, (), ())))).shape == ()
    assert read(archive(program(tensor(0, (0,), (1,), count=0)), {"0": b""})).shape == (0,)


def test_overlapping_tensors_within_their_storage_are_read(read):
    assert_same(
        read(archive(program(tensor(1, (3,), (0,))))), np.full(3, np.frombuffer(SIX, np.float32)[1])
    )


@pytest.mark.parametrize(
    "why, changes",
    [
        ("storage '0' has 24 bytes, its tensors need 28", {"count": 7}),
        ("storage '0' has 24 bytes, its tensors need 20", {"count": 5, "stride": (2,)}),
        ("storage '0' has 24 bytes, its tensors need 48", {"kind": ("torch", "LongStorage")}),
        ("storage of an absurd size", {"count": 2**60}),
        ("storage of an absurd size", {"count": "6"}),
        ("storage of an absurd size", {"key": 0}),
        ("storage of an unknown kind", {"kind": ("torch", "Size")}),
        ("storage of an unknown kind", {"rest": opcodes(("1", 0, 6))}),
        ("storage of an unknown kind torch.QInt8Storage", {"kind": ("torch", "QInt8Storage")}),
        ("storage '1' has 0 bytes, its tensors need 24", {"key": "1"}),
    ],
)
def test_storages_fit_their_tensors(refused, why, changes):
    size = {"offset": 0, "size": (2,), "stride": (1,)}
    refused(archive(program(tensor(**size | changes))), why)


@pytest.mark.parametrize(
    "why, parts",
    [
        ("refers to something", [opcodes(("module", "a")), b"Q"]),
        ("refers to something", [b"NQ"]),
        ("storage '0' has 24 bytes", [WHOLE_TENSOR, tensor(0, (3,), (1,), count=3)]),
        ("more than a view", [REBUILD, opcodes((1, 0, (), (), False, {})), b"R"]),
        ("more than a view", [WHOLE_TENSOR[:-2], opcodes({"neg": True}), b"tR"]),
    ],
)
def test_invalid_storages_are_refused(refused, why, parts):
    refused(archive(program(*parts)), why)
