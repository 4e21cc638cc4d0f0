# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of whole runs: saved asynchronously, committed atomically, verified when read.

Orbax commits a checkpoint by renaming its folder, so a kill leaves only complete checkpoints. Orbax
does not detect damage: a flipped bit in an array file restores as garbage. Therefore every commit
contains MANIFEST.json with the SHA-256 of its files, and nothing is restored that does not match.

In a run of several processes, all must call these functions at the same step.
"""

import contextlib
import functools
import json
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from tnt_flax.core.errors import InputError, RunError, listed, one_line
from tnt_flax.core.files import sha256, write_atomic
from tnt_flax.core.trees import check_tensors_match
from tnt_flax.runtime import processes

MANIFEST = "MANIFEST.json"
NOT_IN_MANIFEST = {MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"}  # Orbax writes them late
VERIFY_TIMEOUT = 600  # seconds that process 0 may take to read and hash all checkpoints
MAX_FAILURES = 3  # consecutive failed saves that end the run
LOWER_IS_BETTER = ("loss", "ece")  # of the metrics of an evaluation
RETRY_DELAY = 10  # seconds between attempts of `save_blocking`

logger = logging.getLogger("tnt_flax")


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Disables Orbax's own check, in a thread of one process: the loop checks for signals.

        JAX counts the checks to find the common step at which all processes stop.
        """
        return False


class Checkpoints:
    """The checkpoints of one training run. Requires the lock of the workdir.

    The constructor moves damaged checkpoints to `folder/damaged` and logs a warning. A failed save
    is logged, counted in `failed_saves` and skipped: training continues with the older ones.

    Args:
        folder: of the checkpoints, one folder per step.
        keep: number of newest checkpoints to keep, besides the best one.
        info: JSON values stored in every checkpoint: "config" and "class_names".
    """

    def __init__(self, folder: pathlib.Path, *, keep: int, info: dict[str, Any]):
        self.folder, self.info = folder, info
        # The other processes wait for process 0, so that all see the same checkpoints.
        self.found_damage = processes.run_on_main(
            "damaged checkpoints", lambda: _quarantine(folder, keep), VERIFY_TIMEOUT
        )
        self.failed_saves = 0
        self._consecutive_failures = 0
        self._saving_step: int | None = None
        self._save_error: Exception | None = None
        # Orbax calls it in a thread of process 0, just before the rename that commits the step.
        add_manifest = lambda: write_manifest(self._temporary_folder(self._saving_step))
        newest = checkpoint_managers.LatestN(keep)
        rank = functools.partial(score, metric=best_metric(info))
        best = checkpoint_managers.BestN(
            get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False
        )
        self._manager = _Manager(
            folder,
            options=ocp.CheckpointManagerOptions(
                best_fn=rank,  # without it Orbax drops the metrics silently
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
                save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=add_manifest),
            ),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore_latest(self, abstract_state: Any) -> Any | None:
        """Restores the newest intact checkpoint; returns None if there are no checkpoints.

        Args:
            abstract_state: the state as `jax.ShapeDtypeStruct`s with shardings.

        Raises:
            InputError: the stored state has other names, shapes, dtypes or classes.
            RunError: all checkpoints are damaged, or the newest cannot be read.
        """
        step = self.latest_step()
        if step is None:
            if self.found_damage:
                raise RunError(
                    f"every checkpoint in {self.folder} is damaged (moved to damaged/): "
                    "remove the workdir to start over, or restore the folder from a backup"
                )
            return None
        path = self.folder / str(step)
        stored, expected = read_info(path)["class_names"], self.info["class_names"]
        if stored != expected:
            raise InputError(
                f"{path} has {len(stored)} classes ({listed(stored, 3)}), the data {len(expected)} "
                f"({listed(expected, 3)}): check data.root or choose another workdir"
            )
        check_tensors_match(path, _state_shapes(path), abstract_state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        try:
            state = self._manager.restore(step, args=args).state
        except Exception as error:  # Orbax raises many types
            raise RunError(f"cannot restore {path}: {one_line(error)}") from error
        if int(state.step) != step:
            raise RunError(f"{path} contains the state of step {int(state.step)}")
        return state

    def save_async(self, state: Any, step: int, metrics: dict[str, float] | None = None) -> None:
        """Starts a save; returns once the arrays are copied. `metrics` rank the checkpoints.

        Raises:
            RunError: MAX_FAILURES consecutive saves have failed, or `step` exists already.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(self.info)
        )
        self.wait_for_save()  # one save at a time: the manifest needs `_saving_step`
        self._saving_step, started = step, True
        try:
            started = self._manager.save(step, args=args, metrics=metrics or None)
        except Exception as error:  # Orbax passes on what its storage raises
            self._save_error = error  # handled in `wait_for_save`, on all processes
        if not started:
            self._saving_step = None
            raise RunError(f"Orbax refused to save step {step} in {self.folder}: it exists already")

    def wait_for_save(self) -> None:
        """Returns when the current save is committed or has failed. Raises as `save_async`."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._save_error = error
        if self._saving_step is not None:
            self._finish_save()

    def save_blocking(self, state: Any, step: int, metrics: dict[str, float] | None = None) -> None:
        """Saves `step` unless it is committed, with retries. Raises as `save_async`."""
        self._consecutive_failures = 0
        self.wait_for_save()
        while not self.is_committed(step):
            if self._consecutive_failures:
                time.sleep(RETRY_DELAY)
            self.save_async(state, step, metrics)
            self.wait_for_save()

    def is_committed(self, step: int) -> bool:
        """True if process 0 sees the folder of `step`."""
        is_dir = (self.folder / str(step)).is_dir
        return processes.run_on_main("checkpoint", is_dir, VERIFY_TIMEOUT)

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the metrics saved with a checkpoint; empty if it was not evaluated."""
        read = lambda: read_metrics(self.folder / str(step))
        return processes.run_on_main("metrics", read, VERIFY_TIMEOUT)

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Adds metrics to a committed checkpoint whose evaluation was interrupted."""
        folder = self.folder / str(step)

        def add():
            (folder / "metrics").mkdir(exist_ok=True)
            write_atomic(folder / "metrics" / "metrics", json.dumps(metrics), fsync=True)
            write_manifest(folder)

        processes.run_on_main("metrics", add, VERIFY_TIMEOUT)
        self._manager.reload()

    def close(self) -> None:
        """Finishes the current save."""
        self.wait_for_save()
        self._manager.close()

    def _finish_save(self) -> None:
        """Counts, cleans up and logs a failed save. The rename of the folder marks success."""
        step, self._saving_step = self._saving_step, None
        error, self._save_error = self._save_error, None
        if self.is_committed(step):
            self._consecutive_failures = 0
            return
        self.failed_saves += 1
        self._consecutive_failures += 1
        if processes.is_main_process():  # partial files would keep a full disk full
            shutil.rmtree(self._temporary_folder(step), ignore_errors=True)
        self._manager.reload()  # Orbax counts the step as saved
        intact = step_folders(self.folder)
        message = (
            f"saving step {step} failed: {one_line(error) if error else 'on another process'}; "
            + (f"the last complete checkpoint is {intact[-1]}" if intact else "no checkpoint yet")
        )
        if self._consecutive_failures == MAX_FAILURES:
            raise RunError(f"{message}; {MAX_FAILURES} consecutive saves failed") from error
        logger.error(f"error: {message}; training continues")

    def _temporary_folder(self, step: int) -> pathlib.Path:
        return self.folder / f"{step}.orbax-checkpoint-tmp"


# ------------------------------------------------------------------------------------ reading


def step_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders of the committed checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))


