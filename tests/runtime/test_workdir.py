# SPDX-License-Identifier: Apache-2.0
"""The lock of a workdir, its config.json and its free space."""

import errno
import fcntl
import json
import pathlib
import subprocess
import sys
from collections import namedtuple

import pytest

from tnt_flax.__main__ import main as run_tnt_flax
from tnt_flax.core.errors import InputError, RunError
from tnt_flax.runtime.workdir import (
    check_space,
    config_from_json,
    config_to_json,
    explain_write_errors,
    open_workdir,
)

CONFIG = {"batch_size": 4, "data": {"root": "a", "threads": 1}, "log": {"every": "1 steps"}}


def test_one_trainer_per_workdir(tmp_path, root):
    code = (
        "import pathlib, sys; from tnt_flax.runtime.workdir import open_workdir\n"
        "with open_workdir(pathlib.Path(sys.argv[1]), {'batch_size': 4}): pass"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with open_workdir(tmp_path, {"batch_size": 4}):
        held = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert held.returncode and "another trainer (process" in held.stderr
    assert subprocess.run(command, cwd=root).returncode == 0  # free again


@pytest.mark.parametrize("missing", ["flock", "fcntl"])
def test_a_file_system_or_platform_without_locks_is_a_warning(
    tmp_path, monkeypatch, caplog, missing
):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    if missing == "flock":
        monkeypatch.setattr(fcntl, "flock", flock)
    else:
        monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows
    with open_workdir(tmp_path, CONFIG), open_workdir(tmp_path, CONFIG):
        assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith(f"warning: cannot lock workdir {tmp_path} (")
    assert "a second trainer in it would not be detected" in caplog.messages[0]


@pytest.mark.parametrize("result", ["checkpoints/10/x", "metrics.jsonl", "weights.safetensors"])
def test_results_of_another_config_are_refused_by_key(tmp_path, result):
    with open_workdir(tmp_path, CONFIG):
        pass
    (tmp_path / result).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / result).write_text("{}")
    other = CONFIG | {"batch_size": 8}
    with pytest.raises(InputError, match=r"another config \(batch_size: 4 -> 8\)") as error:
        with open_workdir(tmp_path, other):
            pass
    assert f"choose another workdir and set --config.init_from={tmp_path}" in str(error.value)
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_a_workdir_without_results_accepts_another_config(tmp_path, caplog):
    with open_workdir(tmp_path, CONFIG):
        (tmp_path / "checkpoints").mkdir()  # as created during set-up
        (tmp_path / "metrics.jsonl").touch()
    caplog.set_level("INFO", "tnt_flax")
    other = CONFIG | {"batch_size": 8}
    with open_workdir(tmp_path, other):
        pass
    assert json.loads((tmp_path / "config.json").read_text()) == other
    assert caplog.messages == [
        f"workdir {tmp_path} has no results yet; config changed: batch_size: 4 -> 8"
    ]


def test_a_resumed_run_may_change_keys_without_effect_on_results(tmp_path):
    with open_workdir(tmp_path, CONFIG):
        pass
    moved = {"batch_size": 4, "data": {"root": "b", "threads": 2}, "log": {"every": "9 steps"}}
    with open_workdir(tmp_path, moved):
        pass
    assert json.loads((tmp_path / "config.json").read_text()) == moved


def test_config_to_json_equals_a_round_trip(smoke_config):
    config = smoke_config()
    stored = config_to_json(config)
    assert json.loads(json.dumps(stored)) == stored
    assert stored["augment"]["scale"] == [0.5, 1.0]
    assert config_from_json(stored).to_dict() == config.to_dict()


def test_an_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    for path, problem in (("file", "File exists"), ("file/run", "Not a directory")):
        with pytest.raises(InputError, match=f"cannot write to workdir .*/{path}: {problem}"):
            with open_workdir(tmp_path / path, CONFIG):
                pass


def test_a_workdir_that_another_user_may_not_change(unprivileged_folder):
    workdir = unprivileged_folder / "run"
    with open_workdir(workdir, CONFIG):
        pass
    workdir.chmod(0o555)
    for path in (workdir / "new", workdir):
        with pytest.raises(InputError, match="cannot write to workdir .*: Permission denied: free"):
            with open_workdir(path, CONFIG | {"batch_size": 8}):
                pass
    workdir.chmod(0o755)
    assert json.loads((workdir / "config.json").read_text()) == CONFIG


@pytest.mark.parametrize("kind", [InputError, RunError])
def test_a_full_disk_names_the_workdir(tmp_path, kind):
    with pytest.raises(kind, match=f"cannot write to workdir {tmp_path}: No space left on dev"):
        with explain_write_errors(tmp_path, kind), open("/dev/full", "w") as file:
            file.write("x")


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://b", "file:///tmp/run", "hf://a/b"])
def test_an_address_is_refused_before_anything_is_made(tmp_path, monkeypatch, address, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"workdir {address.replace('///', '//')} is not a folder"):
        with open_workdir(pathlib.Path(address), CONFIG):
            pass
    assert run_tnt_flax(["train", "--config=digits", f"--workdir={address}"]) == 2
    assert "is not a folder: train in a folder on a disk" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_damaged_config_json(tmp_path):
    (tmp_path / "config.json").write_text('{"batch_')
    with pytest.raises(InputError, match="config.json is not JSON"):
        with open_workdir(tmp_path, CONFIG):
            pass


def test_too_little_space(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(100, 0, 24_000_000))
    check_space(tmp_path, 9_000_000)
    with pytest.raises(InputError, match="has 24 MB free, checkpoints need 25 MB"):
        check_space(tmp_path, 10_000_000)
