# SPDX-License-Identifier: Apache-2.0
"""The tables of names: complete, one to one, and equal to what the real frameworks write."""

import json
import re

import jax
import numpy as np
import pytest

from tests.goldens.scripts.weights import GOLDEN
from tests.helpers.foreign_weights import SMALL, random_params
from tnt_flax.core.errors import InputError
from tnt_flax.models import TNT, VARIANTS, create_model
from tnt_flax.weights import identify, names

NAMES = json.loads((GOLDEN / "names.json").read_text())
OTHERS = [naming for naming in names.NAMINGS if naming != "tnt_flax"]


def expand(published):
    """The names and shapes of a published network: those with {i} once per block."""
    return {
        name.format(i=i): tuple(shape)
        for name, shape in published["tensors"].items()
        for i in (range(published["depth"]) if "{i}" in name else [0])
    }


PUBLISHED = [
    (framework, name, expand(published))
    for framework, networks_of in NAMES.items()
    for name, published in networks_of.items()
]


@pytest.mark.parametrize("framework, name, shapes", PUBLISHED, ids=lambda x: str(x)[:30])
def test_every_published_network_is_identified(framework, name, shapes):
    naming, known = names.detect_naming(shapes)
    assert known == len(shapes)
    assert naming == framework.removesuffix("_legacy")
    weights = {n: s for n, s in shapes.items() if names.ignored_reason(naming, n) is None}
    ours = {
        our_name: names.to_ours(naming, our_name, place, np.empty(shape)).shape
        for theirs, shape in weights.items()
        for our_name, place in names.our_names(naming, theirs)
    }
    network = identify.identify("file", naming, ours)
    abstract = names.join_collections(network.abstract_variables())
    exported = names.exported_shapes(naming, abstract)
    assert {theirs: x.shape for theirs, x in exported.items()} == weights
    tensors = names.unstacked(jax.tree.map(names.shapes_only, abstract))
    assert weights | names.extra_shapes(naming, tensors) == shapes
    expected = {
        "tnt-small-p16": "tnt_s_legacy_patch16_224",
        "mindspore": {
            "tnt_s": "tnt_s_mindspore_patch16_224",
            "tnt_b": "tnt_b_mindspore_patch16_224",
        },
        "mindspore_pets": {"tnt_b": "tnt_b_mindspore_pets_patch16_384"},
    }
    expected = expected.get(name) or expected.get(framework, {}).get(name[:5], name)
    assert identify.name_of(network.model) == expected


def test_every_framework_has_published_names():
    pyramids = {"huawei_pyramid"}  # its names are in tests/goldens/data/pyramid
    assert {framework.removesuffix("_legacy") for framework in NAMES} == set(OTHERS) - pyramids


@pytest.mark.parametrize("naming", names.NAMINGS)
def test_names_are_one_to_one(naming):
    rows = names.rows(naming)
    assert len(set(rows.values())) == len(rows)
    for ours, place in rows.items():
        parts = {x.part for x in rows.values() if x.name == place.name}
        assert parts == set(range(place.parts))  # every part of a tensor is used
        pair = (ours.format(3, 5), names.place_of(naming, ours.format(3, 5)))
        assert pair in names.our_names(naming, pair[1].name)


def test_unmapped_tensors_are_listed():
    params = random_params("official", se=True)
    with pytest.raises(InputError, match=r"timm has no place for blocks/0/outer/se/fc1/bias, .* 7"):
        list(names.export("timm", params))


def test_numbers_of_blocks_are_decimal():
    assert names.our_names("timm", "blocks.00.norm_in.weight") == []  # 0 is written 0
    assert names.our_names("timm", "blocks.99999.norm_in.weight") == []


@pytest.mark.parametrize(
    "ours, parts, shape",
    [
        ("blocks/0/inner/fc1/kernel", 1, (3,)),
        ("word_embed/conv/kernel", 1, (3, 3)),
        ("word_pos", 1, (1, 4, 16)),
        ("blocks/0/inner/attention/query/kernel", 2, (5, 4)),
        ("blocks/0/inner/attention/query/kernel", 2, ()),
    ],
)
def test_wrong_shapes_are_refused(ours, parts, shape):
    message = "has the wrong shape" + (" or cannot be split into 2 parts" if parts > 1 else "")
    with pytest.raises(InputError, match=re.escape(f"x {list(shape)} {message}")):
        names.to_ours("timm", ours, names.Place("x", 0, parts), np.empty(shape))


def test_networks_have_names():
    model = create_model("tnt_s_patch16_224", num_classes=7, dtype="bfloat16", drop_path=0.3)
    assert identify.name_of(model) == "tnt_s_patch16_224"
    assert identify.variant_of(model) == "official"
    assert identify.name_of(model.clone(depth=3)) is None
    mixture = model.clone(norm_eps=1e-7)
    assert (identify.name_of(mixture), identify.variant_of(mixture)) == (None, "other")
    for variant in VARIANTS:
        assert identify.variant_of(TNT(**SMALL | VARIANTS[variant])) == variant
