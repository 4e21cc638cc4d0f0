# SPDX-License-Identifier: Apache-2.0
"""Which implementation of the inner and the outer transformer runs where."""

import functools
import re

import jax
import pytest

from tests.helpers import networks
from tests.helpers.jaxprs import equations
from tnt_flax.core.errors import InputError
from tnt_flax.models.kernels import inner_pallas, outer_pallas, select

build = functools.partial(networks.build, inner_dim=12, depth=2)


def exponentials(model, *args, **kwargs):
    """Returns the shapes of the arguments of all exponentials: the softmax's logits."""
    jaxpr = jax.make_jaxpr(functools.partial(model.apply, **kwargs))(*args)
    names = ("exp", "exp2")
    return {e.invars[0].aval.shape for e in equations(jaxpr) if e.primitive.name in names}


REFERENCE, LANES = (2, 6, 2, 16, 16), (2, 16, 16, 12)


@pytest.mark.parametrize(
    "fields, kwargs, chosen",
    [
        (dict(inner_impl="lanes"), {}, LANES),
        (dict(inner_impl="lanes", drop_path=0.1), dict(train=True), LANES),
        (dict(inner_impl="lanes", dropout=0.1), {}, LANES),
        (dict(inner_impl="lanes", dropout=0.1), dict(train=True), REFERENCE),
        (dict(inner_impl="lanes", attention_dropout=0.1), dict(train=True), REFERENCE),
        (dict(inner_impl="lanes"), dict(mutable=["intermediates"]), REFERENCE),
        (dict(inner_impl="reference"), {}, REFERENCE),
        (dict(inner_impl="auto"), {}, REFERENCE),  # on a CPU
    ],
)
def test_dropout_and_intermediates_need_the_reference(fields, kwargs, chosen):
    model, params, images = build(**fields)
    if "train" in kwargs:
        kwargs = kwargs | {"rngs": {"dropout": jax.random.key(0)}}
    found = exponentials(model, {"params": params}, images, **kwargs)
    assert chosen in found
    assert ({REFERENCE, LANES} - {chosen}).isdisjoint(found)


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


@pytest.mark.parametrize("impl", ["reference", "pallas"])
def test_a_requested_implementation_is_kept(impl, pretend):
    pretend("tpu")
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
