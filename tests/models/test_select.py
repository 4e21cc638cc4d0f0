# SPDX-License-Identifier: Apache-2.0
"""Which implementation of the inner and the outer transformer runs where."""

import functools
import re

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests.helpers import networks
from tests.helpers.jaxprs import equations
from tnt_flax.core.errors import InputError
from tnt_flax.models.kernels import inner_pallas, outer_pallas, select
from tnt_flax.models.kernels.platform import why_not_shared

build = functools.partial(networks.build, inner_dim=12, depth=2)


REFERENCE, LANES = (2, 6, 2, 16, 16), (2, 16, 16, 12)  # shapes of the inner softmax


@pytest.mark.parametrize(
    "fields, kwargs, chosen",
    [
        (dict(inner_impl="lanes", drop_path=0.1), dict(train=True), LANES),
        (dict(inner_impl="lanes", dropout=0.1), {}, LANES),
        (dict(inner_impl="lanes", dropout=0.1), dict(train=True), REFERENCE),
        (dict(inner_impl="lanes", attention_dropout=0.1), dict(train=True), REFERENCE),
        (dict(inner_impl="lanes"), dict(mutable=["intermediates"]), REFERENCE),
        (dict(inner_impl="auto"), {}, REFERENCE),  # on a CPU
    ],
)
def test_dropout_and_intermediates_need_the_reference(fields, kwargs, chosen):
    model, params, images = build(**fields)
    run = functools.partial(model.apply, rngs={"dropout": jax.random.key(0)}, **kwargs)
    jaxpr = jax.make_jaxpr(run)({"params": params}, images)
    exponentials = [e for e in equations(jaxpr) if e.primitive.name in ("exp", "exp2")]
    found = {e.invars[0].aval.shape for e in exponentials}
    assert found & {REFERENCE, LANES} == {chosen}


@pytest.fixture
def pretend(monkeypatch):
    """Sets the platform that the selection sees, with one device."""

    def set_platform(platform, devices=1):
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        for module in (select, inner_pallas, outer_pallas):
            monkeypatch.setattr(module, "platform", lambda: platform)

    return set_platform


WORDS, SENTENCES = (2, 6, 16, 12), (2, 7, 192)


@pytest.mark.parametrize(
    "platform, inner, outer",
    [("cpu", "cpu", "cpu"), ("gpu", "reference", "reference"), ("tpu", "lanes", "reference")],
)
def test_auto_never_chooses_an_untested_implementation(platform, inner, outer, pretend):
    pretend(platform)
    assert select.choose_inner("auto", WORDS, heads=2, mlp_ratio=4.0) == inner
    assert select.choose_outer("auto", SENTENCES, heads=3) == outer


def test_a_requested_implementation_is_kept(pretend):
    pretend("tpu")
    for impl in ("reference", "pallas"):
        assert select.choose_inner(impl, WORDS, heads=2, mlp_ratio=4.0) == impl
        assert select.choose_outer(impl, SENTENCES, heads=3) == impl


@pytest.mark.parametrize(
    "platform, devices, width, reason",
    [
        ("cpu", 1, 12, "it is for TPUs, not for cpu"),
        ("tpu", 8, 12, "it must be told how 8 devices share it: use jax.set_mesh(mesh)"),
        ("tpu", 1, 8, "words of width 8 with 2 heads are none of ((12, 2), (24, 4), (40, 4))"),
    ],
)
def test_impossible_inner_kernels_are_refused(platform, devices, width, reason, pretend):
    pretend(platform, devices)
    message = f"inner_impl='pallas' cannot run here: {reason}; use inner_impl='auto'"
    with pytest.raises(InputError, match="^" + re.escape(message) + "$"):
        select.choose_inner("pallas", (2, 6, 16, width), heads=2, mlp_ratio=4.0)


def test_impossible_outer_kernels_are_refused(pretend):
    pretend("tpu")
    with pytest.raises(InputError, match="^outer_impl='pallas' cannot run here: .*heads of width"):
        select.choose_outer("pallas", (2, 7, 24), heads=1)


def test_meshes_that_cannot_share_a_kernel():
    """Kernels run only where no axis except the batch's is left to the compiler."""
    assert "how 8 devices share it" in why_not_shared(16)
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        assert why_not_shared(16) == ""
        assert why_not_shared(12) == "12 images do not split over 8 devices"
    reasons = []

    def check(x):
        reasons.append(why_not_shared(16))
        return x

    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)):
        check(None)
        for manual in ({"data"}, {"data", "tensor"}):
            spec = PartitionSpec("data")
            shard = jax.shard_map(check, in_specs=spec, out_specs=spec, axis_names=manual)
            jax.eval_shape(jax.jit(shard), jax.ShapeDtypeStruct((4,), "float32"))
    refused = "the mesh splits more than the batch: its axis 'tensor' has several devices"
    assert reasons == [refused, refused, ""]
