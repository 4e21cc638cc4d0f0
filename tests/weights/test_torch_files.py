# SPDX-License-Identifier: Apache-2.0
"""Torch files: written by torch, damaged, and written for torch."""

import collections
import io
import itertools
import pickle
import random
import re
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tests.goldens.scripts import torch_files as goldens
from tests.goldens.scripts.torch_files import EXPECTED, GOLDEN, ramp
from tests.helpers.fuzzing import mutated
from tests.helpers.torch_files import SIX, archive, assert_same, program, stream, tensor
from tnt_flax.core.errors import InputError
from tnt_flax.weights.formats import restricted_pickle
from tnt_flax.weights.formats import torch as torch_files

CONTENT = {
    "state_dict": {
        "float32": ramp(2, 3),
        "transposed": ramp(2, 3, 4).T,
        "scalar": np.array(1.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    | {str(x): np.ones(3, x) for x in (np.float16, ml_dtypes.bfloat16, np.float64, np.bool_)}
    | {str(x): np.array([7, 1], x) for x in (np.uint8, np.int8, np.int16, np.int32, np.int64)},
    "meta": {"text": "für\n", "none": None, "flags": [True, False], "no": {}},
    "numbers": [0, -1, 127, 128, 255, 2**31, -(2**63), 2**200, float("-inf"), 0.1],
}


@pytest.mark.parametrize("file", EXPECTED)
def test_reads_what_torch_wrote(file):
    assert_same(torch_files.read(GOLDEN / file), EXPECTED[file])
    assert torch_files.looks_like((GOLDEN / file).read_bytes()[:64])


@pytest.mark.parametrize("file_format", [archive, stream])
def test_both_file_formats_are_read(read, file_format):
    expected = np.frombuffer(SIX, np.float32).reshape(2, 3).T[1:]
    assert_same(read(file_format(program(tensor(1, (2, 2), (1, 3))))), expected)


@pytest.mark.parametrize("file", ["zoo.pth", "zoo_stream.pth"])
def test_tensors_are_views_of_the_file(file):
    found = torch_files.read(GOLDEN / file)
    assert np.shares_memory(found["whole"], found["same_storage"])
    for x in found.values():
        assert not isinstance(x, np.ndarray) or not x.flags.writeable
    assert found["transposed"].strides == ramp(2, 3, 4).transpose(2, 0, 1).strides


@pytest.mark.parametrize("file_format", [archive, stream])
def test_unused_tensors_take_no_memory(tmp_path, file_format):
    content = program(tensor(0, (2**22,), (1,), count=2**22))
    if file_format is archive:
        blob = archive(content, {"0": bytes(2**24)})
    else:
        blob = stream(content, storages=struct.pack("<q", 2**22) + bytes(2**24))
    path = tmp_path / "large.pth"
    path.write_bytes(blob)
    tracemalloc.start()
    found = torch_files.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (2**22,) and peak < 2**20


def test_tensors_of_torch_0_are_read(read):
    old = tensor(0, (6,), (1,)).replace(b"_rebuild_tensor_v2", b"_rebuild_tensor")
    old = old[: old.rindex(b"\x89")] + b"tR"  # neither requires_grad nor hooks
    assert read(archive(program(old))).shape == (6,)


def test_other_files_are_recognized_by_their_first_bytes():
    for other in (b"x" * 257 + b"ustar", b"\x89HDF", pickle.dumps({}, 2), b""):
        assert not torch_files.looks_like(other)


WHOLE = archive(program(tensor(0, (6,), (1,))), byteorder=b"little")


def test_missing_or_empty_files_are_refused(refused, tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            torch_files.read(path)
    refused(b"", "cannot be read")
    refused(b"not a weights file", "is not a weights file of torch: give")


@pytest.mark.parametrize("file", ["flat.pth", "flat_stream.pth"])
def test_every_truncation_is_refused(refused, file):
    content = (GOLDEN / file).read_bytes()
    for size in range(1, len(content), 7):
        refused(content[:size], "cut off|damaged|is not a weights file")


def test_unusual_archives_are_refused(refused):
    pickled = program(tensor(0, (6,), (1,)))
    refused(archive(pickled, method=zipfile.ZIP_DEFLATED), "compressed or encrypted")
    encrypted = re.sub(rb"PK\x01\x02.{6}", lambda x: x[0][:8] + b"\x01\x00", WHOLE, flags=re.S)
    refused(encrypted, "compressed or encrypted")
    refused(archive(pickled, byteorder=b"big"), "is big-endian")
    refused(archive(pickled, constants__pkl=b"", **{"constants.pkl": b""}), "TorchScript program")
    refused(archive(pickled, code__a=b""), "TorchScript program, .* state_dict")
    refused(archive(pickled).replace(b"data.pkl", b"meta.pkl"), "zip archive, but not of torch")
    refused(archive(pickled, data__data__pkl=b"", **{"y/data.pkl": b""}), "but not of torch")


def change(blob: bytes, entry: str, field: int, value: int, *, central=True) -> bytes:
    """Sets four bytes, `field` bytes into the header of an entry."""
    blob = bytearray(blob)
    found = blob.rindex(entry.encode()) if central else blob.index(entry.encode())
    header = found - (46 if central else 30)
    blob[header + field : header + field + 4] = struct.pack("<I", value)
    return bytes(blob)


def test_inconsistent_archive_entries_are_refused(refused):
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as f:
        at = {x.filename: x.header_offset for x in f.infolist()}
    refused(change(WHOLE, "x/data/0", 42, at["x/data.pkl"]), "ambiguous names|overlap")
    refused(change(WHOLE, "x/data/0", 42, at["x/data/0"] + 1), "overlap or are missing")
    refused(change(WHOLE, "x/data/0", 42, 2**31), "damaged|cut off")
    for size in (0, 20, 28):
        larger = change(change(WHOLE, "x/data/0", 20, size), "x/data/0", 24, size)
        refused(larger, f"storage '0' has {size} bytes")
    huge = change(change(WHOLE, "x/data/0", 20, 2**30), "x/data/0", 24, 2**30)
    refused(huge, "cut off")
    refused(change(WHOLE, "x/data/0", 24, 23), "cut off")  # stored, yet of two sizes
    size = len(program(tensor(0, (6,), (1,))))
    over = change(change(WHOLE, "x/data.pkl", 20, size + 9), "x/data.pkl", 24, size + 9)
    refused(over, "overlap")
    refused(change(WHOLE, "x/data/0", 28, 0xFFFF0008, central=False), "cut off|ambiguous|damaged")
    refused(WHOLE.replace(b"x/data/0", b"x/data/1", 1), "ambiguous names")
    refused(WHOLE.replace(b"x/byteorder", b"x/data/0\0or"), "ambiguous names")


def test_unusual_streams_are_refused(refused):
    pickled = program(tensor(0, (6,), (1,)))
    refused(stream(pickled, little_endian=False), "is big-endian")
    refused(stream(pickled, version=1000), "is of an unknown version")
    for keys in ((), ("1",), ("0", "0"), ("0", "1")):
        refused(stream(pickled, keys), "list of storages does not match")
    refused(stream(pickled, (0,)), "has no list of storages")
    for count in (-1, 0, 5, 7, 2**62, -(2**63)):
        storages = struct.pack("<q", count) + bytes(24)
        refused(stream(pickled, storages=storages), "damaged: storage|is cut off")
    refused(stream(pickled, storages=struct.pack("<q", 6) + bytes(23)), "is cut off")
    refused(stream(pickled, storages=struct.pack("<i", 6)), "is damaged")
    refused(torch_files.STREAM + pickled, "is cut off")  # a tensor for a version


def test_round_trip_is_the_identity(tmp_path):
    a, b = tmp_path / "a.pth", tmp_path / "b.pth"
    torch_files.write(a, CONTENT)
    assert_same(torch_files.read(a), CONTENT)
    torch_files.write(b, torch_files.read(a))
    assert_same(torch_files.read(b), CONTENT)
    assert a.read_bytes() == b.read_bytes()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.pth", "b.pth"]


def test_the_layout_equals_that_of_torch(tmp_path):
    torch_files.write(tmp_path / "a.pth", EXPECTED["flat.pth"])
    with zipfile.ZipFile(tmp_path / "a.pth") as f, zipfile.ZipFile(GOLDEN / "flat.pth") as golden:
        assert f.testzip() is None
        assert {x.create_system for x in f.infolist()} == {0}  # the same bytes on every system
        found = {x.filename.partition("/")[2]: f.read(x) for x in f.infolist()}
        theirs = {x.filename.partition("/")[2]: golden.read(x) for x in golden.infolist()}
    del found["data.pkl"]
    assert found.items() <= theirs.items() and "data/3" in found and "version" in found
    with open(tmp_path / "a.pth", "rb") as file:
        data = file.read()
        for array in EXPECTED["flat.pth"].values():
            assert data.index(array.tobytes()) % 64 == 0


@pytest.mark.parametrize(
    "content", [{1: 2}, {"a": {"b": {1, 2}}}, {"a": object()}, np.array(["a"]), {"a": (1,)}]
)
def test_types_unknown_to_torch_are_refused(tmp_path, content):
    with pytest.raises(
        InputError, match=r"a\.pth cannot be written: (torch cannot read|the key 1 of)"
    ):
        torch_files.write(tmp_path / "a.pth", content)
    assert not list(tmp_path.iterdir())


OPCODES = bytes(restricted_pickle.RestrictedUnpickler.dispatch)


def mutants(file: str, rng: random.Random, count: int):
    """Yields damaged versions of a golden, and of the golden with a damaged pickle in it."""
    whole = (GOLDEN / file).read_bytes()
    files = {}
    if not whole.startswith(torch_files.STREAM):
        with zipfile.ZipFile(io.BytesIO(whole)) as f:
            files = {x.partition("/")[2]: f.read(x) for x in f.namelist()}
    for _ in range(count):
        yield mutated(whole, rng, OPCODES)
        if files:
            damaged = {"data.pkl": mutated(files["data.pkl"], rng, OPCODES)}
            yield archive(b"", {"": b""}, **files | damaged)


@pytest.mark.slow
def test_damaged_files_are_read_or_refused(tmp_path):
    path, rng, tally = tmp_path / "x.pth", random.Random(0), collections.Counter()
    for content in itertools.chain(*(mutants(file, rng, 300) for file in EXPECTED)):
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        if watched := rng.random() < 0.1:  # it takes its time
            tracemalloc.start()
        try:
            found = list(restricted_pickle.leaves(torch_files.read(path)))
            tally["read"] += 1
            assert sum(len(x.tobytes()) for x in found if isinstance(x, np.ndarray)) >= 0
            assert len(found) < 5 * len(content) + 1000
        except InputError as error:
            message = str(error)
            assert message.startswith(f"{path} ") and "\n" not in message
            reason = message.removeprefix(str(path))
            tally[re.sub(r"( run| of| call|[\d'(\[]).*|refused.*", "", reason)] += 1
        if watched:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 2**19 + 40 * len(content), "large allocation"
    assert tally["read"] > 200 and len(tally) > 20, tally


@pytest.mark.oracle
def test_torch_reads_what_we_write(tmp_path):
    import torch

    torch_files.write(tmp_path / "a.pth", CONTENT)
    for mmap in False, True:
        found = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap)
        for key, x in found["state_dict"].items():
            assert x.is_contiguous() and x.device.type == "cpu" and not x.requires_grad
            is_bfloat16 = x.dtype == torch.bfloat16
            x = x.view(torch.int16).numpy() if is_bfloat16 else x.numpy()
            found["state_dict"][key] = x.view(ml_dtypes.bfloat16) if is_bfloat16 else x
        assert_same(found, CONTENT)


@pytest.mark.oracle
def test_goldens_are_what_torch_writes(tmp_path):
    goldens.main(tmp_path)
    for file in EXPECTED:
        assert_same(torch_files.read(tmp_path / file), EXPECTED[file])


@pytest.mark.oracle
def test_storage_types_are_those_of_torch():
    import torch

    for storage, dtype in restricted_pickle.STORAGES.items():
        kind = torch.tensor([], dtype=getattr(torch, dtype.name)).type()
        assert kind.replace("Tensor", "Storage") == f"torch.{storage}"
        assert getattr(torch, dtype.name).itemsize == dtype.itemsize
