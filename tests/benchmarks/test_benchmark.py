# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs and says what it ran. No test here knows how long anything takes."""

import functools
import importlib.util
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import __main__, harness, input, model, tpu
from tnt_flax.core.errors import InputError
from tnt_flax.models import create_model

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="the benchmark needs Linux"
)


def run(root, *arguments):
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.fixture
def photos(tmp_path):
    for i in range(9):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
        (tmp_path / "below").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "below" / f"{i}.JPEG")
    return tmp_path


def assert_describes_the_rounds(result, rounds, sides):
    for task in ("train", "train_opencv", "eval"):
        assert result["images_per_second"][task].keys() == set(sides)
        assert all(rate > 0 for rate in result["images_per_second"][task].values())
        assert len(result["rounds"][task]) == (harness if len(sides) > 1 else 0)
        assert (result[task] is None) == (len(sides) == 1)
    assert (result["images"], result["batch_size"], len(result["cores"])) == (9, 8, 1)
    assert {"numpy", "pillow", "grain"} <= result["versions"].keys()


def test_ours_alone_where_there_is_no_torch(photos, monkeypatch, capfd):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    assert __main__.main(["input", f"--images={photos}", "--rounds=2", "--size=16"]) == 0
    out, err = capfd.readouterr()
    assert_describes_the_rounds(json.loads(out.splitlines()[-1]), 2, ["ours"])
    assert "torch or timm is not installed: our figures alone" in err
    assert len(re.findall(r"^\w+ round [12]: images/s: ours [\d.]+$", err, re.M)) == 6


