# SPDX-License-Identifier: Apache-2.0
"""Pickles in torch files: a trainer's objects, and hostile programs."""

import collections
import copyreg
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
from tnt_flax.weights.formats import restricted_pickle
from tnt_flax.weights.formats.restricted_pickle import Stub

FORMATS = pytest.mark.parametrize(
    "file_format",
    [archive, functools.partial(stream, keys=(), storages=b"")],
    ids=["zip", "stream"],
)
WHOLE_TENSOR = tensor(0, (6,), (1,))
STATE = opcodes({"__globals__": 1})
REBUILD = global_name("torch._utils", "_rebuild_tensor_v2")
ENCODE = global_name("_codecs", "encode")
NAMESPACE = global_name("argparse", "Namespace") + b")\x81"
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
    "collections.defaultdict": collections.defaultdict(int, a=1),
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
    "type": History,
}


@pytest.mark.parametrize("protocol", [2, 3, 4])
@FORMATS
def test_objects_beside_the_weights_become_stubs(read, file_format, protocol):
    content = {"before": 1, **OBJECTS, "after": [1.5, OBJECTS["set"]]}
    found = read(file_format(pickle.dumps(content, protocol)))
    assert list(found) == list(content) and found["before"] == 1
    for key in OBJECTS:
        assert type(found[key]) is Stub, key
    assert found["after"][0] == 1.5 and found["after"][1].name.endswith(".set")
    assert found["collections.defaultdict"].name == "collections.defaultdict"
    assert found["History"].name == f"{__name__}.History"


TOUCH = (os.system, ("touch marker",))
GETATTR = global_name("__builtin__", "getattr")


