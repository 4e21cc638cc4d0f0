# SPDX-License-Identifier: Apache-2.0
import json
import sys

import pytest
from tensorboard.backend.event_processing import event_accumulator

from tnt_flax.training.metrics import MetricWriter, StepMeter, format_averages, read_metrics_file


def test_a_resumed_run_drops_the_lines_logged_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "train/loss": 1.0 / s}) for s in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "train/lo')  # killed while writing
    writer = MetricWriter(tmp_path, start_step=2)
    writer.write(3, {"train/loss": 0.25, "fingerprint": "abc"})
    writer.close()
    steps = [(m["step"], m.get("train/loss")) for m in read_metrics_file(path)]
    assert steps == [(1, 1.0), (2, 0.5), (3, 0.25)]
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("train/loss")
    assert (event.step, event.tensor_proto.float_val[0]) == (3, 0.25)
    assert "tensorflow" not in sys.modules


def test_the_meter_averages_the_steps_since_the_last_call(monkeypatch):
    clock = iter([0.0, 2.0, 5.0, 7.0, 7.0, 8.0, 8.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = StepMeter(batch_size=32, steps_per_epoch=10, total_steps=100)
    for loss in (1.0, 3.0):
        meter.add(0, {"loss": loss, "grad_norm": 2 * loss, "learning_rate": 0.1})
    with meter.pause():  # from 2 to 5: an evaluation
        pass
    meter.waited, meter.replaced_images = 1.0, 5
    values = meter.averages(step=20)
    assert values == {
        "train/loss": 2.0,
        "train/grad_norm": 4.0,
        "train/learning_rate": 0.1,
        "train/epoch": 2.0,
        "train/images_per_second": 16.0,  # 2 steps of 32 in 4 seconds
        "train/data_wait": 0.25,
        "train/replaced_images": 5,
        "train/seconds_left": 160.0,
    }
    meter.add(2, {"loss": 7.0, "grad_norm": 0.0, "learning_rate": 0.1})
    values = meter.averages(step=21)
    assert (values["train/loss"], values["train/replaced_images"]) == (7.0, 0)


@pytest.mark.parametrize("left, eta", [(59.6, "0:01:00"), (200_000, "2 days, 7:33:20")])
def test_averages_are_logged_in_one_line(left, eta):
    values = dict.fromkeys(("epoch", "loss", "learning_rate", "images_per_second"), 1.0)
    values |= {"data_wait": 0.031, "seconds_left": left}
    line = format_averages(5, 50, {f"train/{name}": value for name, value in values.items()})
    assert line.startswith("step 5/50  epoch 1.00  loss 1.0000  lr 1")
    assert line.endswith(f"data wait 3.1%  ETA {eta}")


def test_metrics_are_fetched_one_step_late(monkeypatch):
    """The device always has its next step, except where the averages need the last metrics."""
    fetched = []
    monkeypatch.setattr("jax.device_get", lambda metrics: fetched.append(metrics) or metrics)
    meter = StepMeter(batch_size=32, steps_per_epoch=10, total_steps=100)
    steps = [{"loss": i, "grad_norm": 0.0, "learning_rate": 0.1} for i in range(3)]
    for i, metrics in enumerate(steps):
        meter.add(i, metrics)
        assert fetched == steps[:i]
    meter.averages(3)
    assert fetched == steps


def test_a_full_disk_loses_lines_and_raises_nothing(tmp_path, monkeypatch, capsys):
    writer = MetricWriter(tmp_path, 0)
    writer.write(1, {"train/loss": 1.0})

    class Full:
        def __getattr__(self, name):
            raise OSError(28, "No space left on device")

    file, writer._file, writer._events = writer._file, Full(), Full()
    writer.write(2, {"train/loss": 2.0})
    err = capsys.readouterr().err
    assert f"error: cannot write {tmp_path}/metrics.jsonl: No space left" in err
    assert "error: cannot write TensorBoard's events: No space left" in err
    writer._file = file  # there is space again
    writer.write(3, {"train/loss": 3.0})
    writer.close()
    assert [m["step"] for m in read_metrics_file(writer.path)] == [1, 3]
    assert capsys.readouterr().err == ""
