# SPDX-License-Identifier: Apache-2.0
import pathlib
import random

import ml_dtypes
import numpy as np
import pytest

from tests.goldens.scripts import weights as goldens
from tests.helpers.fuzzing import mutated
from tnt_flax.core.errors import InputError
from tnt_flax.weights.formats import mindspore

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens/data"
TYPES = GOLDEN / "mindspore" / "types.ckpt"
NETWORKS = [GOLDEN / "weights" / f"{name}.ckpt" for name in ("mindspore", "mindspore_pets")]


def field(key, content):
    """A protobuf field of fewer than 128 bytes, or a number."""
    return bytes([key, content] if isinstance(content, int) else [key, len(content), *content])


def entry(tag=b"w", dims=(2,), kind=b"Float32", content=bytes(8)):
    dims = b"".join(dim if isinstance(dim, bytes) else field(8, dim) for dim in dims)
    tensor = dims + field(18, kind) + field(26, content)
    return field(10, field(10, tag) + field(18, tensor))


@pytest.fixture
def read(tmp_path):
    """Reads the given bytes as a file."""

    def read(content):
        (tmp_path / "x.ckpt").write_bytes(content)
        return mindspore.read(tmp_path / "x.ckpt")

    return read


@pytest.mark.parametrize("name", ["types.ckpt", "crc.ckpt"])
def test_reads_every_type_that_mindspore_writes(name):
    tensors = mindspore.read(TYPES.with_name(name))
    numbers = {name: x for name, x in goldens.APPENDED.items() if not isinstance(x, str)}
    assert list(tensors) == goldens.KINDS + list(numbers)
    for kind in goldens.KINDS:
        expected = ml_dtypes.bfloat16 if kind == "BFloat16" else kind.lower()
        assert tensors[kind].dtype == expected
        np.testing.assert_array_equal(tensors[kind].astype(np.float32), goldens.sample(kind))
    assert {name: tensors[name].shape for name in numbers} == dict.fromkeys(numbers, ())
    assert {name: tensors[name].item() for name in numbers} == numbers
    assert not any(x.flags.writeable for x in tensors.values())


def test_joins_slices():
    sliced = mindspore.read(TYPES.with_name("sliced.ckpt"))
    np.testing.assert_array_equal(sliced["a"], np.arange(600.0).reshape(200, 3))
    assert not sliced["a"].flags.writeable


@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.name)
def test_writes_what_mindspore_wrote(path, tmp_path):
    mindspore.write(tmp_path / "x.ckpt", mindspore.read(path))
    assert (tmp_path / "x.ckpt").read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]  # nothing temporary stays


def test_writes_slices_as_mindspore_does(tmp_path, monkeypatch):
    monkeypatch.setattr(mindspore, "SLICE", 1024)
    path = TYPES.with_name("sliced.ckpt")
    mindspore.write(tmp_path / "x.ckpt", mindspore.read(path))
    assert (tmp_path / "x.ckpt").read_bytes() == path.read_bytes()


def test_writes_any_memory_layout(tmp_path):
    tensors = {
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "strided": np.arange(9, dtype=np.int16)[::2],
        "big-endian": np.arange(3, dtype=">f4"),
        "long name " * 30: np.float32(1),
        "": np.ones((1,) * 32, bool),
    } | {kind: goldens.sample(kind).astype(mindspore.DTYPES[kind]) for kind in goldens.KINDS}
    mindspore.write(tmp_path / "x.ckpt", tensors)
    back = mindspore.read(tmp_path / "x.ckpt")
    assert list(back) == list(tensors)
    for name, expected in tensors.items():
        np.testing.assert_array_equal(back[name], expected, strict=name != "big-endian")


@pytest.mark.parametrize("bad", [np.zeros(0), np.ones(1, complex), np.array(["a"])])
def test_a_failed_write_changes_nothing(bad, tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"before")
    with pytest.raises(InputError, match=r"'b' is .*: a MindSpore checkpoint has no tensors"):
        mindspore.write(path, {"a": np.ones(3), "b": bad})
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]


