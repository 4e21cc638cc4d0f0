# SPDX-License-Identifier: Apache-2.0
"""Kernels, bytes, FLOPs and collectives of optimized HLO."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tnt_flax.tools.hlo import Program, array_bytes

# A loop of five iterations around two fusions and a library call, after a fusion outside of it.
PROGRAM = """HloModule example, is_scheduled=true

%fused_add (p0: f32[8,16], p1: f32[]) -> f32[8,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = f32[] parameter(1)
  %b = f32[8,16]{1,0} broadcast(%p1), dimensions={}
  ROOT %a = f32[8,16]{1,0} add(%p0, %b)
}

%fused_slice (p0: f32[5,16], p1: s32[], p2: bf16[8,16]) -> bf16[8,16] {
  %p0 = f32[5,16]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,16]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,16}
  %flat = f32[16]{0} bitcast(%row)
  %c = bf16[16]{0} convert(%flat)
  %wide = bf16[8,16]{1,0} broadcast(%c), dimensions={1}
  %p2 = bf16[8,16]{1,0} parameter(2)
  ROOT %m = bf16[8,16]{1,0} multiply(%wide, %p2)
}

%fused_update (p0: bf16[5,8,16], p1: bf16[8,16], p2: s32[]) -> bf16[5,8,16] {
  %p0 = bf16[5,8,16]{2,1,0} parameter(0)
  %p1 = bf16[8,16]{1,0} parameter(1)
  %u = bf16[1,8,16]{2,1,0} bitcast(%p1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %d = bf16[5,8,16]{2,1,0} dynamic-update-slice(%p0, %u, %p2, %zero, %zero)
}

%body (arg: (s32[], bf16[8,16], bf16[5,8,16], f32[5,16], bf16[16,16])) -> (s32[], bf16[8,16], bf16[5,8,16], f32[5,16], bf16[16,16]) {
  %arg = (s32[], bf16[8,16]{1,0}, bf16[5,8,16]{2,1,0}, f32[5,16]{1,0}, bf16[16,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%arg), index=1
  %all = bf16[5,8,16]{2,1,0} get-tuple-element(%arg), index=2
  %table = f32[5,16]{1,0} get-tuple-element(%arg), index=3
  %w = bf16[16,16]{1,0} get-tuple-element(%arg), index=4
  %scaled = bf16[8,16]{1,0} fusion(%table, %i, %x), kind=kLoop, calls=%fused_slice, metadata={op_name="jit(f)/while/body/mul"}
  %matmul = (bf16[8,16]{1,0}, s8[4194304]{0}) custom-call(%scaled, %w), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(f)/while/body/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %y = bf16[8,16]{1,0} get-tuple-element(%matmul), index=0
  %saved = bf16[5,8,16]{2,1,0} fusion(%all, %y, %i), kind=kLoop, calls=%fused_update
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], bf16[8,16]{1,0}, bf16[5,8,16]{2,1,0}, f32[5,16]{1,0}, bf16[16,16]{1,0}) tuple(%next, %y, %saved, %table, %w)
}

