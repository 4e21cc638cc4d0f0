# SPDX-License-Identifier: Apache-2.0
"""`selftest` accepts implementations of the reference's function and rejects others."""

import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tnt_flax.__main__ import main
from tnt_flax.models.kernels import select
from tnt_flax.runtime import sharding
from tnt_flax.tools import selftest

SMALL = ["--model=tnt_ti_patch16_224", "--image-size=32", "--depth=1", "--batch-size=2"]


def run(capsys, *arguments):
    code = main(["selftest", *SMALL, *arguments])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]), err


@pytest.fixture
def only(monkeypatch):
    """Returns a function that leaves the reference and one more implementation."""

    def leave(name, fields):
        both = {"reference": selftest.IMPLEMENTATIONS["reference"], name: fields}
        monkeypatch.setattr(selftest, "IMPLEMENTATIONS", both)

    return leave


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(selftest, "COMPARED", {"depth": 1, "batch_size": 2})


@pytest.fixture
def optimized():
    """A CPU multiplies bfloat16 to float32 only in optimized programs."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_every_implementation_passes_and_is_timed(capsys, monkeypatch):
    code, result, _ = run(capsys, "--rounds=1")
    assert code == 0 and result["passed"]
    assert set(result["unavailable"]) == {"inner=mosaic", "inner=pallas", "outer=pallas"}
    names = ["reference", "inner=cpu", "inner=gpu", "inner=lanes", "outer=cpu", "outer=gpu"]
    assert list(result["implementations"]) == names
    for found in result["implementations"].values():
        assert found["passed"] and found["forward_ms"] > 0 and found["step_ms"] > 0
    for key in ("device", "platform", "versions", "tolerances", "timed"):
        assert result[key]


@pytest.mark.slow
@pytest.mark.parametrize("factor, difference", [(1.01, 0.01), (float("nan"), float("nan"))])
def test_wrong_gradients_and_exceptions_are_failures(factor, difference, capsys, monkeypatch, only):
    """In float32 a gradient is multiplied by `factor`; bfloat16 raises."""
    only("inner=cpu", selftest.IMPLEMENTATIONS["inner=cpu"])
    original = selftest.logits_and_gradients

    def wrong(model, inputs):
        logits, gradients = original(model, inputs)
        if model.inner_impl == "cpu":
            assert jnp.dtype(model.dtype).name == "float32", "no bfloat16"
            gradients[3] = gradients[3] * factor
        return logits, gradients

    monkeypatch.setattr(selftest, "logits_and_gradients", wrong)
    code, result, err = run(capsys, "--rounds=1")
    found = result["implementations"]["inner=cpu"]
    assert code == 1 and not result["passed"] and not found["passed"]
    assert found["float32"]["gradients"] == pytest.approx(difference, rel=0.1, nan_ok=True)
    assert found["float32"]["logits"] < selftest.TOLERANCES["logits"]
    assert "no bfloat16" in found["bfloat16"]["error"]
    assert "inner=cpu float32" in err and "FAILED" in err


@pytest.mark.slow
def test_wrong_logits_are_found(capsys, monkeypatch, only):
    """The attention of "cpu" gets another scale, in a block in which all tokens attend."""
    monkeypatch.setitem(selftest.COMPARED, "depth", 2)
    functions = select.FUNCTIONS["cpu"]
    right = functions["attention_fn"]
    wrong = functions | {"attention_fn": lambda query, *rest: right(1.1 * query, *rest)}
    monkeypatch.setitem(select.FUNCTIONS, "cpu", wrong)
    only("outer=cpu", {"inner_impl": "reference", "outer_impl": "cpu"})
    code, result, _ = run(capsys, "--rounds=1")
    found = result["implementations"]["outer=cpu"]
    assert code == 1 and found["float32"]["logits"] > selftest.TOLERANCES["logits"]


class Linear(nn.Module):
    num_classes: int = 3

    @nn.compact
    def __call__(self, images, train=False):
        del train
        return nn.Dense(self.num_classes)(images.mean(axis=(1, 2)))


def test_the_timed_step_is_compiled_once():
    with jax.set_mesh(sharding.make_mesh(jax.devices()[:1])):
        call = selftest.make_step(Linear(), 2, 4)
        call()
        with jax.no_tracing():
            call()


def test_invalid_image_size(capsys):
    assert main(["selftest", "--image-size=30"]) == 2
    assert "error: image size 30x30" in capsys.readouterr().err


def test_packages_of_training_are_not_needed(root):
    code = "import sys, tnt_flax.tools.selftest; print(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "optax" in loaded, run.stderr
    assert not loaded & {"grain", "clu", "ml_collections", "tensorflow_datasets", "orbax"}
