# SPDX-License-Identifier: Apache-2.0
"""`selftest` accepts what computes the reference's function and finds what does not."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tnt_flax.__main__ import main
from tnt_flax.models.kernels import select
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
    monkeypatch.setattr(selftest, "MAX_ROUNDS", 1)
    code, result, _ = run(capsys, "--seconds=600")
    assert code == 0 and result["passed"]
    assert set(result["unavailable"]) == {"inner=pallas", "outer=pallas"}
    names = ["reference", "inner=cpu", "inner=lanes", "outer=cpu"]
    assert list(result["implementations"]) == names
    for found in result["implementations"].values():
        assert found["passed"] and found["forward_ms"] > 0 and found["step_ms"] > 0
    for key in ("device", "platform", "versions", "tolerances", "timed"):
        assert result[key]


@pytest.mark.slow
def test_a_wrong_gradient_is_found(capsys, monkeypatch, only):
    """Logits are equal; one gradient is 1 % too large."""
    only("inner=wrong", {"inner_impl": "reference", "outer_impl": "reference"})
    original = selftest.logits_and_gradients
    calls = []

    def wrong(model, inputs):
        logits, gradients = original(model, inputs)
        calls.append(model)
        if len(calls) > 2:  # the first two are the reference
            gradients[3] = gradients[3] * 1.01
        return logits, gradients

    monkeypatch.setattr(selftest, "logits_and_gradients", wrong)
    code, result, err = run(capsys, "--seconds=1")
    found = result["implementations"]["inner=wrong"]
    assert code == 1 and not result["passed"] and not found["passed"]
    assert found["float32"] == {"logits": 0, "gradients": 0.01}
    assert "inner=wrong float32" in err and "FAILED" in err


def test_wrong_logits_are_found(capsys, monkeypatch, only):
    """The attention of "cpu" gets another scale, in a block in which all tokens attend."""
    monkeypatch.setitem(selftest.COMPARED, "depth", 2)
    functions = select.FUNCTIONS["cpu"]
    right = functions["attention_fn"]
    wrong = functions | {"attention_fn": lambda query, *rest: right(1.1 * query, *rest)}
    monkeypatch.setitem(select.FUNCTIONS, "cpu", wrong)
    only("outer=cpu", {"inner_impl": "reference", "outer_impl": "cpu"})
    code, result, _ = run(capsys, "--seconds=1")
    found = result["implementations"]["outer=cpu"]
    assert code == 1 and found["float32"]["logits"] > selftest.TOLERANCES["logits"]


@pytest.mark.slow
def test_nan_and_exceptions_are_failures(capsys, monkeypatch, only):
    only("inner=cpu", selftest.IMPLEMENTATIONS["inner=cpu"])
    original = selftest.logits_and_gradients
    broken = {"float32": lambda: (float("nan"), None), "bfloat16": lambda: 1 / 0}

    def wrong(model, inputs):
        logits, gradients = original(model, inputs)
        if model.inner_impl == "cpu":
            factor, _ = broken[jnp.dtype(model.dtype).name]()
            return factor * logits, gradients
        return logits, gradients

    monkeypatch.setattr(selftest, "logits_and_gradients", wrong)
    code, result, _ = run(capsys, "--seconds=1")
    found = result["implementations"]["inner=cpu"]
    assert code == 1 and not found["passed"]
    assert found["bfloat16"] == {"error": "ZeroDivisionError: division by zero"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model=tnt_x"], "tnt_x"),
        (["--image-size=30"], "30"),
        (["--dtype=float16"], "argument --dtype: invalid choice"),
        (["--rounds=3"], "unknown option --rounds"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(["selftest", *arguments]) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert not out and message in line


def test_packages_of_training_are_not_needed(root):
    code = "import sys, tnt_flax.tools.selftest; print(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "optax" in loaded, run.stderr
    assert not loaded & {"grain", "clu", "ml_collections", "tensorflow_datasets", "orbax"}
