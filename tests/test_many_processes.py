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
NAMES = ("weights.safetensors", "curves.png", "predictions.png")
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


@pytest.mark.soak
def test_two_processes_go_on_where_one_stopped(whole, root, tmp_path):
    """Their devices share heads, and read a state that was split otherwise."""
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > RESUMED:
            shutil.rmtree(path)
    for name in NAMES:
        (workdir / name).unlink()
    flags = [*FLAGS, "--config.mesh.fsdp=1", "--config.mesh.tensor=2"]
    (code, out, err), (other_code, other_out, _) = finish(start(root, workdir, flags, 2, 2))
    assert (code, other_code) == (0, 0), err
    assert "4 cpu devices (data 2, tensor 2) of 2 processes" in err
    assert f"; from step {RESUMED} to {STEPS}; " in err
    assert "{" not in other_out  # process 0 alone answers
    result, (before, expected) = json.loads(out.splitlines()[-1]), whole
    assert list(losses(workdir)) == list(losses(before)) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(
        list(losses(workdir).values()), list(losses(before).values()), rtol=1e-5
    )
    assert result["images"] == expected["images"] == 360
    np.testing.assert_allclose(result["loss"], expected["loss"], rtol=1e-5)
    for name in NAMES:
        assert (workdir / name).stat().st_size > 0
