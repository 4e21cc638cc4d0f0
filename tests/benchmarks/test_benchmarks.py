# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run at the smallest sizes and report what they ran. No test depends on a time."""

import contextlib
import functools
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import __main__, gpu, harness, input, model, run
from tests.helpers.smoke import SMOKE
from tnt_flax.core.errors import InputError, RunError
from tnt_flax.models import create_model


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "below").mkdir()
    for i in range(9):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "below" / f"{i}.JPEG")
    return tmp_path


@pytest.fixture
def without_timm(monkeypatch):
    monkeypatch.setattr(harness, "has_timm", lambda: False)


def measure(*arguments, **options):
    args = __main__.make_parser(arguments[0]).parse_args(arguments)
    result = __main__.measure(args, **options)
    return json.loads(json.dumps(result))


def test_input_without_timm(photos, without_timm, capfd):
    assert __main__.main(["input", f"--images={photos}", "--rounds=2", "--image-size=16"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["images_per_second"]["train"]["ours"] > 0 and result["train"] is None
    assert (result["images"], result["batch_size"], len(result["cores"])) == (9, 8, 1)
    assert {"numpy", "pillow", "grain"} <= result["versions"].keys()
    (photos / "below" / "3.JPEG").write_bytes(b"no image")
    assert __main__.main(["input", f"--images={photos}", "--rounds=1", "--image-size=16"]) == 2
    assert "is not a usable image" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_sources():
    result = measure("sources", "--records=1000000", "--files=50", "--images=210")
    assert result["plan"]["rows"] == 64 and result["folder"]["files"] == 50
    read, kilobytes = result["parquet"]["kilobytes_read"], result["parquet"]["kilobytes"]
    assert read["index"] < 2.5 * kilobytes < read["row_groups"] / 10


@pytest.mark.oracle
def test_input_relative_to_timm(photos):
    result = measure("input", f"--images={photos}", "--rounds=2", "--image-size=32")
    for task in input.TASKS:
        assert list(result["images_per_second"][task]) == ["ours", "timm"]
        assert len(result["rounds"][task]) == 2 and result[task] > 0


def test_generated_photos_have_the_sizes_of_imagenet(tmp_path, monkeypatch):
    monkeypatch.setattr(input, "GENERATED", 6)
    files = input.link_images(None, tmp_path)
    encoded = {file.read_bytes() for file in files}
    sizes = {Image.open(io.BytesIO(image)).size for image in encoded}
    assert len(encoded) == 6 and sizes == {(500, 375), (500, 333), (375, 500)}
    assert 60e3 < np.mean([len(image) for image in encoded]) < 160e3


TINY = dict(image_size=32, depth=1, outer_dim=24, inner_dim=4, outer_heads=2, inner_heads=2)
TINY_PYRAMID = dict(outer_dim=8, inner_dim=2, outer_heads=2, inner_heads=1, depths=(1, 1, 1, 1))


@pytest.fixture
def unoptimized(monkeypatch):
    """Compiles without optimization in the measured processes, too, and shrinks the peak."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setattr(model, "PEAK_TRIES", 1)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["forward", "step"])
def test_model_without_timm(command, without_timm, unoptimized):
    options = ["--model=tnt_ti_patch16_224", "--rounds=1", "--batch-size=2"]
    result = measure(command, *options, **TINY)
    assert list(result["rounds"]) == list(model.OURS[command]) and result["gflops_peak"] > 0
    assert result[f"{command}_vs_eager"] is None
    assert result["share_of_peak"].keys() == result["rounds"].keys()
    with pytest.raises(InputError, match="--against=timm needs torch and timm: pip"):
        measure("forward", "--against=timm", **TINY)


@pytest.mark.oracle
@pytest.mark.parametrize("command", ["forward", "step"])
def test_model_relative_to_timm(command, unoptimized, monkeypatch):
    if command == "step":  # torch compiles the forward pass in the other case
        monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    small = dict(image_size=32, depth=1)  # arguments of both libraries
    result = measure(command, "--against=timm", "--rounds=1", "--batch-size=2", **small)
    assert result[f"{command}_vs_eager"] > 0 and result[f"{command}_vs_compile"] > 0
    with pytest.raises(InputError, match="--model=tnt_ti_patch16_224: timm has "):
        measure(command, "--model=tnt_ti_patch16_224", **TINY)


@pytest.mark.slow
def test_inference(without_timm, unoptimized, monkeypatch):
    monkeypatch.setattr(model, "has_bfloat16", lambda: False)
    options = ["--model=ptnt_ti_patch16_192", "--rounds=1", "--batch-sizes", "3", "1"]
    result = measure("inference", *options, image_size=64, **TINY_PYRAMID)
    assert list(result["images_per_second"]) == ["1", "3"] and result["batch_sizes"] == [1, 3]
    assert 0 < result["latency_ms"]["ours"]["median"] <= result["latency_ms"]["ours"]["p95"]


HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("grain", "clu", "ml_collections", "tensorflow_datasets"):
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Hidden())
"""
GPU_BENCHMARK = """
import json
from benchmarks import __main__

if __name__ == "__main__":
    command = "gpu --platform=cpu --forward 1 --step 2 --rounds=1 --implementations gpu"
    args = __main__.make_parser("gpu").parse_args(command.split())
    print(json.dumps(__main__.measure(args, image_size=32, depth=1)))
"""
SELFTEST = """
import sys
from tnt_flax.__main__ import main
from tnt_flax.tools import selftest

names = ("reference", "inner=gpu", "inner=mosaic")
selftest.IMPLEMENTATIONS = {name: selftest.IMPLEMENTATIONS[name] for name in names}
selftest.COMPARED = {"depth": 1, "batch_size": 2}
sys.exit(main(["selftest", *sys.argv[1:]]))
"""


@pytest.mark.oracle
def test_a_gpus_commands_need_no_packages_that_train_from_files(root, tmp_path):
    """Neither in their own process nor in those that are measured."""
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    (tmp_path / "benchmark.py").write_text(GPU_BENCHMARK)
    (tmp_path / "selftest.py").write_text(SELFTEST)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, root)))}

    def run(script, *options, **variables):
        command = [sys.executable, str(tmp_path / script), *options]
        ended = subprocess.run(
            command, env=env | variables, cwd=root, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout.splitlines()[-1])

    measured = run("benchmark.py", TORCH_COMPILE_DISABLE="1", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    small = ["--model=tnt_ti_patch16_224", "--image-size=32", "--depth=1", "--batch-size=1"]
    tested = run("selftest.py", *small, "--rounds=1")
    assert tested["passed"] and list(measured["tasks"]) == ["forward 1", "step 2"]
    for table in measured["tasks"].values():
        assert list(table["rounds"]) == ["ours gpu", "timm eager", "timm compile"]
        assert not table["errors"] and all(x > 0 for x in table["compile_s"].values())
    ratios = measured["tasks"]["step 2"]["ratios"]
    assert measured["step_vs_compile"] == ratios["ours gpu / timm compile"] > 0


def test_a_contender_that_fails_on_a_gpu_does_not_end_the_others(monkeypatch):
    @contextlib.contextmanager
    def processes(contenders, cores):
        del cores
        yield dict(contenders)

    monkeypatch.setattr(harness, "processes", processes)
    run = lambda what: {"compile": 2.0, "run": 8.0, "peak": 3.0}[what]

    def fail(what):
        if what == "run":
            raise RunError("out of memory")
        return run(what)

    contenders = {"ours reference": fail, "ours gpu": run, "timm compile": run}
    table = gpu.measure_task("step 2", contenders, 1)
    assert table["errors"] == {"ours reference": "out of memory"}
    assert table["images_per_second"] == {"ours gpu": 8.0, "timm compile": 8.0}
    assert table["ratios"] == {"ours gpu / timm compile": 1.0}
    assert gpu.headline({"step 2": table}, [], [2]) == {
        "step_vs_eager": None,
        "step_vs_compile": 1.0,
    }


def test_summaries():
    rates = {"ours": [2.0, 3.0, 3.0], "ours tuned": [4.0, 6.0, 4.0], "timm eager": [1.0, 2.0, 1.0]}
    result = model.summarize("step", rates, 30e9, 240e9)
    ratios = {key: value for key, value in result.items() if "_vs_eager" in key}
    assert ratios == {"step_vs_eager": 2.0, "step_tuned_vs_eager": 4.0}
    assert result["step_vs_bfloat16"] is None and result["share_of_peak"]["ours"] == 0.375
    latencies = {"ours": [[10, 10, 10, 90], [20] * 4], "timm eager": [[20] * 4, [40] * 4]}
    result = model.summarize_inference(latencies, {8: {"ours": [2.0], "timm eager": [1.0]}})
    assert result["latency_ms"]["ours"] == {"median": 20.0, "p95": pytest.approx(65.5)}
    assert result["ours_vs_eager"] == {"latency": 2.0, "8": 2.0}


def test_macs_equal_the_published_count():
    macs = model.count_macs(create_model("tnt_s_patch16_224"), 224)
    assert round(macs / 1e9, 1) == 5.3 and macs == 5_263_613_952


def test_contenders_alternate_and_the_first_round_does_not_count():
    calls, results = [], {"ours": iter([100.0, 6.0, 8.0]), "theirs": iter([100.0, 3.0, 2.0])}

    def call(name):
        calls.append(name)
        return next(results[name])

    functions = {name: functools.partial(call, name) for name in results}
    rates = harness.alternate(functions, 2, "images/s")
    assert rates == {"ours": [6.0, 8.0], "theirs": [3.0, 2.0]}
    assert calls == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert harness.ratios(rates, "ours", ["theirs"]) == [2.0, 4.0]
    assert harness.ratios(rates | {"x": [6.0, 1.0]}, "ours", ["theirs", "x"]) == [1.0, 4.0]
    assert harness.ratios(rates, "ours", []) == []


MAIN = """
import sys, jax, jax.numpy as jnp
if len(sys.argv) > 1:
    print("error: it cannot", file=sys.stderr)
    sys.exit(int(sys.argv[1]))
jax.jit(jax.jit(lambda x: x + 1))(jnp.ones(3)).block_until_ready()
print("step 1/9  loss 2", "step 2/9", sep=chr(10), file=sys.stderr, flush=True)
import time; time.sleep(600)
"""


def test_start_ends_the_run_after_its_first_step(root, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no main.py here"):
        measure("start")
    (tmp_path / "main.py").write_text(MAIN)
    cores = harness.pick_cores(1)
    cost = run.start([], tmp_path / "cache", cores)
    assert 0 < cost["compile_s"] < cost["seconds"] and cost["peak_gib"] > 0.01
    with pytest.raises(RunError, match="main.py ended before its first step: error: it cannot"):
        run.start(["1"], tmp_path / "cache", cores)
    with pytest.raises(InputError, match="^it cannot"):
        run.start(["2"], tmp_path / "cache", cores)


@pytest.mark.slow
def test_loop(root, monkeypatch):
    monkeypatch.chdir(root)
    changes = [f"{key}={value}" for key, value in SMOKE.items()]
    options = ["--config=configs/digits.py", "--batch-size=480", "--rounds=1"]
    result = measure("loop", *options, "--set", *changes)
    assert result["loop_vs_bare"] > 0 and result["steps_per_second"].keys() == {"loop", "bare"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["output"], "invalid choice: 'output'"),
        ([], "arguments are required: COMMAND; see python -m benchmarks --help"),
        (["input", "--rounds=0"], "argument --rounds: '0' is not a positive integer"),
        (["input", "--cores=100000"], "--cores=100000: this process may use "),
        (["input", "--images=nowhere"], "--images=nowhere is not a folder"),
        (["input", "--images=tests/goldens"], "has 0 JPEGs: at least 8 are needed"),
        (["forward", "--model=tnt_s"], "unknown model 'tnt_s'"),
        (["step", "--against=jimm"], "invalid choice: 'jimm'"),
        (
            ["inference", "--batch-sizes", "8", "0"],
            "argument --batch-sizes: '0' is not a positive integer",
        ),
        (["start", "--config=nowhere.py"], "there is no config file nowhere.py"),
        (["loop", "--set", "nothing=3"], "the config has no key 'nothing'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(root)
    assert __main__.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.splitlines()[-1].startswith("error: ")
    assert message in err.splitlines()[-1]
