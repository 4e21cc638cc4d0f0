# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs and says what it ran. No test here knows how long anything takes."""

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

from tnt_flax.tools import benchmark

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="the benchmark needs Linux"
)


def run(root, *arguments):
    command = [sys.executable, "-m", "tnt_flax.tools.benchmark", *map(str, arguments)]
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
        assert len(result["rounds"][task]) == (rounds if len(sides) > 1 else 0)
        assert (result[task] is None) == (len(sides) == 1)
    assert (result["images"], result["batch_size"], len(result["cores"])) == (9, 8, 1)
    assert {"numpy", "pillow", "grain"} <= result["versions"].keys()


def test_ours_alone_where_there_is_no_torch(photos, monkeypatch, capfd):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    assert benchmark.main(["input", f"--images={photos}", "--rounds=2", "--size=16"]) == 0
    out, err = capfd.readouterr()
    assert_describes_the_rounds(json.loads(out.splitlines()[-1]), 2, ["ours"])
    assert "torch or timm is not installed: our figures alone" in err
    assert len(re.findall(r"^\w+ round [12]: images/s: ours \d+$", err, re.M)) == 6


def test_without_opencv_there_is_no_figure_of_it(photos, monkeypatch, capfd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert benchmark.main(["input", f"--images={photos}", "--rounds=1", "--size=16"]) == 0
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
    assert benchmark._ratios(rates) == [2.0, 1.0]


def test_generated_images_are_of_imagenets_size(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "GENERATED", 6)
    files = benchmark._link_images(None, tmp_path)
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
        (["input", "--rounds=few"], "invalid int value: 'few'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    assert benchmark.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and message in err.splitlines()[-1]


def test_an_image_that_cannot_be_read_is_one_line(photos, monkeypatch, capfd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (photos / "below" / "3.JPEG").write_bytes(b"no image")
    assert benchmark.main(["input", f"--images={photos}", "--rounds=1", "--size=16"]) == 2
    assert "is not a usable image" in capfd.readouterr().err.splitlines()[-1]