def find_checkpoint(folder: pathlib.Path, which: str) -> pathlib.Path:
    """Returns the folder of an intact checkpoint; logs a warning for each damaged one.

    `which` is "last", or "best" by `checkpoint.best` of the run's config (the last one if none was
    evaluated). Only reads: a run may be training in `folder`. Raises InputError if there is no
    intact checkpoint.
    """
    intact = []
    for step_folder in step_folders(folder):
        if error := integrity_error(step_folder):
            logger.warning(f"warning: {step_folder} is damaged ({error}): skipped")
        else:
            intact.append(step_folder)
    if not intact:
        raise InputError(f"no intact checkpoint in {folder}: train first or name other weights")
    if which == "best":
        metric = best_metric(read_info(intact[-1]))
        return max(intact, key=lambda p: (score(read_metrics(p), metric), int(p.name)))
    return intact[-1]


def read_metrics(step_folder: pathlib.Path) -> dict[str, float]:
    """Returns the metrics saved with a checkpoint; empty if it was not evaluated."""
    path = step_folder / "metrics" / "metrics"
    return json.loads(path.read_text()) if path.exists() else {}


def read_info(step_folder: pathlib.Path) -> dict[str, Any]:
    """Returns the "config" and "class_names" of the run that saved a checkpoint."""
    try:
        return json.loads((step_folder / "info" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{step_folder} is not a checkpoint of a training run: {one_line(error)}"
        ) from error


def read_param_shapes(step_folder: pathlib.Path) -> Any:
    """Returns shapes and dtypes of a checkpoint's parameters. Raises InputError if unreadable."""
    try:
        return _state_shapes(step_folder)["params"]
    except Exception as error:
        raise InputError(f"cannot read {step_folder}: {one_line(error)}") from error


def read_weights(step_folder: pathlib.Path, kind: str, abstract: dict[str, Any]) -> dict[str, Any]:
    """Returns the variables of a checkpoint as numpy arrays.

    `kind` is "ema" or "raw"; `abstract` has the expected names, shapes and dtypes of "params" and,
    if there are any, "batch_stats". Raises InputError if the checkpoint is damaged, unreadable or
    of another model.
    """
    if error := integrity_error(step_folder):
        raise InputError(f"{step_folder} is damaged: {error}")
    stored = _state_shapes(step_folder)
    stored = stored["ema"] if kind == "ema" else stored
    for collection in ("params", "batch_stats"):
        expected = abstract.get(collection, {})
        check_tensors_match(step_folder, stored.get(collection) or {}, expected)
    item = {"ema": abstract} if kind == "ema" else abstract
    restore = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray), item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore, partial_restore=True)
    with _open_reader() as reader:
        try:
            found = reader.restore(_state_folder(step_folder), args=args)
        except Exception as error:
            raise InputError(f"cannot read {step_folder}: {one_line(error)}") from error
    return found["ema"] if kind == "ema" else found


