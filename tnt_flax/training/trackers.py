# SPDX-License-Identifier: Apache-2.0
"""Trackers, which show the metrics of many runs side by side: W&B, MLflow, Trackio.

A tracker gets the same numbers as TensorBoard, in a thread of its own: one that is slow or fails
neither delays nor stops the run. A resumed run continues its record. The settings of the services,
such as WANDB_MODE=offline and MLFLOW_TRACKING_URI, come from their environment variables.
"""

import logging
import os
import pathlib
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from flax.traverse_util import flatten_dict

from tnt_flax.core.errors import InputError, did_you_mean, listed, one_line, require_extras
from tnt_flax.core.files import write_atomic

MAX_PENDING = 10_000  # values of that many steps wait for a slow tracker; later ones are lost
CLOSE_TIMEOUT = 60  # seconds that the end of a run waits for its trackers
RECORD = "tracker_id"  # file of the workdir: the id of the record of its run

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """The record of one run. Both methods may raise anything."""

    def log(self, values: dict[str, float], *, step: int) -> None: ...

    def finish(self) -> None: ...


def _open_wandb(project, name, record_id, workdir, config) -> Tracker:
    import wandb

    # Do not redirect stdout and stderr, nor wait for an API key forever.
    settings = wandb.Settings(console="off", silent=True, login_timeout=30)
    options = dict(config=config, dir=str(workdir), settings=settings)
    return wandb.init(project=project, name=name, id=record_id, resume="allow", **options)


def _open_trackio(project, name, record_id, workdir, config) -> Tracker:
    import trackio

    # Trackio knows a run by its name.
    options = dict(config=config, resume="allow", embed=False)
    return trackio.init(project=project, name=f"{name}-{record_id}", **options)


class _Mlflow:
    """A run of MLflow, in WORKDIR/mlflow.db unless MLFLOW_TRACKING_URI is set."""

    def __init__(self, project, name, record_id, workdir, config):
        import mlflow

        self._metric = mlflow.entities.Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workdir / 'mlflow.db'}"
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(project)
        experiment = experiment.experiment_id if experiment else None
        experiment = experiment or self._client.create_experiment(project)
        tags = {"tnt_flax.record": record_id}
        query = f"tags.`tnt_flax.record` = '{record_id}'"
        found = self._client.search_runs([experiment], query)
        run = found[0] if found else self._client.create_run(experiment, run_name=name, tags=tags)
        self._run = run.info.run_id
        self._client.update_run(self._run, status="RUNNING")
        keys = flatten_dict(config, sep=".").items()
        params = [] if found else [mlflow.entities.Param(key, str(x)) for key, x in keys]
        for start in range(0, len(params), 100):  # MLflow's limit
            self._client.log_batch(self._run, params=params[start : start + 100])

    def log(self, values, *, step):
        now = int(1000 * time.time())
        metrics = [self._metric(key, value, now, step) for key, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def finish(self):
        self._client.set_terminated(self._run)


# Open the record of a run, or the existing one of the same `record_id`.
TRACKERS: Mapping[str, Callable[..., Tracker]] = {
    "wandb": _open_wandb,
    "mlflow": _Mlflow,
    "trackio": _open_trackio,
}


def parse_trackers(names: str) -> list[str]:
    """Returns the trackers of `log.trackers`, such as "wandb,mlflow".

    Raises:
        InputError: one is unknown, or its package is not installed.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in TRACKERS:
            known = f"{did_you_mean(name, TRACKERS)}: use {listed(list(TRACKERS))}"
            raise InputError(f"log.trackers={names!r}: there is no tracker {name!r}{known}")
        require_extras(f"log.trackers={names!r}", name)
    return chosen


def open_trackers(
    names: str, project: str, workdir: pathlib.Path, config: dict[str, Any]
) -> list["Sender"]:
    """Opens the record of the run in `workdir` in each of `names`, see `parse_trackers`."""
    chosen = parse_trackers(names)
    if not chosen:
        return []
    path = workdir / RECORD
    if not path.exists():
        write_atomic(path, secrets.token_hex(4))
    arguments = (project, workdir.name, path.read_text(), workdir, config)
    return [Sender(name, lambda name=name: TRACKERS[name](*arguments)) for name in chosen]


class Sender:
    """Sends values to a tracker from a thread, which the run never waits for until its end.

    If the tracker raises, a warning is logged once, and it gets no more values.
    """

    def __init__(self, name: str, open_tracker: Callable[[], Tracker]):
        self._name, self._open = name, open_tracker
        self._values: queue.Queue = queue.Queue(MAX_PENDING)
        self._thread = threading.Thread(target=self._send, name=name, daemon=True)
        self._thread.start()

    def log(self, values: dict[str, float], step: int) -> None:
        try:
            self._values.put_nowait((values, step))
        except queue.Full:
            pass  # the tracker has failed or hangs

    def close(self) -> None:
        """Waits until all values are sent, for at most CLOSE_TIMEOUT seconds."""
        self.log(None, 0)
        self._thread.join(CLOSE_TIMEOUT)
        if self._thread.is_alive():
            logger.warning(
                f"warning: {self._name} did not take all values within {CLOSE_TIMEOUT} s; "
                "metrics.jsonl has them"
            )

    def _send(self) -> None:
        try:
            tracker = self._open()
            while (item := self._values.get())[0] is not None:
                values, step = item
                tracker.log(values, step=step)
            tracker.finish()
        except (Exception, SystemExit) as error:  # whatever the service raises
            logger.warning(
                f"warning: {self._name} failed ({one_line(error)}) and gets no more values; "
                "the run goes on, and metrics.jsonl has them"
            )
