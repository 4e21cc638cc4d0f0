# SPDX-License-Identifier: Apache-2.0
"""Trackers: offline records of W&B; MLflow and Trackio where they are installed, else stand-ins."""

import importlib.util
import sys
import threading
import types

import pytest

from tnt_flax.core.errors import InputError
from tnt_flax.training import trackers
from tnt_flax.training.metrics import MetricWriter, read_metrics_file
from tnt_flax.training.trackers import open_trackers, parse_trackers

CONFIG = {"batch_size": 4, "model": {"name": "tnt_s_patch16_224", "dtype": "bfloat16"}}


@pytest.fixture
def fake(monkeypatch):
    """Function that adds a tracker whose `log` is given; returns the tracker's name."""

    def add(log, open_tracker=None):
        tracker = types.SimpleNamespace(log=log, finish=lambda: log("finished", step=-1))
        opened = open_tracker or (lambda *arguments: tracker)
        monkeypatch.setitem(trackers.TRACKERS, "fake", opened)
        monkeypatch.setattr(trackers, "require_extras", lambda *args: None)
        return "fake"

    return add


def write(workdir, names, start_step, steps):
    """Logs as a run from `start_step` on does."""
    opener = lambda: open_trackers(names, "project", workdir, CONFIG)
    writer = MetricWriter(workdir, start_step, opener)
    for step in steps:
        writer.write(step, {"train/loss": 1.0 / step, "fingerprint": "abc"})
    writer.close()


def test_a_resumed_run_continues_its_record(tmp_path, fake):
    opened, logged = [], []
    tracker = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    name = fake(None, lambda *arguments: opened.append(arguments) or tracker)
    write(tmp_path, name, 0, [1, 2])
    write(tmp_path, name, 1, [2])
    (project, run, record, workdir, config), again = opened
    assert (project, run, workdir, config) == ("project", tmp_path.name, tmp_path, CONFIG)
    assert len(record) == 8 and again[2] == record
    loss = lambda step: (step, {"train/loss": 1.0 / step})  # without the fingerprint
    assert logged == [loss(1), loss(2), "end", loss(2), "end"]


@pytest.mark.parametrize("where", ["open", "log", "finish"])
def test_a_failing_tracker_is_one_warning(tmp_path, fake, caplog, where):
    def fail(*arguments, **options):
        raise ConnectionError("no route to host\nTraceback ...")

    fine = lambda *arguments, **options: None
    tracker = types.SimpleNamespace(
        log=fail if where == "log" else fine, finish=fail if where == "finish" else fine
    )
    write(tmp_path, fake(None, fail if where == "open" else lambda *a: tracker), 0, [1, 2, 3])
    assert [m["step"] for m in read_metrics_file(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    (message,) = [x for x in caplog.messages if "fake" in x]
    assert message.startswith("warning: fake failed (ConnectionError: no route to host) and gets")


def test_a_hanging_tracker_does_not_delay_the_run(tmp_path, fake, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT", 0.2)
    monkeypatch.setattr(trackers, "MAX_PENDING", 3)
    release = threading.Event()
    write(tmp_path, fake(None, lambda *arguments: release.wait()), 0, range(1, 100))
    (sender,) = (thread for thread in threading.enumerate() if thread.name == "fake")
    release.set()
    sender.join()  # it fails, and would log a warning during another test
    assert "fake did not take all values within 0.2 s" in caplog.text
    assert len(read_metrics_file(tmp_path / "metrics.jsonl")) == 99


def test_unknown_and_missing_trackers(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trackers, "require_extras", lambda *args: None)  # installed or not
        assert parse_trackers("") == [] and parse_trackers("wandb, ") == ["wandb"]
    with pytest.raises(InputError, match=r"no tracker 'wandbs' \(did you mean 'wandb'"):
        parse_trackers("wandbs")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'needs trackio: pip install "tnt_flax\[trackio\]"'):
        parse_trackers("trackio")


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, "wandb", 0, [1, 2])
    write(tmp_path, "wandb", 1, [2, 3])
    record = (tmp_path / "tracker_id").read_text()
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{record}.wandb"))
    ours = [record for record in caplog.records if record.name.startswith("tnt_flax")]
    assert len(files) == 2 and not ours


@pytest.fixture
def stand_in(monkeypatch):
    """Function that replaces a module that is not installed."""

    def replace(name, module):
        monkeypatch.setattr(trackers, "require_extras", lambda *args: None)
        if importlib.util.find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, module)

    return replace


def test_trackio(tmp_path, monkeypatch, stand_in):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    runs = {}

    class Run:
        def __init__(self, project, name, *, resume, config, embed):
            assert project == "project" and resume == "allow" and config == CONFIG and not embed
            self.logged = runs.setdefault(name, [])

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            (tmp_path / "trackio").mkdir(exist_ok=True)
            (tmp_path / "trackio" / "project.db").write_text(str(runs))

    stand_in("trackio", types.SimpleNamespace(init=Run))
    write(tmp_path, "trackio", 0, [1, 2])
    write(tmp_path, "trackio", 2, [3])
    record = (tmp_path / "tracker_id").read_text()
    stored = (tmp_path / "trackio" / "project.db").read_bytes()
    assert f"{tmp_path.name}-{record}".encode() in stored and b"train/loss" in stored


def test_mlflow(tmp_path, monkeypatch, stand_in):
    """The stand-in has the parts of MlflowClient that the tracker calls."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = types.SimpleNamespace(runs=[], metrics=[], params={}, status=[])

    class Client:
        def __init__(self, tracking_uri):
            assert tracking_uri == f"sqlite:///{tmp_path / 'mlflow.db'}"

        def get_experiment_by_name(self, name):
            return types.SimpleNamespace(experiment_id="1") if store.runs else None

        def create_experiment(self, name):
            return "1"

        def search_runs(self, experiments, query):
            assert experiments == ["1"] and record() in query
            return store.runs

        def create_run(self, experiment, run_name, tags):
            info = types.SimpleNamespace(run_id="r")
            store.runs.append(types.SimpleNamespace(info=info))
            return store.runs[-1]

        def update_run(self, run, status):
            store.status.append(status)

        def log_batch(self, run, metrics=(), params=()):
            store.metrics += [(m.key, m.value, m.step) for m in metrics]
            store.params |= {p.key: p.value for p in params}

        def set_terminated(self, run):
            store.status.append("FINISHED")

        def get_metric_history(self, run, key):
            return [types.SimpleNamespace(value=v, step=s) for k, v, s in store.metrics if k == key]

    metric = lambda key, value, timestamp, step: types.SimpleNamespace(
        key=key, value=value, step=step
    )
    param = lambda key, value: types.SimpleNamespace(key=key, value=value)
    entities = types.SimpleNamespace(Metric=metric, Param=param)
    stand_in("mlflow", types.SimpleNamespace(MlflowClient=Client, entities=entities))
    record = lambda: (tmp_path / "tracker_id").read_text()
    write(tmp_path, "mlflow", 0, [1, 2])
    write(tmp_path, "mlflow", 2, [3])

    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("project").experiment_id
    query = f"tags.`tnt_flax.record` = '{record()}'"
    (run,) = client.search_runs([experiment], query)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
