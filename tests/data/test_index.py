# SPDX-License-Identifier: Apache-2.0
"""An index is made once, continued after a kill, shared, checked, and made again when it must."""

import os
import pickle
import signal
import subprocess
import sys
import threading

import fsspec
import numpy as np
import pytest

from tnt_flax.core.errors import InputError
from tnt_flax.data.sources import index, storage
from tnt_flax.data.sources.index import Index, Part, open_index


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def files(tmp_path):
    """Three files; their lines are the records, and the first letter of a line is its text."""
    paths = [str(tmp_path / f"{name}.txt") for name in "xyz"]
    for path, lines in zip(paths, (["aa", "b", "accc"], ["b"], ["dd", "a"]), strict=True):
        with open(path, "w") as file:
            file.write("".join(f"{line}\n" for line in lines))
    return paths


LINES = [b"aa", b"b", b"accc", b"b", b"dd", b"a"]


class Lines:
    """Scans lines and counts the parts that it has seen; may fail at one of them."""

    def __init__(self, fail_at=None, error=KeyboardInterrupt):
        self.seen, self.fail_at, self.error = [], fail_at, error

    def __call__(self, read, part):
        self.seen.append(part.file)
        if part.file == self.fail_at:
            raise self.error
        position = 0
        for line in read(0, part.end).splitlines(keepends=True):
            yield position, len(line) - 1, line[:1].decode()
            position += len(line)


def cut(sizes):
    return [Part(file, 0, size) for file, size in enumerate(sizes)]


def make(files, scan=None, kind="lines"):
    return open_index(kind, files, cut, scan or Lines())


def index_files(folder):
    return sorted(name for name in os.listdir(folder) if "index" in name)


def test_records_are_read_in_any_order(files, tmp_path):
    made = make(files)
    assert [made.read(i) for i in (5, 0, 3, 2, 4, 1)] == [LINES[i] for i in (5, 0, 3, 2, 4, 1)]
    assert [made.texts()[k] for k in made.text] == ["a", "b", "a", "b", "d", "a"]
    assert [list(made.rows_of(k)) for k in range(3)] == [[0, 1, 2], [3], [4, 5]]
    assert made.locate(4) == (files[2], 0, 2) and len(made) == 6
    assert len(index_files(tmp_path)) == 1 and made.path.startswith(f"{files[0]}.")
    assert isinstance(made.text.base.base, np.memmap) or not made.text.flags.owndata


def test_an_index_is_made_once(files):
    make(files)
    scan = Lines()
    again = make(files, scan)
    assert not scan.seen and [again.read(i) for i in range(6)] == LINES
    make(files, scan, kind="other lines")
    make(files[:2], scan)
    assert len(scan.seen) == 5  # another kind and another list of files are other indexes


def test_a_moved_folder_keeps_its_index(files, tmp_path):
    make(files)
    moved = tmp_path.with_name(tmp_path.name + "_moved")
    os.rename(tmp_path, moved)
    scan = Lines()
    assert make([str(moved / os.path.basename(f)) for f in files], scan).read(2) == b"accc"
    assert not scan.seen


@pytest.mark.parametrize("how", ["size", "time"])
def test_a_changed_file_is_noticed(files, caplog, how):
    make(files)
    if how == "size":
        with open(files[1], "a") as file:
            file.write("eee\n")
    else:
        os.utime(files[1], ns=(1, 1))
    changed = make(files)
    assert len(changed) == 6 + (how == "size")
    said = caplog.text
    assert "y.txt has changed since" in said and "indexing again" in said
    scan = Lines()
    make(files, scan)
    assert not scan.seen