def test_without_opencv_there_is_no_figure_of_it(photos, monkeypatch, capfd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert __main__.main(["input", f"--images={photos}", "--rounds=1", "--size=16"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["train_opencv"] is None and result["rounds"].keys() == {"train", "eval"}


@pytest.mark.oracle
def test_beside_timm(root, photos):
    process = run(root, "input", f"--images={photos}", "--rounds=2", "--size=32")
    assert process.returncode == 0, process.stderr
    sides = ["ours", "timm, 0 workers", "timm, 1 workers"]
    assert_describes_the_rounds(json.loads(process.stdout.splitlines()[-1]), 2, sides)


def test_ratios_are_to_the_faster_of_the_others_in_each_round():
    rates = {"ours": [6.0, 8.0], "a": [2.0, 8.0], "b": [3.0, 4.0]}
    assert harness.ratios(rates, "ours", ["a", "b"]) == [2.0, 1.0]
    assert harness.ratios(rates, "b", ["a"]) == [1.5, 0.5]
    assert harness.ratios(rates, "ours", []) == []


def test_generated_images_are_of_imagenets_size(tmp_path, monkeypatch):
    monkeypatch.setattr(input, "GENERATED", 6)
    files = input._link_images(None, tmp_path)
    encoded = {file.read_bytes() for file in files}
    sizes = {Image.open(io.BytesIO(image)).size for image in encoded}
    assert len(encoded) == 6 and sizes == {(500, 375), (500, 333), (375, 500)}
    assert 60e3 < np.mean([len(image) for image in encoded]) < 160e3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["input", "--rounds=0"], "--rounds=0 is less than 1"),
        (["input", "--cores=100000"], "--cores=100000: this process may use "),
        (["input", "--images=nowhere"], "--images=nowhere is not a folder"),
        (["input", "--images=tests/golden"], "has 0 JPEGs: at least 8 are needed"),
        (["output"], "invalid choice: 'output'"),
        ([], "arguments are required: what; see python -m benchmarks --help"),
        (["step", "--batch-size=0"], "--batch-size=0 is less than 1"),
        (["forward", "--rounds=0"], "--rounds=0 is less than 1"),
        (["forward", "--cores=100000"], "--cores=100000: this process may use "),
        (["forward", "--model=tnt_s"], "unknown model 'tnt_s'"),
        (["step", "--against=jimm"], "invalid choice: 'jimm'"),
        (["step", "--images=here"], "unrecognized arguments: --images=here"),
        (["compile", "--rounds=3"], "unrecognized arguments: --rounds=3"),
        (["input", "--rounds=few"], "invalid int value: 'few'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    assert __main__.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and message in err.splitlines()[-1]


def test_an_image_that_cannot_be_read_is_one_line(photos, monkeypatch, capfd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (photos / "below" / "3.JPEG").write_bytes(b"no image")
    assert __main__.main(["input", f"--images={photos}", "--rounds=1", "--size=16"]) == 2
    assert "is not a usable image" in capfd.readouterr().err.splitlines()[-1]


def test_sides_take_turns_and_the_first_round_does_not_count():
    calls = []
    rates = {"ours": iter([100.0, 6.0, 8.0, 9.0]), "theirs": iter([100.0, 3.0, 2.0, 9.0])}

    def run(name, task):
        calls.append((name, task))
        return next(rates[name])

    runs = {name: functools.partial(run, name) for name in rates}
    measured = harness.measure(runs, "step", 3)
    assert measured == {"ours": [6.0, 8.0, 9.0], "theirs": [3.0, 2.0, 9.0]}
    order = ["ours", "theirs", "theirs", "ours", "ours", "theirs", "theirs", "ours"]
    assert calls == [(name, "step") for name in order]


def test_the_summary_of_a_step():
    rates = {
        "ours": [2.0, 3.0, 3.0],
        "ours tuned": [4.0, 6.0, 4.0],
        "timm eager": [1.0, 2.0, 1.0],
        "timm compile": [2.0, 2.0, 4.0],
    }
    result = model.summarize("step", rates, 30e9, 240e9)
    assert result == {
        "step_vs_eager": 2.0,
        "step_vs_compile": 1.0,
        "step_vs_bfloat16": None,
        "step_tuned_vs_eager": 4.0,
        "step_tuned_vs_compile": 2.0,
        "step_tuned_vs_bfloat16": None,
        "images_per_second": dict(zip(rates, [3.0, 4.0, 1.0, 2.0], strict=True)),
        "share_of_peak": dict(zip(rates, [0.375, 0.5, 0.125, 0.25], strict=True)),
        "gflops_peak": 240.0,
        "rounds": rates,
    }


def test_macs_are_those_that_were_published():
    macs = model.count_macs(create_model("tnt_s_patch16_224"), 224)
    assert round(macs / 1e9, 1) == 5.3 and macs == 5_263_613_952


def test_compile_is_the_measure_of_its_own_file():
    args = __main__.make_parser().parse_args(["compile", "--topology=v4:2x2x1"])
    assert args.measure is tpu.measure_compile and args.topology == "v4:2x2x1"


def measure_small(*arguments):
    args = __main__.make_parser().parse_args([*arguments, "--rounds=2", "--batch-size=2"])
    return args.measure(args, image_size=32, depth=1)


def assert_describes_the_model(result, sides, rounds):
    for key in ("rounds", "images_per_second", "share_of_peak"):
        assert list(result[key]) == sides
    assert all(len(rates) == harness and min(rates) > 0 for rates in result["rounds"].values())
    assert (result["batch_size"], len(result["cores"])) == (2, 1) and result["gflops_peak"] > 0
    assert {"jax", "jaxlib", "flax", "optax"} <= result["versions"].keys()
    json.dumps(result)


@pytest.mark.parametrize(
    "task, sides",
    [
        ("forward", ["ours"]),
        pytest.param("step", ["ours", "ours tuned"], marks=pytest.mark.soak),
    ],
)
def test_our_model_alone_where_there_is_no_timm(task, sides, monkeypatch, capfd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = measure_small(task, "--model=tnt_ti_patch16_224")
    assert_describes_the_model(result, sides, 2)
    assert result[f"{task}_vs_eager"] is None and result[f"{task}_vs_compile"] is None
    err = capfd.readouterr().err
    assert "torch or timm is not installed: our figures alone" in err
    assert len(re.findall(rf"^{task} round [12]: images/s: ours [\d.]+", err, re.M)) == 2


def test_without_timm_nothing_runs_against_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--against=timm needs torch and timm: pip"):
        measure_small("forward", "--against=timm")


@pytest.mark.oracle
@pytest.mark.parametrize("task, has_bfloat16", [("forward", True), ("step", False)])
def test_our_model_beside_timms(task, has_bfloat16, monkeypatch):
    """Whether this CPU has instructions for bfloat16 or not: the small network runs either way."""
    monkeypatch.setattr(model, "has_bfloat16", lambda: has_bfloat16)
    result = measure_small(task, "--against=timm")
    hows = [how for how in model.THEIRS if has_bfloat16 or how != "bfloat16"]
    sides = [model.THEIRS[how] for how in hows]
    assert_describes_the_model(result, [*model.OURS[task].values(), *sides], 2)
    keys = [key for key in result if "_vs_" in key]
    assert len(keys) == 3 * len(model.OURS[task])
    assert all(result[key] > 0 for key in keys if has_bfloat16 or "bfloat16" not in key)


@pytest.mark.oracle
def test_a_model_that_timm_has_not_is_one_line():
    with pytest.raises(InputError, match="--model=tnt_ti_patch16_224: timm has "):
        measure_small("forward", "--model=tnt_ti_patch16_224")
