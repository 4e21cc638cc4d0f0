# SPDX-License-Identifier: Apache-2.0
"""Inference, the start of a run, its loop: the benchmarks say what they ran. No times here."""

import argparse
import importlib.util
import json
import os

import pytest

from benchmarks import __main__, harness, inference, start, synthetic_run
from benchmarks import run as benchmark_loop
from tests.helpers.smoke import SMOKE
from tnt_flax.core.errors import InputError, RunError
from tnt_flax.runtime import host
from tnt_flax.training import train

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="the benchmark needs Linux"
)


# ------------------------------------------------------------------------------------- inference


@pytest.mark.slow
def test_inference_of_one_side_alone(monkeypatch, capfd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(inference, "OURS", {"ours": "float32"})
    arguments = ["inference", "--model=tnt_ti_patch16_224", "--rounds=1", "--batch-sizes", "3", "1"]
    args = __main__.make_parser().parse_args(arguments)
    result = args.measure(args, image_size=32, depth=1)
    assert list(result["images_per_second"]) == ["1", "3"] and result["batch_size"] == [1, 3]
    assert 0 < result["latency_ms"]["ours"]["median"] <= result["latency_ms"]["ours"]["p95"]
    assert result["vs_eager"] == {}
    assert "batch 3 round 1: images/s: ours" in capfd.readouterr().err
    json.dumps(result)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_who_takes_part_in_inference(bfloat16, monkeypatch):
    """bfloat16 only where the CPU has instructions for it."""
    sides = []

    def processes(those, cores):
        sides.extend(those)
        raise RunError("enough")

    monkeypatch.setattr(harness, "processes", processes)
    monkeypatch.setattr(inference, "has_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    args = __main__.make_parser().parse_args(["inference", "--model=tnt_ti_patch16_224"])
    with pytest.raises(RunError, match="enough"):
        args.measure(args)
    assert sides == ["ours", "ours bfloat16"][: 1 + bfloat16]


def test_the_summary_of_inference():
    latencies = {"ours": [[10, 10, 10, 90], [20] * 4], "timm eager": [[20] * 4, [40] * 4]}
    rates = {8: {"ours": [1.0, 2.0, 3.0], "ours bfloat16": [1.0] * 3, "timm eager": [1.0] * 3}}
    result = inference.summarize(latencies, rates)
    assert result["latency_ms"]["ours"] == {"median": 20.0, "p95": pytest.approx(65.5)}
    assert result["vs_eager"] == {"latency": 2.0, "8": 2.0} and result["vs_compile"] == {}
    assert result["rounds"]["latency"]["timm eager"] == [50.0, 25.0]  # images per second


# ----------------------------------------------------------------------------- a run of few steps


def test_what_a_short_run_changes(root, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(root)

    def settings(config, *given):
        args = argparse.Namespace(config=str(root / "configs" / config), batch_size=2, set=given)
        return synthetic_run.settings(args, tmp_path, steps=2)

    batches = {"batch_size": 2, "eval.batch_size": 2}
    assert settings("digits.py") == batches
    assert settings("tnt_s.py", "data.root=here", "epochs=3") == batches | {
        "data.root": "here",
        "epochs": 3,
    }
    assert not list(tmp_path.iterdir())
    assert settings("tnt_s.py")["data.root"] == str(tmp_path)
    counts = {split: len(list((tmp_path / split).rglob("*.jpg"))) for split in ("train", "val")}
    assert counts == {"train": 4, "val": 2}


MAIN = """
import sys, jax, jax.numpy as jnp
print("some news", file=sys.stderr)
if len(sys.argv) > 1:
    print("error: it cannot", file=sys.stderr)
    sys.exit(int(sys.argv[1]))
jax.jit(jax.jit(lambda x: x + 1))(jnp.ones(3)).block_until_ready()
print("step 1/9  loss 2", "step 2/9", sep=chr(10), file=sys.stderr, flush=True)
import time; time.sleep(600)
"""


def test_a_start_ends_with_its_first_step(root, tmp_path, monkeypatch):
    """Of any main.py that reports its steps as ours does."""
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "main.py").write_text(MAIN)
    cores = harness.pick_cores(1)
    found = start.start([], tmp_path / "cache", cores)
    assert 0 < found["compile_s"] < found["seconds"] and 0 < found["trace_s"] < found["seconds"]
    assert found["programs"] >= len(found["slowest"]) > 0 and found["peak_gib"] > 0.01
    assert any("lambda" in name for name in found["slowest"])
    with pytest.raises(RunError, match="main.py ended before its first step: error: it cannot"):
        start.start(["1"], tmp_path / "cache", cores)
    with pytest.raises(InputError, match="^it cannot"):
        start.start(["2"], tmp_path / "cache", cores)


def test_traces_within_traces_count_once():
    events = [dict(seconds=s, end=end) for s, end in [(1, 12), (5, 14), (1, 15), (1, 20)]]
    assert start.covered(events) == 7


def test_a_start_needs_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no main.py here"):
        args = __main__.make_parser().parse_args(["start"])
        args.measure(args)


def test_the_loop_counts_what_its_run_reported_after_the_first_epoch(root, tmp_path, monkeypatch):
    """And the bare step is one that runs. The run itself is tested elsewhere."""
    monkeypatch.syspath_prepend(root)
    monkeypatch.setattr(host, "keep_memory", lambda: None)

    def run(config, workdir):
        assert (config.epochs, config.log.every, config.batch_size) == (3, "1 epochs", 480)
        workdir.mkdir()
        lines = [{"step": 2 * i, "train/images_per_second": 240.0 * i} for i in (1, 2, 4)]
        (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))

    monkeypatch.setattr(train, "train_and_evaluate", run)
    changes = SMOKE | benchmark_loop.EPOCHS | {"batch_size": 480}
    config = str(root / "configs" / "digits.py")
    passes = benchmark_loop._passes(config, changes, tmp_path, 1)
    # Two epochs of 2 steps of 480 images, at 480 and at 960 images per second.
    assert passes["loop"]() == (4, pytest.approx(3.0))
    assert passes["bare"]() == 1437 // 480
    with pytest.raises(InputError, match="--set: KeyError"):
        benchmark_loop._passes(config, {"epoch": 3}, tmp_path, 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["inference", "--batch-sizes", "8", "0"], "--batch-sizes=0 is less than 1"),
        (["inference", "--model=tnt_s"], "unknown model 'tnt_s'"),
        (["start", "--rounds=0"], "--rounds=0 is less than 1"),
        (["start", "--config=nowhere.py"], "--config=nowhere.py is no config to read"),
        (["start", "--set", "epochs"], "--set epochs: write NAME=VALUE"),
        (["loop", "--steps=0"], "--steps=0 is less than 1"),
        (["loop", "--cores=100000"], "--cores=100000: this process may use "),
    ],
)
def test_bad_input_is_one_line(arguments, message, root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(root)
    assert __main__.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.splitlines()[-1].startswith("error: ")
    assert message in err.splitlines()[-1]
