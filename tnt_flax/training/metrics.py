# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run: averages of steps, metrics.jsonl, TensorBoard events."""

import contextlib
import datetime
import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from tnt_flax.core.files import write_atomic
from tnt_flax.runtime import processes
from tnt_flax.training.trackers import Sender

logger = logging.getLogger(__name__)


class MetricWriter:
    """Appends scalars to `metrics.jsonl`, TensorBoard event files (without TensorFlow), trackers.

    Does nothing in processes other than 0. A resumed run first drops the lines that a killed run
    wrote after `start_step`. If the disk is full, lines are lost and training continues.

    Args:
        workdir: of the run.
        start_step: of the checkpoint from which the run starts.
        open_trackers: opens the trackers of the run, see `trackers.open_trackers`.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        start_step: int,
        open_trackers: Callable[[], list[Sender]] = list,
    ):
        self.path = workdir / "metrics.jsonl"
        if not processes.is_main_process():
            return
        self._trackers = open_trackers()
        from tensorboard.summary import Writer  # slow to import; evaluation does not need it

        kept = [m for m in read_metrics_file(self.path) if m["step"] <= start_step]
        write_atomic(self.path, "".join(json.dumps(m) + "\n" for m in kept))
        self._file = open(self.path, "a")
        self._open_events = lambda: Writer(str(workdir / "tensorboard"))
        self._events = self._open_events()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes values by name, such as "train/loss"; text to metrics.jsonl only."""
        if not processes.is_main_process():
            return
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            logger.error(f"error: cannot write {self.path}: {error.strerror}")
        numbers = {name: x for name, x in values.items() if isinstance(x, int | float)}
        if numbers:
            for tracker in self._trackers:
                tracker.log(numbers, step)
        try:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        except OSError as error:  # TensorBoard's writer would raise it again at every call
            logger.error(f"error: cannot write TensorBoard's events: {error.strerror}")
            self._events = self._open_events()

    def close(self) -> None:
        if processes.is_main_process():
            for file in (self._file, self._events, *self._trackers):
                with contextlib.suppress(OSError):
                    file.close()


def read_metrics_file(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, without a last line that a kill truncated."""
    metrics = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in path.read_text().splitlines():
            metrics.append(json.loads(line))
    return metrics


class StepMeter:
    """Averages the metrics of the steps since the last call of `averages`; measures their speed.

    Args:
        batch_size, steps_per_epoch, total_steps: of the run.
        check: called with the step and the fetched metrics of every step; may raise.
    """

    def __init__(
        self,
        batch_size: int,
        steps_per_epoch: int,
        total_steps: int,
        check: Callable[[int, dict[str, Any]], None] = lambda step, metrics: None,
    ):
        self.batch_size = batch_size
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self._check = check
        self._pending = None  # (step, metrics) of the step that the device may still be computing
        self._restart()

    def _restart(self) -> None:
        self.losses, self.grad_norms = [], []
        self.replaced_images = 0
        self.waited, self.began = 0.0, time.perf_counter()

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds the metrics, on devices, of a step that has just been dispatched.

        Fetched one step late, so that the devices never wait for the host.
        """
        self.fetch_pending_metrics()
        self._pending = step, metrics

    def fetch_pending_metrics(self) -> None:
        """Waits until the devices have finished the last step added, and takes in its metrics."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        metrics = jax.device_get(metrics)
        self._check(step, metrics)
        self.losses.append(float(metrics["loss"]))
        self.grad_norms.append(float(metrics["grad_norm"]))
        self.learning_rate = float(metrics["learning_rate"])

    def averages(self, step: int) -> dict[str, float]:
        """Returns the averages since the last call, after `step` updates. Sums over processes."""
        self.fetch_pending_metrics()
        elapsed = max(time.perf_counter() - self.began, 1e-9)
        steps = len(self.losses)
        values = {
            "train/loss": sum(self.losses) / steps,
            "train/grad_norm": sum(self.grad_norms) / steps,
            "train/learning_rate": self.learning_rate,
            "train/epoch": step / self.steps_per_epoch,
            "train/images_per_second": steps * self.batch_size / elapsed,
            "train/data_wait": self.waited / elapsed,
            "train/replaced_images": processes.sum_over_processes(self.replaced_images),
            "train/seconds_left": (self.total_steps - step) * elapsed / steps,
        }
        self._restart()
        return values

    @contextlib.contextmanager
    def wait_for_data(self) -> Iterator[None]:
        """Counts the time inside as time that the loop waits for data."""
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time inside, of an evaluation or a checkpoint, from the training time."""
        started = time.perf_counter()
        yield
        self.began += time.perf_counter() - started


def format_averages(step: int, total_steps: int, averages: dict[str, float]) -> str:
    """Returns the result of `StepMeter.averages` as one line for the log."""
    return (
        f"step {step}/{total_steps}  epoch {averages['train/epoch']:.2f}  "
        f"loss {averages['train/loss']:.4f}  lr {averages['train/learning_rate']:.3g}  "
        f"{averages['train/images_per_second']:.0f} images/s  "
        f"data wait {averages['train/data_wait']:.1%}  "
        f"ETA {datetime.timedelta(seconds=round(averages['train/seconds_left']))}"
    )
