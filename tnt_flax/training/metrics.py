# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run: metrics.jsonl, TensorBoard events, progress on stderr, averages of steps."""

import contextlib
import datetime
import json
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from tqdm import tqdm

from tnt_flax.core.files import write_atomic

logger = logging.getLogger(__name__)


class MetricWriter:
    """Appends scalars to `metrics.jsonl` and to TensorBoard event files, without TensorFlow.

    A resumed run first drops the lines that a killed run wrote after `start_step`. If the disk is
    full, lines are lost and training continues.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int):
        from tensorboard.summary import Writer  # slow to import; evaluation does not need it

        self.path = workdir / "metrics.jsonl"
        kept = [m for m in read_metrics_file(self.path) if m["step"] <= start_step]
        write_atomic(self.path, "".join(json.dumps(m) + "\n" for m in kept))
        self._file = open(self.path, "a")
        self._open_events = lambda: Writer(str(workdir / "tensorboard"))
        self._events = self._open_events()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes values by name, such as "train/loss"; TensorBoard gets the numbers only."""
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            logger.error("error: cannot write %s: %s", self.path, error.strerror)
        try:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(name, value, step)
            self._events.flush()
        except OSError as error:  # TensorBoard's writer would raise it again at every call
            logger.error("error: cannot write TensorBoard's events: %s", error.strerror)
            self._events = self._open_events()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._events.close()


def read_metrics_file(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, without a last line that a kill truncated."""
    if not path.exists():
        return []
    metrics = []
    for line in path.read_text().splitlines():
        try:
            metrics.append(json.loads(line))
        except ValueError:
            break
    return metrics


class StepMeter:
    """Averages the metrics of the steps since the last report, and measures their speed.

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
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        self.total_steps, self._check = total_steps, check
        self._pending = None  # (step, metrics) of the step that the device may still be computing
        self._restart()

    def _restart(self) -> None:
        self.losses, self.grad_norms, self.replaced = [], [], 0
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

    def report(self, step: int) -> dict[str, float]:
        """Returns the averages since the last report, after `step` updates."""
        elapsed = max(time.perf_counter() - self.began, 1e-9)
        steps = len(self.losses)
        values = {
            "train/loss": sum(self.losses) / steps,
            "train/grad_norm": sum(self.grad_norms) / steps,
            "train/learning_rate": self.learning_rate,
            "train/epoch": step / self.steps_per_epoch,
            "train/images_per_second": steps * self.batch_size / elapsed,
            "train/data_wait": self.waited / elapsed,
            "train/replaced_images": self.replaced,
            "train/seconds_left": (self.total_steps - step) * elapsed / steps,
        }
        self._restart()
        return values

    @contextlib.contextmanager
    def wait_for_data(self) -> Iterator[None]:
        """Counts the time inside as time that the loop waits for data."""
        asked = time.perf_counter()
        yield
        self.waited += time.perf_counter() - asked

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time inside, of an evaluation or a checkpoint, from the training time."""
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused


class Progress:
    """Shows progress on stderr: a bar on a terminal, plain lines otherwise."""

    def __init__(self, start_step: int, total_steps: int):
        self.total_steps = total_steps
        # `disable=None` shows a bar on terminals only.
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", disable=None)

    def advance(self) -> None:
        self._bar.update()

    def log(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)

    def report(self, step: int, values: dict[str, float]) -> None:
        self.log(
            f"step {step}/{self.total_steps}  epoch {values['train/epoch']:.2f}  "
            f"loss {values['train/loss']:.4f}  lr {values['train/learning_rate']:.3g}  "
            f"{values['train/images_per_second']:.0f} images/s  "
            f"data wait {values['train/data_wait']:.1%}  "
            f"ETA {datetime.timedelta(seconds=round(values['train/seconds_left']))}"
        )

    def close(self) -> None:
        self._bar.close()


class NullWriter:
    """Stands for a MetricWriter or Progress on all processes but process 0: does nothing."""

    def __getattr__(self, name: str):
        return lambda *args: None
