# SPDX-License-Identifier: Apache-2.0
"""The real training step, compiled for TPUs by libtpu where there is no TPU.

Everything here is what the compiler says. Nothing is executed, so nothing is measured. Its three
figures of time do not agree and must not be mixed:

    estimated cycles   of every instruction of the optimized HLO but kernels written in Pallas;
                       reductions are priced several times too high
    bundles            instructions that a kernel issues, without waits: a lower bound
    optimal seconds    not used here: it counts minus one second for what it cannot price
"""

import contextlib
import importlib.util
import math
import multiprocessing
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError, one_line
from tnt_flax.runtime import sharding
from tnt_flax.tools import hlo
from tnt_flax.tools.contractions import count_macs
from tnt_flax.training.experiment import Experiment

GIB = 2**30


class Chip(NamedTuple):
    """One kind of TPU."""

    gib: float  # of memory on a chip, by cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e
    usable_gib: float  # what the compiler (libtpu 0.0.52) lets the program of a device use
    options: dict[str, str] = {}


# Without its option v4 is described as two devices a chip, each with half of the memory.
CHIPS = {
    "v4": Chip(32, 30.75, {"chip_config_name": "megacore"}),
    "v5e": Chip(16, 15.75),
    "v5p": Chip(95, 95.73),
    "v6e": Chip(32, 31.24),
}


class Compiled(NamedTuple):
    """What the compiler says of one program, for each chip."""

    fits: bool
    temporaries_gib: float
    arguments_gib: float | None  # None where it does not fit
    compile_s: float
    hlo: str | None  # the optimized program


def devices(topology: str) -> tuple[Chip, list[Any]]:
    """The chips of a topology such as "v5e:4x4", as devices to compile for.

    Raises:
        InputError: libtpu is not installed, or it knows no such topology.
    """
    if not importlib.util.find_spec("libtpu"):
        raise InputError('compiling for TPUs needs libtpu: pip install "tnt_flax[tpu]"')
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise InputError(f"--topology={topology}: use one of {', '.join(CHIPS)}, as in v5e:4x4")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for the machine's TPUs
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it would lock out other processes
    chip = CHIPS[kind]
    try:
        found = topologies.get_topology_desc(topology, "tpu", **chip.options)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--topology={topology}: {one_line(error)}") from None
    return chip, list(found.devices)


def compile_train_step(config: ConfigDict, num_classes: int, topology: str) -> Compiled:
    """Compiles the step that `config` describes, as the trainer jits it, for a whole topology.

    Raises:
        InputError: see `devices`; or the config is wrong.
    """
    chip, chips = devices(topology)
    experiment = Experiment(config, devices=chips, num_classes=num_classes, steps_per_epoch=1)
    return compile_for(chip, experiment.train_step, step_shapes(experiment))


def train_step_flops(config: ConfigDict, num_classes: int) -> int:
    """Of the matrix products of a whole step in its plain form, none of them computed twice."""
    config = config.copy_and_resolve_references()
    config.model.update(inner_impl="reference", outer_impl="reference", remat="none")
    step, arguments = train_step(config, num_classes)
    return 2 * count_macs(step, *arguments)


def train_step(config: ConfigDict, num_classes: int) -> tuple[Callable, tuple]:
    """The step that `config` describes, not yet jitted, and the shapes of its arguments."""
    experiment = Experiment(config, num_classes=num_classes, steps_per_epoch=1)
    return experiment.make_train_step(), step_shapes(experiment)


def step_shapes(experiment: Experiment) -> tuple[Any, ...]:
    """The shapes of the train step's arguments: state, batch, key."""
    config = experiment.config
    size = config.data.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
    _, step_key = jax.eval_shape(experiment.make_keys)
    return experiment.state_shapes, batch, step_key


def compile_for(chip: Chip, jitted: Callable, arguments: tuple) -> Compiled:
    """Compiles a jitted function, whose shardings are on devices of this kind."""
    lowered = jitted.trace(*arguments).lower(lowering_platforms=("tpu",))
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", str(error))
        if not needed:
            raise
        gib = float(needed[1]) * 1024.0 ** ("KMGT".index(needed[2]) - 2)
        return Compiled(False, gib, None, time.perf_counter() - start, None)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    # Outputs lie where the donated arguments were; those that do not are `output - alias`.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    held = memory.argument_size_in_bytes + results + memory.generated_code_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    fits = held + temporaries <= chip.usable_gib * GIB
    return Compiled(fits, temporaries / GIB, held / GIB, seconds, compiled.as_text())


# ---------------------------------------------------------------------------- bundles of a kernel


def count_bundles(
    make: Callable[[], tuple[Callable, tuple]], topology: str, *, within: str = ""
) -> int:
    """Instruction bundles that one chip issues for a function, by the compiler's final schedule.

    Of all instructions, or of those whose `jax.named_scope` has `within` in it. `make()` returns
    the function and the shapes of its arguments; it is called in a new process, whose compiler
    writes its schedules to a temporary folder (up to a gigabyte). A loop counts as often as its
    grid says; loops inside of kernels count once.
    """
    devices(topology)  # errors come from here
    with tempfile.TemporaryDirectory(prefix="tnt_flax_bundles_") as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        changed = {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
        with _environment(changed):
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                text, grids = pool.submit(_compile_alone, make, topology).result()
        schedules = [
            path.read_text(errors="replace")
            for path in pathlib.Path(folder).glob("*-schedule-analysis_final_bundles.txt")
        ]
    return scheduled_bundles(text, schedules, grids, within)


def _compile_alone(make, topology):
    """The optimized HLO, and how often each kernel's body runs."""
    _, chips = devices(topology)
    function, shapes = make()
    mesh = sharding.make_mesh(chips[:1])
    everywhere = sharding.replicated(mesh)
    with jax.set_mesh(mesh):
        jitted = jax.jit(function, in_shardings=everywhere, out_shardings=everywhere)
        traced = jitted.trace(*shapes)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    return compiled.as_text(), list(_grids(traced.jaxpr.jaxpr))


def _grids(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield math.prod(equation.params["grid_mapping"].grid)
            continue
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _grids(inner)


def scheduled_bundles(text: str, schedules: list[str], grids: list[int], within: str = "") -> int:
    """The bundles of the instructions of the program `text`, times their iterations.

    `schedules` are the compiler's analyses, `grids` the iterations of the Pallas kernels in order.
    """
    static = {}
    for schedule in schedules:
        for count, name in re.findall(
            r"^\s*([\d.]+) scheduled bundles \([\d.]+%\): %([\w.\-]+) = ", schedule, re.MULTILINE
        ):
            static[name] = max(static.get(name, 0), float(count))
    total, grids = 0, iter(grids)
    for run in hlo.instructions(text):
        if run.fused:
            continue
        count = static.get(run.name, 0)
        if run.is_kernel:
            iterations = next(grids)
            # One that is started from several places is compiled, and listed, once.
            kernel = run.name.rpartition(".")[0]
            alike = [n for name, n in static.items() if name.rpartition(".")[0] == kernel]
            count = count or max(alike, default=0)
        else:
            bounds = re.search(r'"iteration_bounds":\[([^\]]*)\]', run.text)
            iterations = math.prod(int(n) for n in re.findall(r"\d+", bounds[1])) if bounds else 1
        scope = re.search(r'op_name="([^"]*)"', run.text)
        if within in (scope[1] if scope else ""):
            total += run.times * iterations * count
    return round(total)


@contextlib.contextmanager
def _environment(changed: dict[str, str]):
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
