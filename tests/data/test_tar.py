# SPDX-License-Identifier: Apache-2.0
"""Members of tar files: their positions, and detection of damage."""

import io
import tarfile

import pytest

from tests.helpers.source_checks import message_of
from tests.helpers.tars import tar
from tnt_flax.data.sources.archives import members

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
LONG = "folder/" * 20 + "image.jpg"  # longer than the 100 bytes of a header's name
FILES = {
    "a.jpg": b"a" * 700,
    "deep/er/b.jpg": b"",
    "c.jpg": b"c" * 512,
    LONG: b"d" * 513,
    "e.jpg": b"e",
}


def scan(data, start=0, end=None):
    end = len(data) if end is None else end
    found = members(io.BytesIO(data), start, end, "x.tar")
    return [(member.name, member.offset_data, member.size) for member in found]


def refused(data):
    message = message_of(lambda: scan(data))
    assert message.startswith("x.tar")
    return message


@pytest.mark.parametrize("file_format", FORMATS)
def test_members_are_found_also_inside_another_file(file_format):
    files = dict(FILES)
    if file_format != tarfile.USTAR_FORMAT:
        files["ü" * 90 + ".jpg"] = b"f"
    data = tar(files, file_format)
    found = scan(data)
    assert [name for name, _, _ in found] == list(files)
    assert [data[start : start + size] for _, start, size in found] == list(files.values())
    inner = scan(b"x" * 1024 + data + b"y" * 512, 1024, 1024 + len(data))
    assert inner == [(name, start + 1024, size) for name, start, size in found]
    # Before another tar, a missing end mark is not mistaken for more members.
    end = found[-1][1] + 512
    message = message_of(lambda: scan(data[:end] + data, 0, end))
    assert "x.tar is truncated or damaged" in message


@pytest.mark.parametrize("file_format", FORMATS)
def test_only_regular_files_count(file_format):
    buffer = io.BytesIO()
    kinds = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE)
    with tarfile.open(fileobj=buffer, mode="w", format=file_format) as writer:
        for kind in kinds:
            member = tarfile.TarInfo(f"member{kind.decode()}")
            member.type, member.linkname = kind, "y" * (1 if file_format == FORMATS[0] else 150)
            writer.addfile(member)
        member = tarfile.TarInfo("last.jpg")
        member.size = 3
        writer.addfile(member, io.BytesIO(b"abc"))
    assert [name for name, _, _ in scan(buffer.getvalue())] == ["member7", "last.jpg"]


def test_every_truncation_is_detected():
    data = tar(FILES, tarfile.GNU_FORMAT)
    end = scan(data)[-1][1] + 512
    for size in {0, 1, 511, 512, 513, 1024, 1536, end - 513, end - 512, end - 1, end}:
        assert "is truncated or damaged near byte " in refused(data[:size]), size
    assert scan(data[: end + 512]) == scan(data)  # an end mark of one block is accepted


def test_damaged_and_sparse_tars_are_refused():
    data = bytearray(tar(FILES))
    start = scan(bytes(data))[2][1]
    data[start - 500] ^= 1
    assert f"is truncated or damaged near byte {start - 512}: copy" in refused(bytes(data))
    assert "is truncated or damaged" in refused(b"no tar at all" * 100)
    sparse = bytearray(tarfile.TarInfo("s.jpg").tobuf(tarfile.GNU_FORMAT))
    sparse[156:157] = b"S"
    sparse[148:156] = b" " * 8
    sparse[148:155] = b"%06o\0" % sum(sparse)
    assert "s.jpg is sparse" in refused(bytes(sparse) + bytes(1024))
    pax = tarfile.TarInfo("s.jpg")
    pax.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}
    assert "s.jpg is sparse" in refused(pax.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
