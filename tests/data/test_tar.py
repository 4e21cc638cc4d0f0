# SPDX-License-Identifier: Apache-2.0
"""Tar headers: equality with the standard library, and detection of damage."""

import gzip
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
    read = lambda position, size: data[position : position + size]
    return list(members(read, start, len(data) if end is None else end, "x.tar"))


def refused(data):
    message = message_of(lambda: scan(data))
    assert message.startswith("x.tar")
    return message


@pytest.mark.parametrize("file_format", FORMATS)
def test_members_are_those_of_tarfile(file_format):
    names = dict(FILES)
    if file_format != tarfile.USTAR_FORMAT:
        names["ü" * 90 + ".jpg"] = b"f"
    data = tar(names, file_format)
    found = scan(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as reader:
        expected = [(m.name, m.offset_data, m.size) for m in reader]
    assert found == expected and len(found) == len(names)
    assert [data[m.start : m.start + m.size] for m in found] == list(names.values())
    # The same tar inside another file.
    inner = scan(b"x" * 1024 + data + b"y" * 512, 1024, 1024 + len(data))
    assert inner == [m._replace(start=m.start + 1024) for m in found]


@pytest.mark.parametrize("file_format", FORMATS)
def test_only_regular_files_count(file_format):
    buffer = io.BytesIO()
    kinds = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE)
    with tarfile.open(fileobj=buffer, mode="w", format=file_format) as writer:
        for kind in kinds:
            member = tarfile.TarInfo(f"member{kind.decode()}")
            member.type, member.linkname = kind, "y" * (1 if file_format == FORMATS[0] else 150)
            member.size = 0 if kind == tarfile.CONTTYPE else 700  # without contents
            writer.addfile(member)
        member = tarfile.TarInfo("last.jpg")
        member.size = 3
        writer.addfile(member, io.BytesIO(b"abc"))
    assert [m.name for m in scan(buffer.getvalue())] == ["member7", "last.jpg"]


@pytest.mark.parametrize("file_format", FORMATS[1:])
def test_sizes_above_8_gib(file_format):
    header = tarfile.TarInfo("big.jpg")
    header.size, header.pax_headers = 9 * 2**30, {"comment": "x" * 600}
    data = header.tobuf(file_format)
    zeros = lambda position, size: data[position : position + size] or bytes(size)
    found = list(members(zeros, 0, 10 * 2**30, "x.tar"))
    assert found == [("big.jpg", len(data), 9 * 2**30)]


def test_every_truncation_is_detected():
    data = tar(FILES, tarfile.GNU_FORMAT)
    end = scan(data)[-1].start + 512
    for size in {0, 1, 511, 512, 513, 1024, 1536, end - 513, end - 512, end - 1, end}:
        assert "is truncated" in refused(data[:size]), size
    longest = scan(data)[3]
    message = refused(data[: longest.start + 100])
    assert f"{LONG} should end at byte {longest.start + 513}, but the tar ends" in message
    assert scan(data[: end + 512]) == scan(data)  # an end mark of one block is accepted


def test_damaged_compressed_and_sparse_tars_are_refused():
    data = bytearray(tar(FILES))
    start = scan(bytes(data))[2].start
    data[start - 500] ^= 1
    assert refused(bytes(data)) == f"x.tar is damaged at byte {start - 512}: there is no tar header"
    assert refused(b"no tar at all" * 100) == "x.tar is not a tar file: there is no tar header"
    zipped = gzip.compress(tar({str(k): bytes([k] * k) * 99 for k in range(250)}), 1)
    assert len(zipped) > 512 and "is compressed (gzip)" in refused(zipped)
    sparse = bytearray(tarfile.TarInfo("s.jpg").tobuf(tarfile.GNU_FORMAT))
    sparse[156:157] = b"S"
    sparse[148:156] = b" " * 8
    sparse[148:155] = b"%06o\0" % sum(sparse)
    assert "s.jpg is sparse" in refused(bytes(sparse) + bytes(1024))
    pax = tarfile.TarInfo("s.jpg")
    pax.pax_headers = {"GNU.sparse.major": "1"}
    assert "s.jpg is sparse" in refused(pax.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    broken = tar({"ü.jpg": b"1"}, tarfile.PAX_FORMAT).replace(b"path=", b"path:")
    assert "no pax header at byte 0" in refused(broken)
