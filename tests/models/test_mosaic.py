# SPDX-License-Identifier: Apache-2.0
"""The fused inner block for Hopper GPUs: interpreted on a CPU, and compiled for an H100."""

import pathlib
import re
import subprocess
import sys

import pytest

from tests.helpers import networks
from tests.helpers.networks import check_same, training_value_and_gradients
from tnt_flax.core.errors import InputError
from tnt_flax.models import VARIANTS
from tnt_flax.models.kernels import mosaic, mosaic_tiles, select


@pytest.fixture
def interpreted(monkeypatch):
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    monkeypatch.setattr(mosaic_tiles, "INTERPRET", InterpretGPUParams())
    monkeypatch.setattr(mosaic_tiles, "CORES", 1)  # every thread block runs more than one tile


@pytest.mark.slow
@pytest.mark.parametrize("width, variant", [(24, "official"), (40, "mindspore_pets")])
def test_training_with_dropped_sentences_and_inference(width, variant, interpreted):
    """Of an image of seven tokens: the last tile has three sentences of four."""
    fields = dict(inner_dim=width, inner_heads=4, depth=2, vanilla_blocks=(0,), drop_path=0.5)
    fields |= VARIANTS[variant] | dict(inner_impl="mosaic", outer_impl="reference")
    model, params, images = networks.build((1, 32, 48, 3), layer_scale=True, **fields)
    reference = model.clone(inner_impl="reference")
    for run in (training_value_and_gradients, networks.apply):
        check_same(run(model, params, images), run(reference, params, images))


@pytest.mark.parametrize(
    "device, jax_version, width, reason",
    [
        ("cpu", (0, 12, 0), 24, "it is for Hopper GPUs such as the H100, not for cpu"),
        ("NVIDIA B200", (0, 12, 0), 24, "it is for Hopper GPUs .* not for NVIDIA B200"),
        ("NVIDIA H200", (0, 10, 1), 24, "it needs jax 0.10.2 or newer, not .*"),
        (
            "NVIDIA H200",
            (0, 12, 0),
            12,
            r"words of width 12 with 4 heads are none of \(\(24, 4\).*",
        ),
    ],
)
def test_what_the_kernels_cannot_run_is_refused(device, jax_version, width, reason, monkeypatch):
    monkeypatch.setattr(mosaic, "device_kind", lambda: device)
    monkeypatch.setattr(mosaic.jax, "__version_info__", jax_version)
    message = f"inner_impl='mosaic' cannot run here: {reason}; use inner_impl='auto'"
    with pytest.raises(InputError, match=f"^{message}$"):
        select.choose_inner("mosaic", (2, 6, 16, width), heads=4, mlp_ratio=4.0)


def test_float32_is_refused(monkeypatch):
    """Tensor cores would round its products to TF32."""
    model, params, images = networks.build(inner_dim=24, inner_heads=4, inner_impl="mosaic")
    monkeypatch.setattr(mosaic, "why_not", lambda *args: "")
    with pytest.raises(InputError, match="in bfloat16 or float16, not float32: use dtype='bfl"):
        networks.apply(model, params, images)


COMPILE = """
import functools, jax, numpy
from jax.sharding import NamedSharding, PartitionSpec
from tnt_flax.models import layers
from tnt_flax.models.kernels import mosaic
from tnt_flax.tools.targets import find_target

target = find_target("h100", 2)
mesh = jax.sharding.Mesh(numpy.array(target.devices), ("data",))
images = NamedSharding(mesh, PartitionSpec("data"))
for width in (24, 40):
    x = jax.ShapeDtypeStruct((2, 7, 16, width), "bfloat16", sharding=images)
    init = functools.partial(layers.TransformerBlock(4).init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), x, None)
    apply = mosaic.WordsTransformer(4, 1, 6, dtype=x.dtype).apply
    forward = lambda params, x: apply(params, x, None, train=False)

    def loss(params, x):
        rngs = {"dropout": jax.random.key(0)}
        rate = jax.numpy.float32(0.1)
        return apply(params, x, rate, train=True, rngs=rngs).astype("float32").sum()

    for run in (forward, jax.grad(loss, argnums=(0, 1))):
        with jax.set_mesh(mesh):
            lowered = jax.jit(run).trace(params, x).lower(lowering_platforms=("cuda",))
            lowered.compile(compiler_options=target.compiler_options)
"""


@pytest.mark.gpu_compiler
@pytest.mark.slow
def test_kernels_for_two_h100s_spill_no_registers(root, cuda_plugin):
    """Of words of both widths: one kernel for the forward pass and three for gradients."""
    ended = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=cuda_plugin | {"MOSAIC_GPU_DUMP_PTX": "1"},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    ptxas = pathlib.Path(sys.prefix, "cuda/nvidia/cu13/bin/ptxas")
    command = [ptxas, "-v", "-arch=sm_90a", "-o", "/dev/null", "/dev/stdin"]
    code = re.sub(r"^\s*\.loc\s.*$", "", ended.stdout, flags=re.MULTILINE)  # names source lines
    kernels = set(re.findall(r"^\.version.*?^}$", code, re.MULTILINE | re.DOTALL))
    assert len(kernels) == 2 * (1 + 3)
    for code in kernels:
        assert "wgmma.mma_async" in code
        found = subprocess.run(command, input=code, capture_output=True, text=True, check=True)
        assert re.findall(r"(\d+) bytes spill", found.stdout + found.stderr) == ["0", "0"]
