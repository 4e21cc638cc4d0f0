# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of whole runs: written in the background, committed atomically, verified when read.

Orbax commits a step by renaming its folder, so a kill at any moment leaves whole steps only. Every
commit holds a manifest with the SHA-256 of its files, and nothing is restored that does not match.

In a run of many processes, each calls what is here, at the same step.
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from tnt_flax.core.errors import InputError, RunError, listed, one_line
from tnt_flax.core.files import sha256, write_atomic
from tnt_flax.core.trees import check_fit
from tnt_flax.runtime import processes

MANIFEST = "MANIFEST.json"  # SHA-256 of every file; Orbax restores damaged files without noticing
NOT_IN_MANIFEST = {MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"}  # written by Orbax later
MAX_FAILURES = 3  # saves in a row that may fail before the run ends
RETRY = 10  # seconds before a save that must not be left out is tried again


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Orbax would ask on one process, from its thread, with the step: the others would not
        agree any more with it on when to stop. The loop asks."""
        return False


class Checkpoints:
    """The checkpoints of one training run, in `folder`; use it under the lock of the workdir.

    Opening it moves damaged checkpoints to `folder/damaged` and says so. A save that fails is said
    on stderr, counted in `failed_saves`, and left out: the older ones stay, training goes on.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int, info: dict[str, Any]):
        self.folder, self.info = folder, info
        # One process looks, the others wait for it, and all find the same checkpoints.
        found = processes.on_main("damaged checkpoints", lambda: _quarantine(folder, keep), 600)
        self.damaged = bool(processes.total(len(found or ())))
        self.failed_saves = 0
        self._failures = 0  # in a row
        self._saving_step: int | None = None
        self._error: Exception | None = None  # of that save
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(
                    get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        self._manager = _Manager(
            folder,
            options=ocp.CheckpointManagerOptions(
                best_fn=_score,  # without it Orbax would drop the metrics silently
                preservation_policy=policy,
                save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore_latest(self, abstract_state: Any) -> Any | None:
        """The newest whole state, laid out as `abstract_state` says; None in an empty folder.

        Raises:
            InputError: the state in it has other names, shapes or types, or is of other classes.
            RunError: checkpoints exist but none is whole, or the newest cannot be read.
        """
        step = self.latest_step()
        if step is None:
            if self.damaged:
                raise RunError(
                    f"every checkpoint in {self.folder} is damaged (they are in damaged/): "
                    "remove the workdir to start anew, or restore the folder from a backup"
                )
            return None
        path = self.folder / str(step)
        theirs, ours = read_info(path)["class_names"], self.info["class_names"]
        if theirs != ours:
            raise InputError(
                f"{path} is of {len(theirs)} classes ({listed(theirs, 3)}), the data are of "
                f"{len(ours)} ({listed(ours, 3)}): look at data.root, or choose another workdir"
            )
        check_fit(path, _stored(path), abstract_state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        try:
            state = self._manager.restore(step, args=args).state
        except Exception as error:  # Orbax raises a different type for every kind of misfit
            raise RunError(f"cannot restore {path}: {one_line(error)}") from error
        if int(state.step) != step:
            raise RunError(f"{path} holds the state of step {int(state.step)}")
        return state

    def save(self, state: Any, step: int, metrics: dict[str, float] | None = None) -> None:
        """Starts saving; returns when the arrays are copied. `metrics["top1"]` decides the best.

        Raises:
            RunError: the saves before have failed, one after the other; or there is such a step.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(self.info)
        )
        self.wait()  # only one save is in flight, so the manifest knows which
        self._saving_step, started = step, True
        try:
            started = self._manager.save(step, args=args, metrics=metrics)
        except Exception as error:  # Orbax raises whatever its storage does
            self._error = error  # `wait` sees to it, on all processes alike
        if not started:
            self._saving_step = None
            raise RunError(f"Orbax refused to save step {step} in {self.folder}: it exists already")

    def wait(self) -> None:
        """Returns when the save in flight is committed, or has failed.

        Raises:
            RunError: it has, as did those before it, MAX_FAILURES in a row.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._error = error
        if self._saving_step is not None:
            self._settle()

    def ensure(self, state: Any, step: int, metrics: dict[str, float] | None = None) -> None:
        """Returns when `step` is committed; saves it (again) where it is not. Raises RunError."""
        self._failures = 0
        self.wait()
        while not self.committed(step):
            if self._failures:
                time.sleep(RETRY)
            self.save(state, step, metrics)
            self.wait()

    def committed(self, step: int) -> bool:
        """Is it whole in the folder, as process 0 sees it?"""
        return bool(processes.total(processes.is_main() and (self.folder / str(step)).is_dir()))

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics saved with a checkpoint; empty if it was not evaluated."""
        return read_metrics(self.folder / str(step))

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """For a committed checkpoint whose evaluation was interrupted."""
        folder = self.folder / str(step)
        if processes.is_main():
            (folder / "metrics").mkdir(exist_ok=True)
            write_atomic(folder / "metrics" / "metrics", json.dumps(metrics), fsync=True)
            write_manifest(folder)
        processes.total(0)  # the others wait for it
        self._manager.reload()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _settle(self) -> None:
        """Finds out what became of a save. The folder tells: it is renamed when all is written."""
        step, self._saving_step = self._saving_step, None
        error, self._error = self._error, None
        if self.committed(step):
            self._failures = 0
            return
        self.failed_saves += 1
        self._failures += 1
        if processes.is_main():  # what was written of it would keep a full disk full
            shutil.rmtree(self._temporary(step), ignore_errors=True)
        self._manager.reload()  # Orbax believes that it is there
        whole = step_folders(self.folder)
        message = (
            f"saving step {step} failed: "
            f"{one_line(error) if error else 'on another process'}; "
            + (f"the last whole one is {whole[-1]}" if whole else "there is no whole one")
        )
        if self._failures == MAX_FAILURES:
            raise RunError(f"{message}; {MAX_FAILURES} saves in a row have failed") from error
        print(f"error: {message}; training goes on", file=sys.stderr)

    def _temporary(self, step: int) -> pathlib.Path:
        return self.folder / f"{step}.orbax-checkpoint-tmp"

    def _write_manifest(self) -> None:
        """Runs in Orbax's thread on process 0, just before the rename that commits the step."""
        write_manifest(self._temporary(self._saving_step))


def write_manifest(folder: pathlib.Path) -> None:
    """Writes MANIFEST.json, the SHA-256 of every file in the folder of a checkpoint."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    content = {
        str(path.relative_to(folder)): sha256(path)
        for path in files
        if path.name not in NOT_IN_MANIFEST
    }
    write_atomic(folder / MANIFEST, json.dumps(content, indent=1), fsync=True)


def integrity_error(folder: pathlib.Path) -> str | None:
    """Describes the first file that differs from the manifest; None for an intact checkpoint."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is missing or unreadable ({one_line(error)})"
    for name, expected in content.items():
        try:
            if sha256(folder / name) != expected:
                return f"{name} has changed"
        except OSError:
            return f"{name} is missing"
    return None


def step_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The committed checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))


def find_checkpoint(folder: pathlib.Path, which: str) -> pathlib.Path:
    """The "best" (the last, if none was evaluated) or "last" whole checkpoint of a run.

    Only reads, so a run may be training meanwhile. Damaged checkpoints are passed over, and said.
    """
    whole = []
    for step_folder in step_folders(folder):
        why = integrity_error(step_folder)
        if why:
            print(f"warning: {step_folder} is damaged ({why}): passed over", file=sys.stderr)
        else:
            whole.append(step_folder)
    if not whole:
        raise InputError(f"no whole checkpoint in {folder}: train first, or name other weights")
    if which == "best":
        return max(whole, key=lambda p: (_score(read_metrics(p)), int(p.name)))
    return whole[-1]


def read_metrics(step_folder: pathlib.Path) -> dict[str, float]:
    """The metrics saved with a checkpoint; empty if it was not evaluated."""
    path = step_folder / "metrics" / "metrics"
    return json.loads(path.read_text()) if path.exists() else {}


def read_info(step_folder: pathlib.Path) -> dict[str, Any]:
    """What the run said of itself: its config and its class names."""
    try:
        return json.loads((step_folder / "info" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{step_folder} is no checkpoint of a run: {one_line(error)}") from error


def read_weights(step_folder: pathlib.Path, kind: str, abstract_params: Any) -> Any:
    """The parameters of a checkpoint as numpy arrays; `kind` is "ema" or "raw"."""
    why = integrity_error(step_folder)
    if why:
        raise InputError(f"{step_folder} is damaged: {why}")
    name = "ema" if kind == "ema" else "params"
    check_fit(step_folder, _stored(step_folder)[name], abstract_params)
    restore = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray), abstract_params)
    args = ocp.args.PyTreeRestore(
        item={name: abstract_params}, restore_args={name: restore}, partial_restore=True
    )
    with _reader() as reader:
        try:
            return reader.restore(_state(step_folder), args=args)[name]
        except Exception as error:
            raise InputError(f"cannot read {step_folder}: {one_line(error)}") from error


def stored_params(step_folder: pathlib.Path) -> Any:
    """Shapes and types of the parameters in a checkpoint. Raises InputError if it has none."""
    try:
        return _stored(step_folder)["params"]
    except Exception as error:
        raise InputError(f"cannot read {step_folder}: {one_line(error)}") from error


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and types of `tree`, to be laid out as `shardings` say."""

    def of_leaf(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(of_leaf, tree, shardings)


def _stored(step_folder: pathlib.Path) -> Any:
    """Shapes and types of the state in a checkpoint.

    Orbax would find a misfit too, but only while reading, and leave its threads in disorder.
    """
    with _reader() as reader:
        return reader.metadata(_state(step_folder)).item_metadata.tree


def _state(step_folder: pathlib.Path) -> pathlib.Path:
    return step_folder.absolute() / "state"  # at a relative path Orbax finds nothing


@contextlib.contextmanager
def _reader() -> Iterator[ocp.Checkpointer]:
    """Orbax's reader, without the warnings that are for its developers."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            yield reader
    finally:
        logging.set_verbosity(verbosity)


def _score(metrics: dict[str, float]) -> float:
    return metrics.get("top1", float("-inf"))


def _quarantine(folder: pathlib.Path, keep: int) -> list[pathlib.Path]:
    """Moves damaged checkpoints out of Orbax's sight: one bad file would stop its manager.

    One that lacks files, behind `keep` whole ones, a kill kept from being deleted: that is done.
    """
    moved, whole = [], 0
    for step_folder in reversed(step_folders(folder)):
        why = integrity_error(step_folder)
        if not why:
            whole += 1
        elif whole >= keep and "is missing" in why:
            shutil.rmtree(step_folder, ignore_errors=True)
        else:
            target = folder / "damaged" / f"{step_folder.name}.{int(time.time())}"
            target.parent.mkdir(exist_ok=True)
            os.replace(step_folder, target)
            print(f"warning: {step_folder} is damaged ({why}): moved to {target}", file=sys.stderr)
            moved.append(target)
    return moved
