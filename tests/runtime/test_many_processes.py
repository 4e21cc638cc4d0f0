# SPDX-License-Identifier: Apache-2.0
"""A run resumes with another number of devices and processes, and on another mesh."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.processes import finish, start
from tests.helpers.reading import recorded, samples
from tests.helpers.smoke import SMOKE
from tnt_flax.training import train
from tnt_flax.training.metrics import read_metrics_file

STEPS, RESUMED = 22, 10  # of 64 digits each
ARTIFACTS = ("weights.safetensors", "curves.png", "predictions.png")
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


MESH = "4 cpu devices (data 2, {} 2) of {} processes"
TOPOLOGIES = {
    "1 device": (1, 1, {}, " 1 cpu device, "),
    "2 processes of 2 devices": (2, 2, {"tensor": 2}, MESH.format("tensor", 2)),
    "4 processes": (4, 1, {"fsdp": 2}, MESH.format("fsdp", 4)),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of one process on eight devices, with its state sharded over four."""
    from configs import digits

    config = digits.get_config()
    config.update_from_flattened_dict(SMOKE | FIELDS | {"mesh.fsdp": 4})
    workdir = tmp_path_factory.mktemp("whole") / "run"
    read = tmp_path_factory.mktemp("read")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "to_global", recorded(train.to_global, read))
        result = train.train_and_evaluate(config, workdir)
    stream = samples(read)
    assert [len(set(step)) for step in stream] == [64] * STEPS
    return workdir, result, stream


def losses(workdir):
    lines = read_metrics_file(workdir / "metrics.jsonl")
    return {m["step"]: m["train/loss"] for m in lines if "train/loss" in m}


@pytest.mark.soak
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_resuming_on_other_devices_and_processes(uninterrupted, root, tmp_path, name):
    """The state is resharded, and the samples are the same as in the uninterrupted run."""
    before, expected, stream = uninterrupted
    processes, devices, mesh, described = TOPOLOGIES[name]
    workdir, read = tmp_path / "run", tmp_path / "read"
    shutil.copytree(before, workdir)
    read.mkdir()
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > RESUMED:
            shutil.rmtree(path)
    for file in ARTIFACTS:
        (workdir / file).unlink()
    flags = [*FLAGS, *[f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]]
    env = {"READ": str(read)}
    ended = finish(start(root, workdir, flags, processes, devices, "tests/helpers/reading.py", env))
    out, err = ended[0][1:]
    assert [code for code, _, _ in ended] == [0] * processes, err
    assert described in err
    assert f"; from step {RESUMED} to {STEPS}; " in err
    assert not any("{" in other for _, other, _ in ended[1:])  # only process 0 prints the result
    assert samples(read) == stream[RESUMED:]
    result = json.loads(out.splitlines()[-1])
    assert list(losses(workdir)) == list(losses(before)) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(
        list(losses(workdir).values()), list(losses(before).values()), rtol=1e-5
    )
    assert result["images"] == expected["images"] == 360
    np.testing.assert_allclose(result["loss"], expected["loss"], rtol=1e-5)
    ours, theirs = (load_file(folder / ARTIFACTS[0]) for folder in (workdir, before))
    for key, ema in theirs.items():
        np.testing.assert_allclose(ours[key], ema, rtol=0, atol=1e-5, err_msg=key)
    for file in ARTIFACTS:
        assert (workdir / file).stat().st_size > 0
