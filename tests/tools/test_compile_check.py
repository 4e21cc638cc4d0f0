# SPDX-License-Identifier: Apache-2.0
"""`compile_check`: figures of programs compiled for GPUs and TPUs, and errors."""

import importlib.util
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tnt_flax.__main__ import main
from tnt_flax.core.errors import InputError
from tnt_flax.tools import compile_check
from tnt_flax.tools.targets import (
    GIB,
    GPUS,
    TPUS,
    Target,
    describe_gpu,
    find_target,
    tpu_devices,
)
from tnt_flax.training.experiment import Experiment

TINY = {  # eight images of one sentence
    "batch_size": 8,
    "data.image_size": 16,
    "model.depth": 2,
    "model.outer_dim": 64,
    "model.outer_heads": 1,
    "model.inner_dim": 4,
    "model.inner_heads": 2,
}


@pytest.fixture
def tiny_config(smoke_config):
    config = smoke_config()
    config.update_from_flattened_dict(TINY)
    return config


def test_without_libtpu_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'needs libtpu: pip install "tnt_flax\[tpu\]"$'):
        tpu_devices("v5e:2x2")


def test_unknown_devices_are_refused(root, capsys):
    for device in ("h100:8", "v5e", "gtx1080"):
        message = rf"--device={device}: use a GPU \(a100, .* such as h100 or"
        with pytest.raises(InputError, match=message):
            find_target(device)
    with pytest.raises(InputError, match="has its number of chips: leave out --devices"):
        find_target("v5e:2x2", 4)
    assert main(["compile-check", f"--config={root}/configs/digits.py"]) == 2
    assert "--device is missing, for instance --device=h100" in capsys.readouterr().err


@pytest.mark.parametrize("name", GPUS)
def test_descriptions_of_gpus(name):
    """XLA wants every field; a card's products per byte are those of a data sheet."""
    text = describe_gpu(GPUS[name])
    assert f"device_memory_size: {GPUS[name].memory}000000000\n" in text
    assert text.count("{") == text.count("}") == 3
    assert 100 < GPUS[name].tflops / GPUS[name].bandwidth < 450


@pytest.mark.slow
def test_flops_are_those_of_a_whole_step(tiny_config):
    tiny_config.model.se = True  # the head then needs all of the last block
    flops = compile_check.train_step_flops(tiny_config, 10)
    forward = 2 * 8 * 2 * (2 * 4 * 64 * 64 + 2 * 2 * 2 * 64 + 2 * 8 * 64 * 64)  # the outer blocks
    assert 3 * forward < flops < 4 * forward  # forward and backward, and the inner blocks
    assert compile_check.train_step_flops(tiny_config, 1010) - flops == 3 * 2 * 8 * 1000 * 64


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    "topology, chips", [("v4:2x2x1", 4), ("v5e:4x4", 16), ("v5p:2x2x1", 4), ("v6e:2x2", 4)]
)
def test_a_program_larger_than_the_memory_does_not_fit(topology, chips):
    devices = tpu_devices(topology)
    assert len(devices) == len({tuple(device.coords) for device in devices}) == chips
    target = find_target(topology)
    memory = TPUS[topology.partition(":")[0]]
    assert target.memory == memory * GIB
    one = jax.sharding.SingleDeviceSharding(devices[0])
    for gib, fits in ((1, True), (memory, False)):  # as much again for the result
        x = jax.ShapeDtypeStruct((gib, 2**28), jnp.float32, sharding=one)
        compiled = compile_check.compile_for(target, jax.jit(lambda x: x + 1), (x,))
        assert compiled.fits == fits
        assert compiled.arguments_gib == (pytest.approx(2, abs=0.1) if fits else None)


def test_a_step_that_does_not_fit_comes_with_the_accumulate_that_does(
    tiny_config, monkeypatch, capsys
):
    monkeypatch.setattr(Experiment, "jit_train_step", lambda self, count=1: count)
    figures = lambda target, step, arguments: compile_check.Compiled(step >= 3, 1.0, 2.0, 0.0, "")
    monkeypatch.setattr(compile_check, "compile_for", figures)
    target = Target(jax.devices("cpu")[:2], "cpu", GIB)
    tiny_config.batch_size = 16
    result = compile_check.compile_check(tiny_config, target, classes=10)
    assert not result["fits"] and result["accumulate"] == 4
    assert "DOES NOT FIT\n  accumulate=4 is the smallest that fits" in capsys.readouterr().out


@pytest.mark.tpu_compiler
def test_a_topology_unknown_to_libtpu():
    with pytest.raises(InputError, match="--device=v5e:3x5: JaxRuntimeError: INVALID_ARGUMENT"):
        tpu_devices("v5e:3x5")


@pytest.mark.tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2])
def test_the_command_compiles_a_training_step(root, smoke_flags, tiny_config, fsdp, capsys):
    """Four chips exchange at least the gradients, in bfloat16."""
    flags = [f"--config.{key}={value}" for key, value in (TINY | {"mesh.fsdp": fsdp}).items()]
    arguments = [f"--config={root}/configs/digits.py", *smoke_flags, *flags]
    assert main(["compile-check", *arguments, "--device=v5e:2x2", "--classes=10"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    shapes = Experiment(tiny_config, num_classes=10, steps_per_epoch=1).state_shapes
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes.params))
    assert result["fits"] and (result["device_gib"], result["devices"]) == (16, 4)
    assert 4 * 4 * count / fsdp / 2**30 < result["arguments_gib"] + 0.001 < 0.1
    assert sum(each["bytes"] for each in result["collectives"]) >= 2 * count / fsdp


@pytest.mark.gpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "device, program, impl", [("h100", "step", "gpu"), ("a100", "forward", "reference")]
)
def test_the_command_compiles_for_gpus(root, cuda_plugin, smoke_flags, device, program, impl):
    """Two cards exchange at least the gradients; kernels move at least the weights."""
    flags = [f"--config.{key}={value}" for key, value in TINY.items()]
    flags += [f"--config.model.{kind}_impl={impl}" for kind in ("inner", "outer")]
    options = [f"--device={device}", "--devices=2", f"--program={program}", "--classes=10"]
    command = ["compile-check", f"--config={root}/configs/digits.py", *smoke_flags, *flags]
    ended = subprocess.run(
        [sys.executable, "-m", "tnt_flax", *command, *options],
        env=cuda_plugin,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["fits"] and result["devices"] == 2 and result["images_per_device"] == 4
    assert 10 < result["library_calls"] < result["kernels"] < 3000
    moved, flops = result["gigabytes"] * 1e9, result["teraflops"] * 1e12
    least = moved / (GPUS[device].bandwidth * 1e12) * 1e3
    assert least <= result["roofline_ms"] * 1.01 and flops > 0
    gradients = [each for each in result["collectives"] if each["kind"] == "all-reduce"]
    assert bool(gradients) == (program == "step")
