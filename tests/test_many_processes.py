# SPDX-License-Identifier: Apache-2.0
"""The same run as one process or several, on any mesh, and from one to the other."""

import json
import shutil

import numpy as np
import pytest
from processes import finish, start
from smoke import SMOKE

from tnt_flax.metrics import read_metrics_file
from tnt_flax.train import train_and_evaluate

STEPS, RESUMED = 22, 10  # of 64 digits each
FIELDS = {
    "batch_size": 64,
    "eval.batch_size": 120,
    "model.outer_heads": 2,
    "model.drop_path": 0.2,
    "augment.mixup_alpha": 0.8,
    "augment.erase_prob": 0.25,
    "log.every": "1 steps",
}
FLAGS = [f"--config.{key}={value}" for key, value in (SMOKE | FIELDS).items()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of one process on eight devices, four of which share what is stored."""
    from configs import digits

    config = digits.get_config()
    config.update_from_flattened_dict(SMOKE | FIELDS | {"mesh.fsdp": 4})
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, train_and_evaluate(config, workdir)


def losses(workdir):
    lines = read_metrics_file(workdir / "metrics.jsonl")
    return {m["step"]: m["train/loss"] for m in lines if "train/loss" in m}


def run(root, workdir, flags, count, devices):
    """Trains as `count` processes; returns what process 0 ends with, and its stderr."""
    results = finish(start(root, workdir, [*FLAGS, *flags], count, devices))
    assert [code for code, _, _ in results] == [0] * count, results
    lines = [[x for x in out.splitlines() if x.startswith("{")] for _, out, _ in results]
    assert [len(x) for x in lines] == [1] + [0] * (count - 1)  # only process 0 answers
    return json.loads(lines[0][0]), results[0][2]


def check_same(whole, workdir, result):
    before, expected = whole
    assert list(losses(workdir)) == list(losses(before)) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(
        list(losses(workdir).values()), list(losses(before).values()), rtol=2e-6
    )
    assert result["images"] == expected["images"] == 360
    np.testing.assert_allclose(result["loss"], expected["loss"], rtol=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one_does(whole, root, tmp_path):
    result, err = run(root, tmp_path / "run", ["--config.mesh.fsdp=2"], 2, 2)
    assert "4 cpu devices (data 2, fsdp 2) of 2 processes" in err
    check_same(whole, tmp_path / "run", result)
    for name in ("weights.safetensors", "curves.png", "predictions.png", "parameters.txt"):
        assert (tmp_path / "run" / name).stat().st_size > 0


@pytest.mark.slow
def test_four_processes_go_on_where_one_stopped(whole, root, tmp_path):
    """Their devices share the heads; the state that they read was split otherwise."""
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > RESUMED:
            shutil.rmtree(path)
    result, err = run(root, workdir, ["--config.mesh.fsdp=1", "--config.mesh.tensor=2"], 4, 1)
    assert (
        f"4 cpu devices (data 2, tensor 2) of 4 processes, 22 steps per epoch; from step {RESUMED}"
        in err
    )
    check_same(whole, workdir, result)
