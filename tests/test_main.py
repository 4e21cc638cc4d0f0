# SPDX-License-Identifier: Apache-2.0
"""main.py: exit codes, one line for bad input, JSON as the last line on stdout."""

import json
import os
import subprocess
import sys

import pytest


def command(root, *flags, **env):
    return subprocess.run(
        [sys.executable, "main.py", *flags],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


DIGITS = "--config=configs/digits.py"


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--config=FILE is missing, for instance --config=digits"),
        (["--config=configs/none.py"], "there is no config file configs/none.py"),
        (["--config=digitz"], "there is no config file digitz (did you mean 'digits'?)"),
        (["--config=transfer:mnist"], "transfer.py:mnist: the argument after the colon"),
        ([DIGITS, "--config.batch_sise=3"], "no key 'batch_sise': did you mean 'batch_size'?"),
        ([DIGITS, "--config.modl.depth=3"], "no key 'modl': did you mean 'model'?"),
        ([DIGITS, "--config.zzz=3"], "no key 'zzz': configs/default.py lists all keys"),
        ([DIGITS, "--config.batch_size=many"], "config.batch_size=many: invalid literal for int()"),
        ([DIGITS, "--config.batch_size=1.5"], "config.batch_size=1.5: invalid literal for int()"),
        (["--config=configs/transfer.py:mnist"], "transfer.py:mnist: the argument after the colon"),
        (["--config=configs/transfer.py:pets"], "training needs --workdir=FOLDER"),
        ([DIGITS, "--mode=evaluate"], "argument --mode: invalid choice: 'evaluate'"),
        ([DIGITS, "--workdri=x"], "unknown option --workdri: did you mean --workdir?"),
        ([DIGITS, "--num_processes=2"], "did you mean --num-processes?"),
        ([DIGITS, "--num-processes=0"], "--num-processes: '0' is not a positive integer"),
        ([DIGITS, "runs/digits"], "unexpected argument 'runs/digits'"),
        ([DIGITS], "training needs --workdir=FOLDER"),
        (["--config=configs/none.py:cifar10"], "there is no config file configs/none.py"),
    ],
    ids=lambda x: "" if isinstance(x, str) else " ".join(x),
)
def test_bad_flags(root, flags, message):
    result = command(root, *flags)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_help_is_that_of_the_command(root, mode):
    result = command(root, f"--mode={mode}", "--help")
    assert result.returncode == 0 and result.stdout.startswith(f"usage: tnt-flax {mode} ")


@pytest.mark.slow
def test_train_then_evaluate(root, tmp_path, smoke_flags):
    flags = [DIGITS, f"--workdir={tmp_path}", *smoke_flags]
    trained = command(root, *flags)
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout.splitlines()[-1])

    evaluated = command(root, *flags, "--mode=eval")
    assert evaluated.returncode == 0, evaluated.stderr
    of_workdir = json.loads(evaluated.stdout.splitlines()[-1])
    assert of_workdir.pop("checkpoint") == str(tmp_path / "checkpoints" / "29")
    for name in ("top1", "top5", "loss", "images", "skipped"):
        assert of_workdir[name] == result[name]
    assert 0 < of_workdir["ece"] < 1 and of_workdir["classes"] == 10

    file = f"--checkpoint={tmp_path / 'weights.safetensors'}"
    from_file = command(root, *flags, "--mode=eval", file)
    of_file = json.loads(from_file.stdout.splitlines()[-1])
    assert of_file.pop("checkpoint").endswith("weights.safetensors")
    assert of_file == of_workdir  # the file contains the EMA of the last step

    raw = command(root, *flags, "--mode=eval", "--config.eval.weights=raw", "--checkpoint=last")
    assert json.loads(raw.stdout.splitlines()[-1])["loss"] != of_workdir["loss"]

    failed = command(root, *flags, "--config.optimizer.learning_rate=1")
    assert failed.returncode == 2
    assert "belongs to another config (optimizer.learning_rate: 0.001 -> 1.0)" in failed.stderr


@pytest.mark.slow
def test_a_failed_run_exits_with_one(root, tmp_path, smoke_flags):
    flags = [DIGITS, f"--workdir={tmp_path}", *smoke_flags, "--config.optimizer.learning_rate=1e30"]
    result = command(root, *flags)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: the loss of step")
    assert "Traceback" not in result.stderr
