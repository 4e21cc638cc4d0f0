# SPDX-License-Identifier: Apache-2.0
"""What the TPU compiler says reaches the tables; with libtpu, that it says it of the real step."""

import functools
import importlib.util
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from benchmarks import tpu
from tests.tools.test_hlo import TPU
from tnt_flax.core.errors import InputError
from tnt_flax.tools import compile_check, tpu_compiler

LIBTPU = importlib.util.find_spec("libtpu")
needs_libtpu = pytest.mark.skipif(not LIBTPU, reason="libtpu is not installed")
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


# -------------------------------------------------------------------------------- without libtpu


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'needs libtpu: pip install "tnt_flax\[tpu\]"$'):
        tpu_compiler.devices("v5e:2x2")


def test_an_unknown_kind_of_chip(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(InputError, match="--topology=h100:8: use one of v4, v5e, v5p, v6e, as in"):
        tpu_compiler.devices("h100:8")


def test_the_topology_is_asked_for(tiny_config):
    with pytest.raises(InputError, match="--topology=KIND:CHIPS is missing"):
        compile_check.compile_check(tiny_config, None)


class Program:
    """A jitted function, traced, lowered and compiled, of which the compiler says `memory`."""

    def __init__(self, memory):
        self.memory = memory

    def trace(self):
        return self

    def lower(self, lowering_platforms):
        return self

    def compile(self):
        if isinstance(self.memory, str):
            raise jax.errors.JaxRuntimeError(self.memory)
        return self

    def memory_analysis(self):
        names = ("argument", "output", "alias", "generated_code", "temp")
        sizes = (int(gib * 2**30) for gib in self.memory)
        return types.SimpleNamespace(
            **{f"{name}_size_in_bytes": size for name, size in zip(names, sizes, strict=True)}
        )

    def as_text(self):
        return TPU


def test_what_does_not_fit_is_no_error():
    """In the words of libtpu 0.0.52."""
    said = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (37.70G) exceeds available HBM (15.75G). HLO module: jit_f."
    )
    found = tpu_compiler.compile_for(tpu_compiler.CHIPS["v5e"], Program(said), ())
    assert (found.fits, found.temporaries_gib, found.arguments_gib) == (False, 37.7, None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        tpu_compiler.compile_for(tpu_compiler.CHIPS["v5e"], Program("INTERNAL: a bug"), ())


@pytest.mark.parametrize("temporaries, fits", [(9.5, True), (10.5, False)])
def test_all_that_a_program_holds_has_to_fit(temporaries, fits):
    """Of the results, 4 GiB lie where the arguments were."""
    memory = Program((5, 4.25, 4, 0.5, temporaries))
    found = tpu_compiler.compile_for(tpu_compiler.CHIPS["v5e"], memory, ())
    assert found[:3] == (fits, temporaries, 5.75) and found.hlo == TPU


def test_bundles_times_iterations():
    """A fusion of 3 x 2 windows and a kernel with a grid of 5, in loops of 12 turns and of one."""
    schedules = [
        "Schedule analysis:\n\ttotal scheduled bundles:    9\n"
        "\t7.00 scheduled bundles (77.00%): %fusion.1 = f32[8]{0} fusion(...)\n",
        "\t11.00 scheduled bundles (100.00%): %kernel.1 = f32[8]{0} custom-call(...)\n"
        "\t[opcode]    11 scheduled bundles (100.00%): custom-call (1 instances)\n",
    ]
    count = functools.partial(tpu_compiler.scheduled_bundles, TPU, schedules, [5, 5])
    assert count() == 13 * (6 * 7 + 5 * 11)
    another = TPU.replace("%kernel.1 =", "%kernel.2 =")  # of the same kernel, compiled once
    again = tpu_compiler.scheduled_bundles(another, schedules, [5, 5], "/inner/pallas")
    assert again == 13 * 5 * 11
    assert count(within="/inner/pallas") == 13 * 5 * 11
    assert count(within="/outer/") == 0


def test_operations_are_those_of_the_whole_step(tiny_config):
    tiny_config.model.se = True  # so that the last block is computed as a whole
    flops = tpu_compiler.train_step_flops(tiny_config, 10)
    forward = 2 * 8 * 2 * (2 * 4 * 64 * 64 + 2 * 2 * 2 * 64 + 2 * 8 * 64 * 64)  # the outer blocks
    assert 3 * forward < flops < 4 * forward  # forward, two products backward; the inner blocks
    assert tpu_compiler.train_step_flops(tiny_config, 1010) - flops == 3 * 2 * 8 * 1000 * 64


def test_a_config_that_is_none():
    with pytest.raises(InputError, match="--config=nowhere.py is no config to read: FileNotFound"):
        tpu.make_config("nowhere.py", {}, 8)


def test_the_benchmark_changes_the_fields_that_it_compares(root, monkeypatch):
    monkeypatch.syspath_prepend(root)
    config = tpu.make_config(str(root / "configs" / "tnt_s.py"), {"depth": 1}, 8)
    assert (config.model.depth, config.batch_size) == (1, 8)
    function, shapes = tpu.make_forward(str(root / "configs" / "tnt_s.py"), {})
    assert jax.eval_shape(function, *shapes).shape == (128, 1000)
    step, (_, batch, _) = tpu.make_step(str(root / "configs" / "tnt_s.py"), {})
    assert step.__name__ == "train_step" and batch["image"].shape == (128, 224, 224, 3)
    assert "reference" in tpu.IMPLEMENTATIONS


def test_the_benchmark_compares_the_implementations(root, monkeypatch):
    asked = []

    def compile_step(args, fields, images):
        asked.append((fields["inner_impl"], images))
        return {"fits": images < 2000, "kernel_calls": 9 * (fields["inner_impl"] == "pallas")}

    monkeypatch.setattr(tpu_compiler, "devices", lambda topology: (None, range(4)))
    monkeypatch.setattr(tpu_compiler, "count_bundles", lambda make, topology, within: within)
    monkeypatch.setattr(tpu, "compile_step", compile_step)
    monkeypatch.syspath_prepend(root)
    run = lambda name: tpu.measure_compile(
        types.SimpleNamespace(
            config=str(root / "configs" / name),
            topology="v5e:2x2",
            implementations=["lanes", "pallas"],
        )
    )
    found = run("tnt_s.py")
    assert asked == [("lanes", 512), ("pallas", 512), ("pallas", 2048)]
    assert found["pallas"]["fits"] and not found["fits_512"]
    bundles = ("inner_bundles", "kernel_bundles")
    assert [found["lanes"][key] for key in bundles] == ["/inner/", 0]
    assert [found["pallas"][key] for key in bundles] == ["/inner/", "/pallas_call"]
    with pytest.raises(InputError, match=r"ptnt_s_patch16_256 has no implementations to compare"):
        run("ptnt_s.py")


# ----------------------------------------------------------------------------------- with libtpu


@pytest.mark.tpu_compiler
@pytest.mark.slow
@needs_libtpu
def test_the_command_compiles_the_real_step(root, smoke_flags):
    flags = [f"--config.{key}={value}" for key, value in TINY.items()]
    arguments = ["--config=configs/digits.py", *smoke_flags, *flags, "--topology=v5e:2x2"]
    run = subprocess.run(
        [sys.executable, "-m", "tnt_flax.tools.compile_check", *arguments, "--classes=10"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["fits"] and (result["chip_gib"], result["chips"]) == (16, 4)
    assert 0 < result["temporaries_gib"] < 0.1
    (exchange,) = result["collectives"]
    assert (exchange["kind"], exchange["dtype"]) == ("all-reduce", "f32")
    assert (exchange["in_loops"], exchange["executed"]) == (0, 1)


@pytest.mark.tpu_compiler
@pytest.mark.slow
@needs_libtpu
def test_what_chips_exchange_under_a_mesh(tiny_config):
    """Weights once before the loop over the blocks, gradients once after it, in bfloat16."""
    tiny_config.update_from_flattened_dict(
        {"model.depth": 4, "mesh.fsdp": 2, "mesh.gradient_dtype": "bfloat16"}
    )
    exchanges = compile_check.compile_check(tiny_config, "v5e:2x2", 10)["collectives"]
    assert not any(each["in_loops"] for each in exchanges)
    largest = max(exchanges, key=lambda each: each["bytes"] * (each["kind"] != "all-gather"))
    assert largest["dtype"] == "bf16"
    assert sum(each["executed"] for each in exchanges) < 40


@pytest.mark.tpu_compiler
@needs_libtpu
@pytest.mark.parametrize(
    "topology, chips", [("v4:2x2x1", 4), ("v5e:4x4", 16), ("v5p:2x2x1", 4), ("v6e:2x2", 4)]
)
def test_the_memory_of_every_chip_is_what_the_compiler_says(topology, chips):
    chip, devices = tpu_compiler.devices(topology)
    assert len(devices) == len({tuple(device.coords) for device in devices}) == chips
    one = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((2**26, 1024), jnp.float32, sharding=one)
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"HBM \({chip.usable_gib}G\)"):
        jax.jit(lambda x: x + 1).lower(x).compile()


@pytest.mark.tpu_compiler
@needs_libtpu
def test_a_topology_that_libtpu_does_not_know():
    with pytest.raises(InputError, match="--topology=v5e:3x5: JaxRuntimeError: INVALID_ARGUMENT"):
        tpu_compiler.devices("v5e:3x5")


def add_one(grid):
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] + 1

    def function(x):
        block = pl.BlockSpec((8, 128), lambda i: (i, 0))
        return pl.pallas_call(kernel, out_shape=x, grid=(grid,), in_specs=[block], out_specs=block)(
            x
        )

    return function, (jax.ShapeDtypeStruct((8 * grid, 128), jnp.float32),)


@pytest.mark.tpu_compiler
@pytest.mark.slow
@needs_libtpu
def test_a_kernels_bundles_grow_with_its_grid():
    few, many = (
        tpu_compiler.count_bundles(functools.partial(add_one, grid), "v5e:2x2") for grid in (2, 6)
    )
    assert 0 < few and many == pytest.approx(3 * few, rel=0.5)
