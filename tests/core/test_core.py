# SPDX-License-Identifier: Apache-2.0
"""Atomic writes, tables, error texts and comparisons of trees."""

import errno

import numpy as np
import pyarrow.parquet
import pytest

from tnt_flax.core.errors import InputError, RunError, did_you_mean, listed, one_line
from tnt_flax.core.files import atomic_path, cache_folder, open_table, write_atomic
from tnt_flax.core.trees import check_tensors_match, diff_nested


@pytest.mark.parametrize("fsync", [False, True])
@pytest.mark.parametrize(
    "content", ["né\n", b"n\xc3\xa9\n", lambda file: file.write(b"n\xc3\xa9\n")]
)
def test_write_atomic_replaces_a_file(tmp_path, content, fsync):
    path = tmp_path / "file.txt"
    path.write_text("old")
    write_atomic(path, content, fsync=fsync)
    assert path.read_text() == "né\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, fail)
    assert path.read_text() == "old"
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "part").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_path_moves_a_folder_and_keeps_the_suffix(tmp_path):
    with atomic_path(tmp_path / "a.onnx") as temporary:
        assert temporary.suffix == ".onnx"
        temporary.mkdir()
        (temporary / "part").write_text("all")
    assert (tmp_path / "a.onnx" / "part").read_text() == "all"


def test_cache_folder(monkeypatch, unprivileged_folder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(unprivileged_folder / "cache"))
    assert cache_folder() == unprivileged_folder / "cache" / "tnt_flax"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(unprivileged_folder))
    assert cache_folder() == unprivileged_folder / ".cache" / "tnt_flax"
    monkeypatch.setenv("HOME", "/")  # read-only
    assert cache_folder() is None
    monkeypatch.chdir(unprivileged_folder)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a user without an entry
    assert cache_folder() is None
    assert [path.name for path in unprivileged_folder.iterdir() if path.name != "cache"] == [
        ".cache"
    ]


def test_error_texts():
    assert did_you_mean("TNT_s", ["tnt_s", "tnt_b", "other"]) == " (did you mean 'tnt_s'?)"
    assert did_you_mean("xyz", ["tnt_s", "tnt_b"]) == ""
    assert listed(["a", "b"]) == "a, b"
    assert listed(["a", "b", "c"], limit=1, separator="; ") == "a and 2 more"
    assert one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert one_line(KeyError()) == "KeyError"


def test_mismatched_tensors_are_listed():
    found = {"a": np.zeros(2), "b": np.zeros((2, 3), np.float32)}
    check_tensors_match("x", found, found)
    expected = {"b": np.zeros((3, 2), np.float32), "c": np.zeros(1)}
    with pytest.raises(InputError) as error:
        check_tensors_match("weights", found, expected)
    assert str(error.value) == (
        "weights does not fit this model: ! b float32[2, 3], not float32[3, 2]; "
        "+ a float64[2]; - c float64[1]"
    )


def test_diff_nested():
    old = {"a": 1, "b": {"c": 2, "d": 3}, "e": 4}
    new = {"a": 1, "b": {"c": 5, "d": 3}, "f": 6}
    assert diff_nested(old, new) == ["b.c: 2 -> 5", "e: 4 -> None", "f: None -> 6"]


def test_open_table_writes_a_whole_table_or_none(tmp_path):
    columns = {"a": str, "b": int}
    for suffix in ("csv", "jsonl", "parquet"):
        path = tmp_path / f"t.{suffix}"
        with pytest.raises(RunError), open_table(path, columns) as write:
            write({"a": "x", "b": 1})
            raise RunError("interrupted")
        assert not list(tmp_path.iterdir())
        with pytest.raises(RunError, match=f"cannot write {path}: No space left"):
            with open_table(path, columns):
                raise OSError(errno.ENOSPC, "No space left on device")
        path.mkdir()
        with pytest.raises(InputError, match=f"cannot write {path}: Is a directory"):
            with open_table(path, columns):
                pass
        path.rmdir()
        assert not list(tmp_path.iterdir())
    with open_table(tmp_path / "t.parquet", columns) as write:
        for i in range(25_000):
            write({"a": None if i % 2 else "y", "b": i})
    assert pyarrow.parquet.read_table(tmp_path / "t.parquet")["b"].to_pylist() == [*range(25_000)]
