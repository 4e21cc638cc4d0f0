# SPDX-License-Identifier: Apache-2.0
"""`compile_check`: figures of programs compiled for TPUs, errors, collectives of a program."""

import functools
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest

from tnt_flax.__main__ import main
from tnt_flax.core.errors import InputError
from tnt_flax.tools import compile_check
from tnt_flax.tools.compile_check import CHIP_MEMORY, collectives, tpu_devices
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


def test_unknown_topologies_are_refused(tiny_config):
    with pytest.raises(InputError, match="--topology=h100:8: use one of v4, v5e, v5p, v6e, as in"):
        tpu_devices("h100:8")
    with pytest.raises(InputError, match="--topology=KIND:CHIPS is missing"):
        compile_check.compile_check(tiny_config, None)


def test_flops_are_those_of_a_whole_step(tiny_config):
    tiny_config.model.se = True  # the head then needs all of the last block
    flops = compile_check.train_step_flops(tiny_config, 10)
    forward = 2 * 8 * 2 * (2 * 4 * 64 * 64 + 2 * 2 * 2 * 64 + 2 * 8 * 64 * 64)  # the outer blocks
    assert 3 * forward < flops < 4 * forward  # forward and backward, and the inner blocks
    assert compile_check.train_step_flops(tiny_config, 1010) - flops == 3 * 2 * 8 * 1000 * 64


def test_collectives_of_a_compiled_program():
    """An all-reduce in a loop of five iterations, in bfloat16 or float32, and one outside of it."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"), check_vma=False
    )

    @jax.jit
    @split
    def program(x):
        body = lambda x, _: (jnp.sin(jax.lax.psum(x, "data")), None)
        x, _ = jax.lax.scan(body, x, None, 5)
        return x + jax.lax.psum(x[:, :1].astype(jnp.int32), "data")

    text = program.lower(jnp.ones((8, 16))).compile().as_text()
    in_loop, outside = collectives(text)
    assert in_loop == ("all-reduce", "f32", 1, 1, 5, 5 * 16 * 4)
    assert outside == ("all-reduce", "s32", 1, 0, 1, 4)
    assert collectives(jax.jit(jnp.sin).lower(1.0).compile().as_text()) == []


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    "topology, chips", [("v4:2x2x1", 4), ("v5e:4x4", 16), ("v5p:2x2x1", 4), ("v6e:2x2", 4)]
)
def test_a_program_larger_than_the_memory_does_not_fit(topology, chips):
    devices = tpu_devices(topology)
    assert len(devices) == len({tuple(device.coords) for device in devices}) == chips
    memory = CHIP_MEMORY[topology.partition(":")[0]]
    one = jax.sharding.SingleDeviceSharding(devices[0])
    for gib, fits in ((1, True), (memory, False)):  # as much again for the result
        x = jax.ShapeDtypeStruct((gib, 2**28), jnp.float32, sharding=one)
        compiled = compile_check.compile_for_tpu(jax.jit(lambda x: x + 1), (x,), memory)
        assert compiled.fits == fits
        assert compiled.arguments_gib == (pytest.approx(2, abs=0.1) if fits else None)


@pytest.mark.tpu_compiler
def test_a_topology_unknown_to_libtpu():
    with pytest.raises(InputError, match="--topology=v5e:3x5: JaxRuntimeError: INVALID_ARGUMENT"):
        tpu_devices("v5e:3x5")


@pytest.mark.tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2])
def test_the_command_compiles_a_training_step(root, smoke_flags, tiny_config, fsdp, capsys):
    """Four chips exchange at least the gradients, in bfloat16."""
    flags = [f"--config.{key}={value}" for key, value in (TINY | {"mesh.fsdp": fsdp}).items()]
    arguments = [f"--config={root}/configs/digits.py", *smoke_flags, *flags]
    assert main(["compile-check", *arguments, "--topology=v5e:2x2", "--classes=10"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    shapes = Experiment(tiny_config, num_classes=10, steps_per_epoch=1).state_shapes
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes.params))
    assert result["fits"] and (result["chip_gib"], result["chips"]) == (16, 4)
    assert 4 * 4 * count / fsdp / 2**30 < result["arguments_gib"] + 0.001 < 0.1
    assert sum(each["bytes"] for each in result["collectives"]) >= 2 * count / fsdp
