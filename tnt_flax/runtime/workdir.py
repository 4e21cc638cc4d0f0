# SPDX-License-Identifier: Apache-2.0
"""The workdir of a run: lock, config.json, environment.json, free space."""

import contextlib
import datetime
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import re
import shutil
from collections.abc import Iterator
from typing import IO, Any

import jax
from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError, RunError, one_line
from tnt_flax.core.files import write_atomic
from tnt_flax.core.trees import diff_nested
from tnt_flax.runtime import processes

# A resumed run may change these keys. They do not affect the results, except: `mesh` changes
# rounding, and `data.corrupt` changes what follows the first unreadable image.
FREE_KEYS = ("log.", "eval.", "checkpoint.", "stall_minutes:", "data.root:", "data.threads:")
FREE_KEYS += ("data.workers:", "data.retry_seconds:", "data.corrupt:")
FREE_KEYS += ("mesh.data:", "mesh.fsdp:", "mesh.tensor:")
# Once one of these has content, the workdir accepts no other config.
RESULTS = ("checkpoints", "metrics.jsonl", "weights.safetensors")
ENVIRONMENT = "environment.json"
PACKAGES = "tnt_flax jax jaxlib flax optax orbax-checkpoint grain numpy pillow".split()

logger = logging.getLogger("tnt_flax")


def check_is_folder(workdir: pathlib.Path) -> None:
    """Raises InputError if `workdir` is an address, such as gs://BUCKET/RUN.

    An object store has no lock that a killed trainer releases, no atomic rename and no appending.
    """
    if match := re.match(r"([a-zA-Z][\w.+-]+):/+", str(workdir)):  # pathlib removes a slash
        address = f"{match[1]}://{str(workdir)[match.end() :]}"
        raise InputError(
            f"workdir {address} is not a folder: train in a folder on a disk or a shared file "
            "system, and copy the finished run there"
        )


@contextlib.contextmanager
def open_workdir(workdir: pathlib.Path, config: dict[str, Any]) -> Iterator[None]:
    """Creates `workdir` if necessary, locks it for one trainer and writes config.json.

    The config of an earlier run without any results, for instance one with a wrong `init_from`, is
    replaced; the changes are logged.

    Raises:
        InputError: `workdir` is not writable, used by another trainer or has results of another
            config.
    """
    check_is_folder(workdir)
    with contextlib.ExitStack() as stack:
        with explain_write_errors(workdir, InputError):
            workdir.mkdir(parents=True, exist_ok=True)
            # Without a buffer, whose content would be written again when the file is closed.
            lock = stack.enter_context(open(workdir / ".lock", "ab+", buffering=0))
            _lock(lock, workdir)
            lock.truncate(0)
            lock.write(str(os.getpid()).encode())
            _update_config(workdir, config)
        yield


@contextlib.contextmanager
def explain_write_errors(workdir: pathlib.Path, kind: type[Exception] = RunError) -> Iterator[None]:
    """Turns an error of a file in `workdir`, such as a full disk, into one line of type `kind`."""
    try:
        yield
    except OSError as error:
        raise kind(
            f"cannot write to workdir {workdir}: {error.strerror or error}: free some space, "
            "correct its permissions or choose another workdir"
        ) from error


def _lock(file: IO, workdir: pathlib.Path) -> None:
    """Locks the open file of a workdir until it is closed. Raises InputError if it is locked."""
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        process = file.read().decode() or "unknown"
        raise InputError(
            f"another trainer (process {process}) is using workdir {workdir}: wait for it or "
            "choose another workdir"
        ) from error
    except (ImportError, OSError) as error:  # Lustre, EFS, FUSE and the like may have no locks
        logger.warning(
            f"warning: cannot lock workdir {workdir} ({one_line(error)}): a second trainer in it "
            "would not be detected; make sure that there is none"
        )


def has_results(workdir: pathlib.Path) -> bool:
    """True if a run in `workdir` has saved or logged anything."""
    paths = [workdir / name for name in RESULTS]
    return any(any(p.iterdir()) if p.is_dir() else p.exists() and p.stat().st_size for p in paths)


def check_space(workdir: pathlib.Path, state_bytes: int) -> None:
    """Raises InputError unless 2.5 checkpoints fit: two complete ones and one being written."""
    free, needed = shutil.disk_usage(workdir).free, int(2.5 * state_bytes)
    if free < needed:
        raise InputError(
            f"workdir {workdir} has {free / 1e6:.0f} MB free, checkpoints need {needed / 1e6:.0f} "
            "MB: free some space or choose another workdir"
        )


# --------------------------------------------------------------------------------- config.json


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns the config of the run in `workdir`; None if there is no run."""
    path = workdir / "config.json"
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: restore it or remove the workdir") from error


def config_to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the JSON values of a config: tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


def config_from_json(stored: dict[str, Any]) -> ConfigDict:
    """Inverts `config_to_json`: lists become tuples."""
    tuples = {key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()}
    return ConfigDict(
        {k: config_from_json(v) if isinstance(v, dict) else v for k, v in tuples.items()}
    )


def _update_config(workdir: pathlib.Path, config: dict[str, Any]) -> None:
    """Writes config.json; raises InputError if the workdir has results of another config."""
    old = read_config(workdir)
    changed = [x for x in diff_nested(old, config) if not x.startswith(FREE_KEYS)] if old else []
    differences = "; ".join(changed)
    if changed and has_results(workdir):
        raise InputError(
            f"workdir {workdir} belongs to another config ({differences}): choose another workdir "
            "or restore the old values; to train its weights further, choose another workdir and "
            f"set --config.init_from={workdir}"
        )
    if changed:
        logger.info(f"workdir {workdir} has no results yet; config changed: {differences}")
    write_atomic(workdir / "config.json", json.dumps(config, indent=1))


# ---------------------------------------------------------------------------- environment.json


def current_environment() -> dict[str, Any]:
    """Returns library versions and devices as seen by process 0. All processes must call it."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a mere checkout
            versions[name] = importlib.metadata.version(name)
    return versions | {
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "hosts": len(set(processes.hosts())),
        "machine": platform.platform(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def record_environment(workdir: pathlib.Path, step: int, environment: dict[str, Any]) -> None:
    """Appends to environment.json that the run continues from `step` in `environment`.

    An unchanged environment adds no entry. Entries from `step` on are dropped: their steps are
    computed again.
    """
    starts = [start for start in read_environments(workdir) if start["step"] < step]
    if not starts or starts[-1]["environment"] != environment:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        starts.append({"step": step, "time": now, "environment": environment})
    write_atomic(workdir / ENVIRONMENT, json.dumps(starts, indent=1), fsync=True)


def read_environments(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the entries of environment.json by step; empty if it is missing or damaged."""
    try:
        return json.loads((workdir / ENVIRONMENT).read_text())
    except (OSError, ValueError):
        return []
