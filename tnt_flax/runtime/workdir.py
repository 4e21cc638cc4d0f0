# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: writable, with room, of one configuration, and of one trainer at a time."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError
from tnt_flax.core.files import write_atomic

# A resumed run may change these: they do not touch what is computed, but for its rounding, nor,
# as to data.corrupt, what was computed up to the first image that cannot be read.
FREE_GROUPS = ("log", "eval", "checkpoint")
FREE_KEYS = ("data.root", "data.threads", "data.workers", "data.retry_seconds", "stall_minutes")
FREE_KEYS += ("mesh.data", "mesh.fsdp", "mesh.tensor", "data.corrupt")
# What a run leaves that another config would spoil; until then its workdir can take any.
RESULTS = ("checkpoints", "metrics.jsonl", "weights.safetensors")


@contextlib.contextmanager
def open_workdir(workdir: pathlib.Path, config: dict[str, Any]) -> Iterator[None]:
    """Makes `workdir` if need be and holds it for one trainer, which runs `config`.

    A run that ended before it had logged or saved anything, such as one with a mistyped
    `init_from`, leaves its config, too: that is replaced, and said.

    Raises:
        InputError: it cannot be written, another trainer uses it, or it belongs to another config.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "a+")
    except OSError as error:
        raise InputError(f"cannot write to workdir {workdir}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise InputError(
                f"another trainer (process {lock.read() or 'unknown'}) is using workdir {workdir}: "
                "wait for it or choose another workdir"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        _agree(workdir, config)
        yield


def has_results(workdir: pathlib.Path) -> bool:
    """Has a run in `workdir` saved or logged anything?"""
    paths = [workdir / name for name in RESULTS]
    return any(any(p.iterdir()) if p.is_dir() else p.exists() and p.stat().st_size for p in paths)


def check_space(workdir: pathlib.Path, state_bytes: int) -> None:
    """Raises InputError unless two and a half checkpoints fit: two whole, one being written."""
    free, needed = shutil.disk_usage(workdir).free, int(2.5 * state_bytes)
    if free < needed:
        raise InputError(
            f"workdir {workdir} has {free / 1e6:.0f} MB free, checkpoints need {needed / 1e6:.0f} "
            "MB: free some space or choose another workdir"
        )


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The config of the run in `workdir`; None if there is none."""
    path = workdir / "config.json"
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise InputError(
            f"{path} is not JSON ({error}): restore it or remove the workdir"
        ) from error


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """["batch_size: 1024 -> 512", ...]: every key whose value differs, dotted."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return found


def as_json(config: Any) -> dict[str, Any]:
    """A ConfigDict as it looks after a round trip through a file: tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


def as_config(stored: dict[str, Any]) -> ConfigDict:
    """The ConfigDict that `as_json` made `stored` of: lists become tuples."""
    tuples = {key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()}
    return ConfigDict({k: as_config(v) if isinstance(v, dict) else v for k, v in tuples.items()})


def _agree(workdir: pathlib.Path, config: dict[str, Any]) -> None:
    """Refuses a workdir with results of another config; writes config.json into any other."""
    old = read_config(workdir)
    changed = differences(old, config) if old else []
    fixed = [c for c in changed if c.split(".")[0] not in FREE_GROUPS]
    fixed = [c for c in fixed if c.split(":")[0] not in FREE_KEYS]
    if fixed and has_results(workdir):
        raise InputError(
            f"workdir {workdir} belongs to another config ({'; '.join(fixed)}): "
            "choose another workdir, or the old values"
        )
    if fixed:
        print(
            f"workdir {workdir}: nothing came of an earlier start; changed since then: "
            f"{'; '.join(fixed)}",
            file=sys.stderr,
        )
    write_atomic(workdir / "config.json", json.dumps(config, indent=1))