def test_a_damaged_index_is_made_again(files, caplog):
    path = make(files).path
    with open(path, "rb") as file:
        whole = file.read()
    assert len(whole) < 1200
    noticed = 0
    for position in (*range(0, 8), *range(8, len(whole), 7), len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        noticed += check(files, path, bytes(damaged), whole)
    assert noticed > 100
    for size in (0, 5, 8, 100, len(whole) - 1):
        caplog.clear()
        assert check(files, path, whole[:size], whole)
        assert f"the index {path} is damaged" in caplog.text


def check(files, path, content, whole):
    """Whether the damage was noticed; if not, it must not matter."""
    with open(path, "wb") as file:
        file.write(content)
    scan = Lines()
    again = make(files, scan)
    assert [again.read(i) for i in range(6)] == LINES
    if scan.seen:  # else the bit was in a shape or a dtype, which nobody reads
        with open(path, "rb") as file:
            assert file.read() == whole
    return bool(scan.seen)


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError("bad")])
def test_a_begun_index_is_continued(files, tmp_path, monkeypatch, error):
    monkeypatch.setattr(index, "THREADS", 1)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        make(files, Lines(2, error))
    assert [name.endswith(".partial") for name in index_files(tmp_path)] == [True]
    scan = Lines()
    continued = make(files, scan)
    assert scan.seen == [2] and [continued.read(i) for i in range(6)] == LINES
    assert [continued.texts()[k] for k in continued.text] == ["a", "b", "a", "b", "d", "a"]
    assert [list(continued.rows_of(k)) for k in range(3)] == [[0, 1, 2], [3], [4, 5]]
    assert index_files(tmp_path) == [os.path.basename(continued.path)]


def test_a_begun_index_of_changed_files_is_not_continued(files, monkeypatch, caplog):
    monkeypatch.setattr(index, "THREADS", 1)
    with pytest.raises(KeyboardInterrupt):
        make(files, Lines(2))
    os.utime(files[0], ns=(1, 1))
    scan = Lines()
    make(files, scan)
    assert scan.seen == [0, 1, 2] and "x.txt has changed" in caplog.text


