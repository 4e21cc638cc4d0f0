# SPDX-License-Identifier: Apache-2.0
"""A run of PyramidTNT: BatchNorm's statistics are trained, averaged, saved and converted."""

import shutil

import jax
import numpy as np
import pytest

import tnt_flax
from tests.helpers.smoke import SMOKE
from tnt_flax.__main__ import load_command, main
from tnt_flax.core.trees import fingerprint, named_leaves
from tnt_flax.runtime import checkpoints
from tnt_flax.tools import report
from tnt_flax.training.evaluate import evaluate_checkpoint
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.train import train_and_evaluate
from tnt_flax.weights.names import join_collections

STEPS = 29  # 1,437 digits in batches of 48
MODEL = dict(
    name="ptnt_ti_patch16_192", outer_dim=8, inner_dim=2, outer_heads=2, inner_heads=1, remat="none"
)
DIGITS = tuple("0123456789")
HALF = (0.5, 0.5, 0.5)


pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A smoke run from start to end: (config, workdir, result)."""
    from configs import digits

    config = digits.get_config()
    config.update_from_flattened_dict({k: v for k, v in SMOKE.items() if "model." not in k})
    fields = MODEL | dict(depths=(1, 1, 1, 1), depth=None)
    config.update_from_flattened_dict({f"model.{key}": value for key, value in fields.items()})
    workdir = tmp_path_factory.mktemp("pyramid")
    return config, workdir, train_and_evaluate(config, workdir)


def stored(workdir, step, kind, config):
    abstract = jax.eval_shape(Experiment(config).init_variables, jax.random.key(0))
    return checkpoints.read_weights(workdir / "checkpoints" / str(step), kind, abstract)


def test_statistics_move_and_are_averaged(finished):
    config, workdir, _ = finished
    raw, ema = (named_leaves(stored(workdir, STEPS, kind, config)) for kind in ("raw", "ema"))
    for name, x in raw.items():
        if name.endswith("/count"):
            assert x == ema[name] == STEPS and x.dtype == np.int32
        elif name.endswith(("/mean", "/var")):
            initial = float(name.endswith("/var"))
            assert (x != initial).all() and (ema[name] != x).any(), name
            # The average (0.99 a step) is behind, between the beginning and the end.
            assert np.abs(ema[name] - initial).mean() < np.abs(x - initial).mean(), name


def test_a_resumed_run_ends_bit_identical(finished, tmp_path):
    config, workdir, result = finished
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    for step in (20, STEPS):
        shutil.rmtree(copy / "checkpoints" / str(step))
    assert train_and_evaluate(config, copy) == result  # the fingerprint covers the statistics
    again, first = ((folder / "weights.safetensors").read_bytes() for folder in (copy, workdir))
    assert again == first


def test_its_weights_are_evaluated_loaded_and_converted(finished, tmp_path):
    config, workdir, result = finished
    found = evaluate_checkpoint(config, None, str(workdir / "weights.safetensors"))
    assert (found["top1"], found["loss"]) == (result["top1"], result["loss"])
    model, variables = tnt_flax.load(workdir, checkpoint="last", weights="raw")
    assert fingerprint(join_collections(variables)) == result["fingerprint"]
    assert model.depths == (1, 1, 1, 1) and set(variables) == {"params", "batch_stats"}
    path = tmp_path / "x.pth"
    flags = ["--to=huawei", "--checkpoint=last", "--weights=raw"]
    params, _ = Experiment(config).load_variables(str(workdir), DIGITS, checkpoint="last")
    assert fingerprint(params) == fingerprint(stored(workdir, STEPS, "ema", config))
    assert main(["convert", str(workdir), str(path), *flags]) == 0
    _, again = tnt_flax.load(path, inner_heads=1)
    assert fingerprint(join_collections(again)) == result["fingerprint"]


def test_its_report(finished):
    _, workdir, result = finished
    found = report.run(load_command("report")[1].parse_args([str(workdir)]))
    assert found["top1"] == pytest.approx(result["top1"])
    page = (workdir / "report.html").read_text()
    assert "Attention rollout (brighter patches have a larger share" in page