def _state_shapes(step_folder: pathlib.Path) -> Any:
    """Shapes and dtypes of the stored state.

    `restore` would find a mismatch only while reading, and leave failed threads behind.
    """
    with _open_reader() as reader:
        return reader.metadata(_state_folder(step_folder)).item_metadata.tree


def _state_folder(step_folder: pathlib.Path) -> pathlib.Path:
    return step_folder.absolute() / "state"  # Orbax finds nothing at a relative path


@contextlib.contextmanager
def _open_reader() -> Iterator[ocp.Checkpointer]:
    """Opens Orbax's reader, without warnings that concern its developers only."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            yield reader
    finally:
        absl.logging.set_verbosity(verbosity)


def best_metric(info: dict[str, Any]) -> str:
    """Returns the metric that ranks the checkpoints of a run, see `score`."""
    return info["config"].get("checkpoint", {}).get("best", "top1")


def score(metrics: dict[str, float], metric: str) -> float:
    """Returns a metric such that higher is better; -infinity if it was not evaluated."""
    if metric not in metrics:
        return float("-inf")
    return -metrics[metric] if metric in LOWER_IS_BETTER else metrics[metric]


# ------------------------------------------------------------------------------------ integrity


def write_manifest(step_folder: pathlib.Path) -> None:
    """Writes MANIFEST.json, the SHA-256 of every file of a checkpoint."""
    paths = [p for p in sorted(step_folder.rglob("*")) if p.name not in NOT_IN_MANIFEST]
    digests = {str(p.relative_to(step_folder)): sha256(p) for p in paths if p.is_file()}
    write_atomic(step_folder / MANIFEST, json.dumps(digests, indent=1), fsync=True)


def integrity_error(step_folder: pathlib.Path) -> str | None:
    """Names the first file that differs from the manifest; None if the checkpoint is intact."""
    try:
        digests = json.loads((step_folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is missing or unreadable ({one_line(error)})"
    for name, expected in digests.items():
        try:
            if sha256(step_folder / name) != expected:
                return f"{name} has changed"
        except OSError:
            return f"{name} is missing"
    return None


def _quarantine(folder: pathlib.Path, keep: int) -> bool:
    """Moves damaged checkpoints to `folder/damaged`: Orbax's manager fails on a damaged file.

    An incomplete checkpoint older than the `keep` newest intact ones is deleted instead: a kill had
    interrupted its deletion. Returns whether any were moved.
    """
    moved, intact = False, 0
    for step_folder in reversed(step_folders(folder)):
        error = integrity_error(step_folder)
        if not error:
            intact += 1
        elif intact >= keep and "is missing" in error:
            shutil.rmtree(step_folder, ignore_errors=True)
        else:
            target = folder / "damaged" / f"{step_folder.name}.{int(time.time())}"
            target.parent.mkdir(exist_ok=True)
            os.replace(step_folder, target)
            logger.warning(f"warning: {step_folder} is damaged ({error}): moved to {target}")
            moved = True
    return moved
