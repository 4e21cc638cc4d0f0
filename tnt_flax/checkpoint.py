# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of whole runs: written in the background, committed atomically, verified when read.

Orbax commits a step by renaming its folder, so a kill at any moment leaves whole steps only. But it
does not notice a damaged array file: a flipped bit comes back as garbage. Therefore every commit
holds MANIFEST.json with the SHA-256 of its files, and nothing is restored that does not match it.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from tnt_flax import distributed
from tnt_flax.errors import InputError, RunError, one_line
from tnt_flax.state import TrainState, check_fit

MANIFEST = "MANIFEST.json"
NOT_IN_MANIFEST = {
    MANIFEST,
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
}  # Orbax touches them late


class Checkpoints:
    """The checkpoints of one training run, in `folder`; use it under the lock of the workdir.

    Opening it moves damaged checkpoints to `folder/damaged` and says so.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int, info: dict[str, Any]):
        self.folder, self.info = folder, info
        found = distributed.on_main("damaged checkpoints", lambda: _quarantine(folder), 600)
        self.damaged = bool(distributed.total(len(found or ())))
        self._saving_step = None
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(
                    get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
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

    def restore_latest(self, abstract_state: TrainState) -> TrainState | None:
        """The newest whole state, laid out as `abstract_state` says; None in an empty folder.

        Raises:
            InputError: the state in it has other names, shapes or types.
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
        check_fit(path, _stored(path), abstract_state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        try:
            state = self._manager.restore(step, args=args).state
        except Exception as error:  # Orbax raises a different type for every kind of misfit
            raise RunError(f"cannot restore {path}: {one_line(error)}") from error
        if int(state.step) != step:
            raise RunError(f"{path} holds the state of step {int(state.step)}")
        return state

    def save(self, state: TrainState, step: int, metrics: dict[str, float] | None = None) -> None:
        """Starts saving; returns when the arrays are copied. `metrics["top1"]` decides the best.

        Raises:
            RunError: this save or the one before it failed, for instance on a full disk.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(self.info)
        )
        self.wait()  # only one save is in flight, so the manifest knows which
        self._saving_step = step
        try:
            started = self._manager.save(step, args=args, metrics=metrics)
        except Exception as error:
            raise self._failed(error) from error
        if not started:
            raise RunError(f"Orbax refused to save step {step} in {self.folder}: it exists already")

    def wait(self) -> None:
        """Returns when everything saved so far is committed. Raises RunError where that failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _failed(self, error: Exception) -> RunError:
        whole = step_folders(self.folder)
        last = f"the last whole one is {whole[-1]}" if whole else "there is no whole one"
        return RunError(f"saving step {self._saving_step} failed: {one_line(error)}; {last}")

    def _write_manifest(self) -> None:
        """Runs in Orbax's thread on process 0, just before the rename that commits the step."""
        folder = self.folder / f"{self._saving_step}.orbax-checkpoint-tmp"
        content = {name: digest(folder / name) for name in sorted(_files(folder))}
        with open(folder / MANIFEST, "w") as f:
            json.dump(content, f, indent=1)
            f.flush()
            os.fsync(f.fileno())


def step_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The committed checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))


def fault(step_folder: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is as it was when it was committed."""
    manifest = step_folder / MANIFEST
    try:
        content = json.loads(manifest.read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is missing or unreadable ({one_line(error)})"
    for name, expected in content.items():
        try:
            if digest(step_folder / name) != expected:
                return f"{name} has changed"
        except OSError:
            return f"{name} is missing"
    return None


def find_checkpoint(folder: pathlib.Path, which: str) -> pathlib.Path:
    """The "best" (the last, if none was evaluated) or "last" whole checkpoint of a run.

    Only reads, so a run may be training meanwhile. Damaged checkpoints are passed over, and said.
    """
    whole = []
    for step_folder in step_folders(folder):
        why = fault(step_folder)
        if why:
            print(f"warning: {step_folder} is damaged ({why}): passed over", file=sys.stderr)
        else:
            whole.append(step_folder)
    if not whole:
        raise InputError(f"no whole checkpoint in {folder}: train first, or give --checkpoint=PATH")
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
    why = fault(step_folder)
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
            return reader.restore(step_folder / "state", args=args)[name]
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


def digest(path: pathlib.Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _stored(step_folder: pathlib.Path) -> Any:
    """Shapes and types of the state in a checkpoint.

    Orbax would find a misfit too, but only while reading, and leave its threads in disorder.
    """
    with _reader() as reader:
        return reader.metadata(step_folder / "state").item_metadata.tree


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


def _files(folder: pathlib.Path):
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in NOT_IN_MANIFEST:
            yield str(path.relative_to(folder))


def _quarantine(folder: pathlib.Path) -> list[pathlib.Path]:
    """Moves damaged checkpoints out of Orbax's sight: one bad file would stop its manager."""
    moved = []
    for step_folder in step_folders(folder):
        why = fault(step_folder)
        if why:
            target = folder / "damaged" / f"{step_folder.name}.{int(time.time())}"
            target.parent.mkdir(exist_ok=True)
            os.replace(step_folder, target)
            print(f"warning: {step_folder} is damaged ({why}): moved to {target}", file=sys.stderr)
            moved.append(target)
    return moved