def test_a_damaged_begun_index_is_not_continued(files, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(index, "THREADS", 1)
    with pytest.raises(KeyboardInterrupt):
        make(files, Lines(2))
    partial = tmp_path / index_files(tmp_path)[0]
    damaged = partial.read_bytes().replace(b'done\\": 2', b'done\\": 1')
    assert damaged != partial.read_bytes()
    partial.write_bytes(damaged)
    scan = Lines()
    assert len(make(files, scan)) == 6 and scan.seen == [0, 1, 2]
    assert "the checksum of its metadata differs" in caplog.text


def test_nothing_begun_leaves_nothing(files, tmp_path):
    with pytest.raises(InputError):
        make(files, Lines(0, InputError("bad")))
    assert not index_files(tmp_path)


def test_a_killed_process_leaves_its_work(files, tmp_path):
    code = f"""if True:
        import glob, os, signal, sys
        sys.path.insert(0, {os.getcwd()!r})
        from tests.data import test_index as t
        t.index.THREADS, t.index.SAVE_EVERY = 1, 0
        class Killed(t.Lines):
            def __call__(self, read, part):
                if part.file == 2:
                    while not glob.glob({str(tmp_path / "*.index.partial")!r}):
                        pass
                    os.kill(os.getpid(), signal.SIGKILL)
                yield from super().__call__(read, part)
        t.make({files!r}, Killed())
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    scan = Lines()
    continued = make(files, scan)
    assert 0 not in scan.seen and 2 in scan.seen
    assert [continued.read(i) for i in range(6)] == LINES


def test_parts_keep_their_order_whoever_is_faster(files):
    last = threading.Event()

    class Backwards(Lines):
        def __call__(self, read, part):
            if part.file == 2:
                last.set()
            assert last.wait(10)
            yield from super().__call__(read, part)

    assert [make(files, Backwards()).read(i) for i in range(6)] == LINES


def test_a_folder_that_cannot_be_written_to(files, tmp_path, cache, monkeypatch):
    real = index.tempfile.TemporaryFile

    def refuse(dir):
        if dir in forbidden:
            raise PermissionError(13, "Permission denied")
        return real(dir=dir)

    monkeypatch.setattr(index.tempfile, "TemporaryFile", refuse)
    forbidden = {str(tmp_path)}
    made = make(files)
    assert made.path.startswith(str(cache)) and not index_files(tmp_path)
    scan = Lines()
    assert make(files, scan).path == made.path and not scan.seen
    forbidden.add(os.path.dirname(made.path))
    os.utime(files[0], ns=(1, 1))
    with pytest.raises(
        InputError, match="Permission denied; set XDG_CACHE_HOME to a writable folder"
    ):
        make(files)


def test_an_index_pickles_as_its_path(files):
    made = make(files)
    data = pickle.dumps(made)
    assert len(data) < 500 and pickle.loads(data).read(5) == b"a"
    os.utime(files[0], ns=(1, 1))
    make(files)  # the same contents
    assert pickle.loads(data).read(5) == b"a"
    with open(files[0], "a") as file:
        file.write("more\n")
    make(files)
    with pytest.raises(InputError, match="was replaced while it was in use"):
        pickle.loads(data)


def test_short_answers_of_the_system_are_completed(files, monkeypatch):
    made, real = make(files), os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, start: real(fd, min(size, 1), start))
    assert [made.read(i) for i in range(6)] == LINES


def test_missing_short_and_empty_files(files, tmp_path):
    made = make(files)
    open(files[2], "w").close()
    with pytest.raises(OSError, match="ends before byte"):
        made.read(4)
    os.remove(files[2])
    with pytest.raises(FileNotFoundError):
        made.read(4)
    with pytest.raises(InputError, match=f"cannot read {files[2]}: No such file"):
        make(files)
    empty = tmp_path / "empty"
    empty.write_text("")
    with pytest.raises(InputError, match="no records found"):
        make([str(empty)])
    with pytest.raises(InputError, match="cannot index .*: broken disk"):
        make(files[:2], Lines(1, OSError("broken disk")))


def test_a_record_must_fit_into_its_columns(files):
    with pytest.raises(InputError, match="a record of 4294967296 bytes is too large"):
        make(files, lambda read, part: iter([(0, 2**32, "")]))


# ------------------------------------------------------------------------------------ addresses


def test_remote_files_are_read_in_place(files, cache):
    memory = fsspec.filesystem("memory")
    urls = [f"memory://bucket/{os.path.basename(path)}" for path in files]
    for path, url in zip(files, urls, strict=True):
        with open(path, "rb") as file:
            memory.pipe_file(url, file.read())
    made = make(urls)
    assert [made.read(i) for i in range(6)] == LINES and made.path.startswith(str(cache))
    scan = Lines()
    make(urls, scan)
    assert not scan.seen and storage.list_folder("memory://bucket") == ["x.txt", "y.txt", "z.txt"]
    memory.pipe_file(urls[0], b"new\n")
    assert make(urls).read(0) == b"new"
    memory.pipe_file(urls[0], b"old\n")
    make(urls, scan)
    assert scan.seen
    with pytest.raises(OSError, match="ends before byte"):
        storage.read(urls[0], 2, 5)
    memory.rm(urls[0])
    with pytest.raises(InputError, match="cannot read memory://bucket/x.txt"):
        make(urls)


def test_addresses_that_cannot_be_read(monkeypatch):
    with pytest.raises(InputError, match="fsspec does not know nonsense:// paths"):
        storage.file_versions(["nonsense://a/b"])

    def missing(url):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(InputError, match=r'gs:// paths need another package: pip install "tnt_f'):
        storage.list_folder("gs://bucket/imagenet")


def test_a_folder_does_not_list_itself(monkeypatch):
    class Bucket:
        def ls(self, path, detail):
            return ["b/folder/", "b/folder/x.tar", "b/folder/sub/"]  # as object stores do it

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (Bucket(), "b/folder/"))
    assert storage.list_folder("gs://b/folder/") == ["sub", "x.tar"]


def test_the_failures_of_every_file_system_are_oserrors(monkeypatch):
    class Broken:
        def cat_file(self, *_):
            raise RuntimeError("503\nservice unavailable")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (Broken(), url))
    with pytest.raises(OSError, match="gs://b/x: RuntimeError: 503$"):
        storage.read("gs://b/x", 0, 5)


def test_paths_and_addresses_are_joined():
    assert storage.join("gs://b/data/", "x.tar") == "gs://b/data/x.tar"
    assert storage.join("/data", "gs://b/x.tar") == "gs://b/x.tar"
    assert storage.join("/data", "/x.tar") == "/x.tar"
    assert storage.join("~", "x.tar") == os.path.expanduser("~/x.tar")
    assert (storage.dirname("gs://b/c/x"), storage.basename("gs://b/c/x")) == ("gs://b/c", "x")


def test_an_index_says_what_it_is_to_everyone(files):
    from safetensors import safe_open

    with safe_open(make(files).path, "np") as file:
        assert sorted(file.keys()) == ["first", "size", "start", "text", "texts"]
        assert file.get_tensor("size").tolist() == [2, 1, 4, 1, 2, 1]
    assert Index(make(files).path, tuple(files)).read(0) == b"aa"
