# SPDX-License-Identifier: Apache-2.0
"""Indexes of records: built once, continued after a kill, verified, and rebuilt when needed."""

import glob
import os
import pathlib
import pickle

import fsspec
import pytest

from tnt_flax.core.errors import InputError
from tnt_flax.data.sources import index, storage
from tnt_flax.data.sources.index import open_index

LINES = [b"aa", b"b", b"accc", b"b", b"dd", b"a"]
TEXTS = ["a", "b", "a", "b", "d", "a"]
ROWS = [[0, 1, 2], [3], [4, 5]]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def files(tmp_path):
    """Three files whose lines are the records; the text of a record is its first letter."""
    paths = [str(tmp_path / f"{name}.txt") for name in "xyz"]
    for path, content in zip(paths, (b"aa\nb\naccc\n", b"b\n", b"dd\na\n"), strict=True):
        pathlib.Path(path).write_bytes(content)
    return paths


@pytest.fixture
def partial(files, monkeypatch):
    """The path of a partial index of the first two files, as a killed process leaves it."""
    monkeypatch.setattr(index, "THREADS", 1)
    monkeypatch.setattr(index, "SAVE_EVERY", 0)
    with pytest.raises(KeyboardInterrupt):
        build(files, Lines(2))
    (path,) = glob.glob(f"{os.path.dirname(files[0])}/*.index*")
    assert path.endswith(".partial")
    return pathlib.Path(path)


class Lines:
    """Scans lines and lists the files of the scanned parts in `seen`; may fail at one of them."""

    def __init__(self, fail_at=None, error=KeyboardInterrupt):
        self.seen, self.fail_at, self.error = [], fail_at, error

    def __call__(self, file, part, path):
        self.seen.append(part.file)
        if part.file == self.fail_at:
            raise self.error
        position = 0
        for line in file:
            yield position, len(line) - 1, line[:1].decode()
            position += len(line)


def build(files, scan=None, kind="lines"):
    return open_index(kind, files, scan or Lines())


def scanned(files, kind="lines"):
    """Opens the index and returns the numbers of the files that are scanned for it."""
    scan = Lines()
    build(files, scan, kind)
    return scan.seen


def assert_complete(opened):
    assert [opened.read(i) for i in (5, 0, 3, 2, 4, 1)] == [LINES[i] for i in (5, 0, 3, 2, 4, 1)]
    assert [opened.texts[k] for k in opened.text] == TEXTS
    assert [list(rows) for rows in opened.rows_per_file()] == ROWS


def test_records_are_read_in_any_order(files, tmp_path):
    built = build(files)
    assert_complete(built)
    assert built.locate(4) == (files[2], 0, 2) and len(built) == 6
    assert list(map(str, tmp_path.glob("*index*"))) == [built.path]


def test_an_index_is_built_once_per_kind_and_files(files, tmp_path):
    assert sorted(scanned(files)) == [0, 1, 2] and not scanned(files)
    assert len(scanned(files, kind="other lines")) == 3 and len(scanned(files[:2])) == 2
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "_moved"))
    files = [str(moved / os.path.basename(file)) for file in files]
    assert not scanned(files) and build(files).read(2) == b"accc"


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_file_rebuilds_the_index(files, caplog, change):
    build(files)
    if change == "size":
        pathlib.Path(files[1]).write_text("b\neee\n")
    else:
        os.utime(files[1], ns=(1, 1))
    assert len(build(files)) == 6 + (change == "size")
    assert "y.txt has changed since" in caplog.text and "indexing again" in caplog.text
    assert not scanned(files)


def test_a_damaged_index_is_rebuilt(files, caplog):
    path = pathlib.Path(build(files).path)
    whole = path.read_bytes()
    assert len(whole) < 1200

    def rebuild(content):
        path.write_bytes(content)
        caplog.clear()
        assert_complete(build(files))
        assert f"the index {path} is damaged" in caplog.text and path.read_bytes() == whole

    for position in (*range(0, len(whole), 5), len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        rebuild(bytes(damaged))
    for size in (0, 5, 100, len(whole) - 1):
        rebuild(whole[:size])


# ----------------------------------------------------------------------------------- partial work


def test_a_partial_index_is_continued(files, partial):
    scan = Lines()
    assert_complete(build(files, scan))
    assert scan.seen == [2] and not partial.exists()


def test_a_changed_or_damaged_partial_index_is_discarded(files, partial, caplog):
    whole = partial.read_bytes()
    os.utime(files[0], ns=(1, 1))
    assert scanned(files) == [0, 1, 2] and "x.txt has changed" in caplog.text
    partial.write_bytes(whole.replace(b'done": 2', b'done": 1'))
    os.utime(files[0], ns=(2, 2))
    assert scanned(files) == [0, 1, 2] and f"{partial} is damaged" in caplog.text


# ------------------------------------------------------------------------------ folders and errors


def test_a_folder_that_is_not_writable(files, tmp_path, cache, monkeypatch):
    forbidden = {str(tmp_path)}
    monkeypatch.setattr(index.os, "access", lambda folder, _: folder not in forbidden)
    built = build(files)
    assert built.path.startswith(str(cache)) and not list(tmp_path.glob("*index*"))
    assert not scanned(files)
    forbidden.add(os.path.dirname(built.path))
    os.utime(files[0], ns=(1, 1))
    with pytest.raises(InputError, match="cannot write an index to .*: set XDG_CACHE_HOME to a wr"):
        build(files)


def test_an_index_pickles_as_its_path(files):
    built = build(files)
    data = pickle.dumps(built)
    assert len(data) < 500 and pickle.loads(data).read(5) == b"a"
    pathlib.Path(files[0]).write_text("more\n")
    build(files)
    with pytest.raises(InputError, match="was replaced while it was in use"):
        pickle.loads(data)


def test_missing_truncated_and_empty_files(files, tmp_path):
    built = build(files)
    open(files[2], "w").close()
    with pytest.raises(OSError, match="ends before byte"):
        built.read(4)
    os.remove(files[2])
    with pytest.raises(FileNotFoundError):
        built.read(4)
    with pytest.raises(InputError, match=f"cannot read {files[2]}: No such file"):
        build(files)
    empty = tmp_path / "empty"
    empty.write_text("")
    with pytest.raises(InputError, match="no records found"):
        build([str(empty)])
    with pytest.raises(InputError, match="cannot index .*: broken disk"):
        build(files[:2], Lines(1, OSError("broken disk")))
    assert build(files[:2], lambda *_: iter([(2**40, 2**33, "")])).locate(0)[1:] == (2**40, 2**33)


def test_remote_files_are_indexed_in_the_cache_folder(files, cache):
    memory = fsspec.filesystem("memory")
    urls = [f"memory://bucket/{os.path.basename(path)}" for path in files]
    for path, url in zip(files, urls, strict=True):
        memory.pipe_file(url, pathlib.Path(path).read_bytes())
    built = build(urls)
    assert [built.read(i) for i in range(6)] == LINES and built.path.startswith(str(cache))
    assert not scanned(urls)
    assert storage.list_folder("memory://bucket") == ["x.txt", "y.txt", "z.txt"]
    memory.pipe_file(urls[0], b"new\n")
    assert build(urls).read(0) == b"new"
    memory.pipe_file(urls[0], b"old\n")
    assert scanned(urls)
    with pytest.raises(OSError, match="ends before byte"):
        storage.read(urls[0], 2, 5)
    memory.rm(urls[0])
    with pytest.raises(InputError, match="cannot read memory://bucket/x.txt"):
        build(urls)