def test_scalars_of_older_versions_are_read(read):
    tensors = read(entry(dims=(0,), content=bytes(4)) + entry(b"none", (0,), content=b""))
    assert {name: x.shape for name, x in tensors.items()} == {"w": (), "none": (0,)}
    assert read(entry(b"none", (3, 0), content=b""))["none"].shape == (3, 0)


MINUS_ONE = b"\x08" + b"\xff" * 9 + b"\x01"
BIG = b"\x08" + b"\x80" * 8 + b"\x40"  # 2**62


@pytest.mark.parametrize(
    "content, fault",
    [
        (entry()[:-1], "its protobuf message is damaged or cut off"),
        (b"\x0a" + b"\xff" * 11, "damaged or cut off"),
        (b"\x08\x01", "unknown fields"),
        (field(10, b""), "a value in it has no tensor"),
        (field(10, field(10, b"w") + field(18, b"")), "missing, repeated or unknown fields"),
        (field(10, field(10, b"w") + field(26, b"")), r"no tensor; .* \(MapParameter\)"),
        (field(10, field(10, b"w") * 2 + entry()[5:]), "missing, repeated or unknown fields"),
        (entry() + field(24, 1), "missing, repeated or unknown fields"),
        (entry(kind=b"Int4"), "'w' is of type 'Int4'; known are Int8, "),
        (entry(content=bytes(7)), r"'w' has 7 bytes, not those of Float32\[2\]"),
        (entry(dims=(MINUS_ONE,)), r"'w' has 8 bytes, not those of Float32\[-1\]"),
        (entry(dims=(BIG, 8)), r"'w' has 8 bytes, not those of Float32\[4611686018427387904, 8\]"),
        (entry(dims=(1,) * 33, content=bytes(4)), "'w' has 4 bytes, not those of"),
        (entry(dims=(0, BIG, BIG), content=b""), "'w' has impossible dims"),
        (entry() + entry(), r"'w' has 16 bytes, not those of Float32\[2\]"),
        (entry() + entry(b"v") + entry(), "'w' occurs twice"),
        (entry() + entry(dims=(3,), content=b""), "slices of 'w' differ in shape or type"),
        (entry() + b"crc_num" + bytes(10), "its CRC-32 does not match its content"),
        (TYPES.with_name("encrypted.ckpt").read_bytes(), "it is encrypted; load it in MindSpore"),
    ],
    ids=lambda x: x[:30] if isinstance(x, str) else "",
)
def test_each_kind_of_damage_is_named(read, content, fault):
    with pytest.raises(InputError, match=f"is not a readable MindSpore checkpoint: .*{fault}") as e:
        read(content)
    assert "\n" not in str(e.value)


def test_missing_files_are_refused(tmp_path):
    for path in (tmp_path / "none.ckpt", tmp_path):
        with pytest.raises(InputError, match="cannot read .*; check the path"):
            mindspore.read(path)


def test_a_crc_detects_a_flipped_bit(read):
    content = bytearray(TYPES.with_name("crc.ckpt").read_bytes())
    content[30] ^= 1
    with pytest.raises(InputError, match="its CRC-32 does not match its content"):
        read(content)


def test_files_are_recognized_by_their_first_bytes():
    for path in (*GOLDEN.glob("*/*.*"), pathlib.Path(__file__)):
        head = path.read_bytes()[:512]
        assert mindspore.looks_like(head) == (path.suffix == ".ckpt"), path
    for head in (b"", b"\n", b"\n\x05\n", b"\n\n\n\n\n", b"\n\x08\n\x00\x12\x00", b"\n" * 600):
        assert not mindspore.looks_like(head)


def test_damaged_files_are_read_or_refused(tmp_path):
    original, rng, refused = TYPES.read_bytes(), random.Random(0), 0
    with open(tmp_path / "x.ckpt", "w+b") as f:  # kept open: that is quicker than a new file
        for _ in range(3000):
            content = mutated(original, rng, bytes([0, 1, 8, 10, 18, 26, 127, 128, 255]))
            f.seek(0)
            f.write(content)
            f.truncate()
            f.flush()
            try:
                tensors = mindspore.read(tmp_path / "x.ckpt")
            except InputError:
                refused += 1
            else:
                assert sum(x.nbytes for x in tensors.values()) <= len(content)
    assert 1500 < refused < 3000
