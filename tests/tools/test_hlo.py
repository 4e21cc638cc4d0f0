# SPDX-License-Identifier: Apache-2.0
"""Programs read back: loops count as often as they turn, exchanges are found where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_flax.tools import hlo

# As the TPU compiler writes it: no trip count but the condition's constant, costs of what is fused
# inside of it and again, tuples, layouts in tiles, an exchange in two parts.
TPU = """\
HloModule jit_step, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  ROOT %exp.1 = f32[8]{0:T(128)} exponential(%p), backend_config={"estimated_cycles":"70"}
}

%add.clone (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%x, %y)
}

%wide.body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %x.1 = f32[8]{0:T(128)} get-tuple-element(%arg), index=1
  %fusion.1 = f32[8]{0:T(128)} fusion(%x.1), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/while/body/inner/exp"}, backend_config={"window_config":{"estimated_cycles":"100","iteration_bounds":["3","2"]}}
  %kernel.1 = f32[8]{0:T(128)} custom-call(%fusion.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/while/body/inner/pallas_call"}
  ROOT %all-reduce.1 = (bf16[4,2]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/bf16[8]{0:T(128)}, f32[2]{0:T(128)}) all-reduce(%a, %b, %c), to_apply=%add.clone
}

%wide.condition (arg.1: (s32[], f32[8])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(12)
  %arg.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.9), direction=LT
}

%until_found (arg.2: (s32[], f32[8])) -> pred[] {
  ROOT %found = pred[]{:T(512)} parameter(0)
}

ENTRY %main (x.2: f32[8]) -> f32[8] {
  %x.2 = f32[8]{0:T(128)} parameter(0)
  %exp.2 = f32[8]{0:T(128)} exponential(%x.2), backend_config={"estimated_cycles":"7"}
  %while.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%t), condition=%wide.condition, body=%wide.body
  %while.2 = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%t), condition=%until_found, body=%wide.body
  %start = (f32[8]{0:T(128)}, f32[32]{0:T(128)}) all-gather-start(%x.2), dimensions={0}
  ROOT %done = f32[32]{0:T(128)} all-gather-done(%start)
}
"""


def test_cycles_of_loops_and_not_of_what_is_fused():
    assert hlo.estimated_cycles(TPU) == 7 + (12 + 1) * 100
    assert hlo.kernel_calls(TPU) == 13


def test_exchanges_by_type():
    found = hlo.collectives(TPU)
    assert [(each.kind, each.dtype) for each in found] == [
        ("all-gather", "f32"),
        ("all-reduce", "bf16"),
        ("all-reduce", "f32"),
    ]
    gathered, low, full = found
    assert gathered[2:] == (1, 0, 1, 128)
    assert low[2:] == (2, 1, 13, 13 * 32)  # once in each loop, of which one turns once
    assert full.bytes == 13 * 8


@pytest.mark.parametrize("length", [1, 5])
def test_a_program_of_this_machine(length):
    """Eight devices share a mean in every turn of a loop, and a sum after it."""
    mesh = jax.make_mesh((8,), ("data",))
    split, everywhere = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())

    def function(weights, x):
        def body(x, weights):
            x = jnp.tanh(x @ weights)
            return x - x.mean(axis=0, keepdims=True), None

        return (jax.lax.scan(body, x, weights)[0] ** 2).sum()

    arguments = np.ones((length, 4, 4), np.float32), np.ones((16, 4), np.float32)
    jitted = jax.jit(function, in_shardings=(everywhere, split), out_shardings=everywhere)
    found = hlo.collectives(jitted.lower(*arguments).compile().as_text())
    in_loops = int(length > 1)  # a loop of one turn is none
    assert found == [hlo.Collectives("all-reduce", "f32", 2, in_loops, length + 1, length * 16 + 4)]