@pytest.mark.parametrize(
    "names, content",
    [
        (["posix.system"], pickle.dumps([Call(*TOUCH)], 2)),
        (["posix.system"], pickle.dumps([{"a": [Call(*TOUCH)]}], 4)),  # STACK_GLOBAL
        ([], program(b"]", SYSTEM, b"0Na")),  # POP
        ([f"{open.__module__}.open"], pickle.dumps([Call(open, ("marker", "w"))], 3)),
        (["__builtin__.eval"], pickle.dumps([Call(eval, ("open('marker', 'w')",))], 2)),
        (["builtins.getattr"], pickle.dumps([Call(getattr, ("a", "b"))], 4)),
        (["__builtin__.setattr"], pickle.dumps([Call(setattr, ("a", "b", 1))], 2)),
        (["torch.load"], program(b"]", global_name("torch", "load"), opcodes(("marker",)), b"Ra")),
        (["torch.hub.load"], program(b"]", global_name("torch", "hub.load"), b"a")),
        (
            ["torch._utils._rebuild_tensor_v2.__globals__"],
            program(b"]", REBUILD[:-1], b".__globals__\na"),
        ),
        (["os.pa?h"], program(b"]cos\npa\x1bh\na")),
        # getattr(getattr(os, "system"), "__call__")("touch marker")
        (
            ["__builtin__.getattr"],
            program(b"]", GETATTR, GETATTR, SYSTEM, opcodes("__call__"), b"\x86R")[:-1]
            + opcodes("__call__")
            + b"\x86R"
            + opcodes(("touch marker",))
            + b"Ra.",
        ),
        (  # a state that would replace the class and the attributes of the object
            ["posix.system"],
            program(b"]", SYSTEM, opcodes({"__class__": 1, "__setstate__": 2, "name": "x"}), b"ba"),
        ),
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
    assert sorted({x.name for x in stubs(found)}) == names
    assert not (tmp_path / "marker").exists()
    assert restricted_pickle.WHITELIST["torch._utils._rebuild_tensor_v2"].name.endswith("_v2")


def stubs(value):
    if isinstance(value, Stub):
        return [value]
    items = [*value, *value.values()] if isinstance(value, dict) else value
    return [x for item in items for x in stubs(item)] if isinstance(items, list | tuple) else []


@FORMATS
def test_registered_extension_codes_are_refused(refused, file_format):
    copyreg.add_extension("posix", "system", 240)
    try:
        for opcode in (b"\x82\xf0", b"\x83\xf0\x00", b"\x84\xf0\x00\x00\x00"):
            refused(file_format(program(opcode, opcodes(("touch marker",)), b"R")), "opcode EXT")
    finally:
        copyreg.remove_extension("posix", "system", 240)


@pytest.mark.parametrize(
    "why, parts",
    [
        ("deeper than any", [b"(" * 50_000, b"t" * 50_000]),
        ("a dict with a tuple as a key", [b"}N", b"\x85" * 100_000, b"Ns"]),
        (
            "a dict with a tuple as a key",
            [b"}", b")q\x00" + b"0h\x00h\x00\x86q\x00" * 60, b"Ns"],
        ),
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


def test_nested_tuples_in_a_set_are_not_hashed(read):
    pairs = program(b"]\x8f()q\x00", b"h\x00h\x00\x86q\x00" * 60, b"\x90a")
    assert [x.name for x in read(archive(pairs))] == ["builtins.set"]


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
        ("asks to set attributes of torch._utils._rebuild_tensor_v2", [REBUILD, STATE, b"b"]),
        ("asks to set attributes of a Tensor", [tensor(0, (6,), (1,)), STATE, b"b"]),
        ("asks to set attributes of a str", [opcodes("a"), STATE, b"b"]),
        ("asks to set attributes of a list", [b"]", STATE, b"b"]),
        ("Namespace without values", [NAMESPACE, opcodes((None, {"a": 1})), b"b"]),
        ("Namespace without values", [NAMESPACE, opcodes({"a": 1}), b"b", STATE, b"b"]),
        ("asks to call a str", [opcodes("a"), b")R"]),
        ("asks to call torch.float32", [global_name("torch", "float32"), b")R"]),
        ("asks to call torch.Size", [global_name("torch", "Size"), b"]R"]),
        ("torch.Size with 9 arguments", [global_name("torch", "Size"), opcodes((1,) * 9), b"R"]),
        ("asks to set items of torch._utils._rebuild_tensor_v2", [REBUILD, b"(NNu"]),
        ("asks to set items of a list", [b"](NNu"]),
        ("asks to set items of a dict", [b"}(Nu"]),
        ("asks to append to a dict", [b"}Na"]),
        ("asks to append to a tuple", [b")(NNe"]),
        ("holds torch._utils._rebuild_tensor_v2, which", [b"](", REBUILD, b"e"]),
        ("holds a storage without a tensor", [tensor(0, (6,), (1,)).partition(b"Q")[0][34:], b"Q"]),
        ("is damaged: .*Unpickling", [b"NN\x93"]),
        ("other than latin1", [ENCODE, opcodes(("a", "zlib")), b"R"]),
        ("other than latin1", [ENCODE, opcodes((b"a", "latin1")), b"R"]),
        ("is damaged: .*TypeError", [global_name("__builtin__", "bytes"), opcodes((2**40,)), b"R"]),
        ("is damaged: .*TypeError", [global_name("argparse", "Namespace"), opcodes(({},)), b"R"]),
        ("opcode INT, which", [b"I1\n"]),
        ("opcode LONG4, which", [b"\x8b\xff\xff\xff\x7f"]),
        ("opcode PERSID, which", [b"Pos\n"]),
        ("opcode INST, which", [b"(ios\nsystem\n"]),
        ("opcode EXT1, which", [b"\x82\x01"]),
        ("opcode BINSTRING, which", [b"T\xff\xff\xff\x7f"]),
        ("unknown opcode 240", [b"\xf0"]),
        ("dict with a tuple as a key", [b"}", opcodes((1,)), b"Ns"]),
        ("dict with a int as a key", [b"}", opcodes(2**64), b"Ns"]),
        ("dict with a float32 as a key", [b"}", opcodes(np.float32(1)), b"Ns"]),
        ("deeper than any", [b"]" * 70, b"a" * 69]),
        ("deeper than any", [b"]q\x00h\x00a"]),
        ("beyond reason", [b"]q\x00", b"h\x00h\x00\x86q\x00" * 60]),
        (
            "beyond reason",
            [ENCODE, b"q\x70", opcodes("a" * 9999), opcodes("latin1"), b"\x86q\x71R"]
            + [b"h\x70h\x71R" * 99],
        ),
        (
            "beyond reason",
            [opcodes(dict.fromkeys(range(999))), b"q\x00](", (NAMESPACE + b"h\x00b") * 99, b"e"],
        ),
        ("is damaged: .*UnpicklingError", [b"h\x07"]),
        ("is damaged: .*IndexError", [b"\x87"]),
        ("is damaged: .*IndexError", [b"t"]),
        ("is damaged: .*IndexError", [b"q\x00"]),
        ("is damaged: .*UnicodeDecodeError", [b"X\x01\x00\x00\x00\xff"]),
        ("a name without an end", [b"cos"]),
        ("is cut off", [b"X\xff\xff\xff\xff"]),
    ],
)
def test_invalid_programs_are_refused(refused, why, parts):
    refused(archive(program(*parts)), why)


def array_of(dtype, shape=(2,), content=bytes(8), order="<"):
    parts = [global_name("numpy.core.multiarray", "_reconstruct"), global_name("numpy", "ndarray")]
    parts += [opcodes((0,)), opcodes("b"), b"\x87R(", opcodes(1), opcodes(shape)]
    parts += [global_name("numpy", "dtype"), opcodes((dtype, 0, 1)), b"R("]
    parts += [opcodes(3), opcodes(order), b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"]
    return program(*parts, opcodes(False), pickle.dumps(content, 3)[2:-1], b"tb")


def test_arrays_of_numpy(read, refused):
    assert_same(read(archive(array_of("f4"))), np.zeros(2, np.float32))
    refused(archive(array_of("O8")), "holds a numpy array of Python objects")
    refused(archive(pickle.dumps(np.array([{}]), 2)), "holds a numpy array of Python objects")
    refused(archive(pickle.dumps(np.array([{}]), 4)), "holds a numpy array of Python objects")
    refused(archive(array_of("V4")), "holds a numpy array of 'V4'")
    refused(archive(array_of("f4", order="=")), "unknown byte order")
    for shape in ((3,), (1,), (-2,), (-1, -2), (2**40, 0, 2**40), (1.0,), (1,) * 40, [2]):
        refused(archive(array_of("f4", shape=shape)), "numpy array of the wrong size")
    refused(archive(array_of("f4", content="a" * 8)), "numpy array of the wrong size")
    refused(archive(array_of("f4").replace(b"ndarray", b"matrix")), "array of an unknown class")
    refused(archive(array_of("f4").replace(b"numpy\nndarray", b"torch\nSize")), "unknown class")
    refused(archive(array_of("f4").partition(b"(")[0] + b"."), "numpy array without content")
    refused(archive(array_of("f4").replace(b"K\x00tb", b"K\x00t")), "numpy array without a dtype")
    scalar = pickle.dumps(np.float64(1.0), 3)
    refused(archive(scalar.replace(b"f8", b"f4")), "numpy scalar of the wrong size")


# Tensors


@pytest.mark.parametrize(
    "offset, size, stride",
    [
        (1, (6,), (1,)),
        (0, (7,), (1,)),
        (0, (2, 3), (4, 1)),
        (0, (2,), (6,)),
        (6, (1,), (1,)),
        (0, (7,), (0,)),
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
        (0, (-2, -3), (3, 1)),
        (5, (2,), (-1,)),
        (0, (2, 3), (1,)),
        (0, (0, 2**60), (1, 1)),
        (0, (0, 2**40, 2**40), (1, 1, 1)),
        (2**200, (1,), (1,)),
        (0, (1,), (2**200,)),
        (0, (1,) * 40, (1,) * 40),
        (True, (1,), (1,)),
        (0, (1.0,), (1,)),
        (0, [1], (1,)),
        (0, (1,), [1]),
        (0, (1,), None),
    ],
)
def test_absurd_shapes_are_refused(refused, offset, size, stride):
    refused(archive(program(tensor(offset, size, stride))), "absurd (shape|strides)")


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
        ("storage of an absurd size", {"count": -6}),
        ("storage of an absurd size", {"count": "6"}),
        ("storage of an absurd size", {"key": 0}),
        ("storage of an unknown kind", {"kind": ("torch", "Size")}),
        ("storage of an unknown kind", {"rest": opcodes(("1", 0, 6))}),
        ("storage of an unknown kind torch.QInt8Storage", {"kind": ("torch", "QInt8Storage")}),
        ("storage '1' is not in it", {"key": "1"}),
        ("storage '../0' is not in it", {"key": "../0"}),
    ],
)
def test_storages_fit_their_tensors(refused, why, changes):
    size = {"offset": 0, "size": (2,), "stride": (1,)}
    refused(archive(program(tensor(**size | changes))), why)


def test_invalid_storages_are_refused(refused):
    refused(archive(program(opcodes(("module", "a")), b"Q")), "refers to something")
    refused(archive(program(b"NQ")), "refers to something")
    other = tensor(0, (3,), (1,), kind=("torch", "DoubleStorage"), count=3)
    refused(archive(program(tensor(0, (6,), (1,)), other)), "storage '0' in two ways")
    refused(archive(program(REBUILD, opcodes((1, 0, (), (), False, {})), b"R")), "more than a view")
    flags = tensor(0, (6,), (1,))[:-2] + opcodes({"neg": True}) + b"tR"
    refused(archive(program(flags)), "more than a view")
    value = tensor(0, (6,), (1,)).replace(b"_v2", b"_v3")
    for dtype, why in ("complex64", "tensor of complex64"), ("Size", "tensor of None"):
        refused(archive(program(value[:-2], global_name("torch", dtype), b"tR")), why)
    parameter = global_name("torch._utils", "_rebuild_parameter") + opcodes((1, True, {})) + b"R"
    refused(archive(program(parameter)), "parameter without a tensor")
    refused(archive(program(global_name("torch", "Size"), opcodes(("a",)), b"\x85R")), "torch.Size")
    device = global_name("torch", "device")
    for arguments in (1,), ("a" * 99,), ("cuda", "0"):
        refused(archive(program(device, opcodes(arguments), b"R")), "torch.device")