%condition (arg.1: (s32[], bf16[8,16], bf16[5,8,16], f32[5,16], bf16[16,16])) -> pred[] {
  %arg.1 = (s32[], bf16[8,16]{1,0}, bf16[5,8,16]{2,1,0}, f32[5,16]{1,0}, bf16[16,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %five), direction=LT
}

ENTRY %main (x0: f32[8,16], s: f32[], init: (s32[], bf16[8,16], bf16[5,8,16], f32[5,16], bf16[16,16])) -> f32[8,16] {
  %x0 = f32[8,16]{1,0} parameter(0)
  %s = f32[] parameter(1)
  %init = (s32[], bf16[8,16]{1,0}, bf16[5,8,16]{2,1,0}, f32[5,16]{1,0}, bf16[16,16]{1,0}) parameter(2)
  %loop = (s32[], bf16[8,16]{1,0}, bf16[5,8,16]{2,1,0}, f32[5,16]{1,0}, bf16[16,16]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %sum = f32[8,16]{1,0} fusion(%x0, %s), kind=kLoop, calls=%fused_add
}
"""


def test_sizes_of_shapes():
    assert array_bytes("(f32[2,3]{1,0}, bf16[4], f32[], pred[3]{0}, s4[3])") == {
        "f32": 28,
        "bf16": 8,
        "pred": 3,
        "s4": 2,
    }


def test_bytes_of_every_kernel():
    """Slices are read and updates written in part; the workspace of a library call is not moved."""
    kernels = {kernel.name: kernel for kernel in Program(PROGRAM).kernels()}
    row, array = 16 * 4, 8 * 16 * 2
    assert {name: (kernel.executions, kernel.bytes) for name, kernel in kernels.items()} == {
        "scaled": (5, row + 4 + array + array),
        "matmul": (5, array + 16 * 16 * 2 + array),
        "saved": (5, array + 4 + array),
        "next": (5, 3 * 4),
        "sum": (1, 8 * 16 * 4 + 4 + 8 * 16 * 4),
    }
    assert kernels["matmul"].kind == "library call"
    assert kernels["matmul"].flops == 2 * 8 * 16 * 16
    assert kernels["scaled"].op_name == "jit(f)/while/body/mul"


def test_an_annotated_trip_count_replaces_the_condition():
    annotated = PROGRAM.replace(
        "body=%body\n", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}\n'
    )
    executions = {kernel.name: kernel.executions for kernel in Program(annotated).kernels()}
    assert executions["scaled"] == 7
    unknown = PROGRAM.replace("direction=LT", "direction=NE")
    executions = {kernel.name: kernel.executions for kernel in Program(unknown).kernels()}
    assert executions["scaled"] == 1


def test_an_array_behind_a_barrier_is_read_once():
    text = PROGRAM.replace(
        "  ROOT %sum = f32[8,16]{1,0} fusion(%x0, %s), kind=kLoop, calls=%fused_add",
        """  %barrier = (f32[8,16]{1,0}) tuple(%x0)
  %again = f32[8,16]{1,0} get-tuple-element(%barrier), index=0
  ROOT %sum = f32[8,16]{1,0} fusion(%x0, %again), kind=kLoop, calls=%fused_both""",
    ).replace(
        "ENTRY",
        """%fused_both (q0: f32[8,16], q1: f32[8,16]) -> f32[8,16] {
  %q0 = f32[8,16]{1,0} parameter(0)
  %q1 = f32[8,16]{1,0} parameter(1)
  ROOT %p = f32[8,16]{1,0} multiply(%q0, %q1)
}

ENTRY""",
    )
    (kernel,) = [kernel for kernel in Program(text).kernels() if kernel.name == "sum"]
    assert kernel.bytes == 2 * 8 * 16 * 4


def test_products_of_a_compiled_program():
    """A program compiled for this machine: a product in a loop, and a convolution."""

    @jax.jit
    def program(x, w, images, kernel):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, 3)
        return x, jax.lax.conv(images, kernel, (1, 1), "VALID")

    shapes = (64, 128), (128, 128), (2, 3, 10, 10), (5, 3, 4, 4)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = program.lower(*arguments).compile().as_text()
    flops = sum(kernel.executions * kernel.flops for kernel in Program(text).kernels())
    assert flops in (3 * 2 * 64 * 128 * 128, 3 * 2 * 64 * 128 * 128 + 2 * 2 * 5 * 7 * 7 * 3 * 16)


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
    in_loop, outside = Program(text).collectives()
    assert in_loop == ("all-reduce", "f32", 1, 1, 5, 5 * 16 * 4)
    assert outside == ("all-reduce", "s32", 1, 0, 1, 4)
    assert Program(jax.jit(jnp.sin).lower(1.0).compile().as_text()).collectives() == []


@pytest.mark.parametrize("text", ["", "HloModule empty"])
def test_an_empty_program(text):
    assert Program(text).kernels() == [] and Program(text).collectives() == []
