# SPDX-License-Identifier: Apache-2.0
"""The tables of names: complete, one to one, and equal to what the real frameworks write."""

import json
import re

import numpy as np
import pytest

from tests.goldens.scripts.weights import GOLDEN
from tests.helpers.foreign_weights import SMALL, random_params
from tnt_flax.core.errors import InputError
from tnt_flax.models import TNT, VARIANTS, create_model
from tnt_flax.weights import identify, names

NAMES = json.loads((GOLDEN / "names.json").read_text())
OTHERS = [naming for naming in names.NAMINGS if naming != "tnt_flax"]
HELD = [
    (naming, variant)
    for naming in OTHERS
    for variant in identify.VARIANTS_OF[naming]
    if variant in VARIANTS
]


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
    naming = names.detect_naming("file", shapes)
    assert naming == framework.removesuffix("_legacy")
    weights = {n: s for n, s in shapes.items() if names.ignored_reason(naming, n) is None}
    ours = {
        our_name: names.to_ours(naming, our_name, place, names.shapes_only(shape)).shape
        for theirs, shape in weights.items()
        for our_name, place in names.our_names(naming, theirs)
    }
    network = identify.identify("file", naming, ours)
    abstract = names.join_collections(network.abstract_variables())
    exported = names.exported_shapes(naming, abstract)
    assert {theirs: x.shape for theirs, x in exported.items()} == weights
    tensors = names.unstacked(names.shapes_only_tree(abstract))
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


@pytest.mark.parametrize("naming, variant", HELD)
def test_export_and_back_is_the_identity(naming, variant):
    params = random_params(variant, se=naming == "huawei")
    exported = dict(names.export(naming, params))
    tensors = names.unstacked(params)
    for ours, x in tensors.items():
        place = names.place_of(naming, ours)
        again = names.to_ours(naming, ours, place, exported[place.name])
        np.testing.assert_array_equal(again, x)


def test_joined_projections_are_split_in_order():
    params = random_params("official")
    attention = params["blocks_0"]["outer"]["attention"]
    query, key, value = (attention[name]["kernel"][1].T for name in ("query", "key", "value"))
    timm = dict(names.export("timm", params))
    np.testing.assert_array_equal(timm["blocks.1.attn_out.qk.weight"], np.concatenate([query, key]))
    np.testing.assert_array_equal(timm["blocks.1.attn_out.v.weight"], value)

    params = random_params("legacy")
    attention = params["blocks_0"]["inner"]["attention"]
    parts = [attention[name]["kernel"][0].T for name in ("query", "key", "value")]
    packed = dict(names.export("mmpretrain", params))
    name = "backbone.layers.0.inner_block.attn.attn.in_proj_weight"
    np.testing.assert_array_equal(packed[name], np.concatenate(parts))


def test_word_positions_are_transposed_from_channels_first():
    params = random_params("official")
    words = params["word_pos"][0]  # (M, C)
    np.testing.assert_array_equal(dict(names.export("huawei", params))["inner_pos"][0], words)
    grid = dict(names.export("timm", params))["pixel_pos"]
    assert grid.shape == (1, 4, 4, 4)
    for word, channel in np.ndindex(words.shape):
        assert grid[0, channel, word // 4, word % 4] == words[word, channel]
    params = random_params("mindspore_pets")
    flat = dict(names.export("mindspore_pets", params))["pixel_pos"]
    np.testing.assert_array_equal(flat[0], params["word_pos"][0].T)


def test_kernels_are_transposed():
    params = random_params("official")
    kernel = params["word_embed"]["conv"]["kernel"]  # (height, width, in, out)
    weight = dict(names.export("timm", params))["pixel_embed.proj.weight"]
    assert weight.shape == (4, 3, 7, 7)
    assert weight[1, 2, 3, 4] == kernel[3, 4, 2, 1]
    assert not any(x.base is not None for _, x in names.export("timm", params) if x.ndim == 4)


def test_zeros_of_other_frameworks_are_written():
    params = random_params("official")
    zeros = dict(names.export("huawei", params))["outer_tokens"]
    assert zeros.shape == (1, 4, 12) and not zeros.any()
    exported = dict(names.export("mindspore_pets", random_params("mindspore_pets")))
    extra = {n: x.shape for n, x in exported.items() if names.ignored_reason("mindspore_pets", n)}
    assert extra == {
        "patch_embed": (1, 4, 12),
        "fake": (1, 1, 12),
        "pixel2patch.fake": (1, 1, 12),
        "encoder.layers.0.pixel2patch.fake": (1, 1, 12),
        "encoder.layers.1.pixel2patch.fake": (1, 1, 12),
    }


def test_unmapped_tensors_are_listed():
    params = random_params("official", se=True)
    with pytest.raises(InputError, match=r"timm has no place for blocks/0/outer/se/fc1/bias, .* 7"):
        list(names.export("timm", params))


def test_groups_of_blocks_may_start_anywhere():
    params = random_params("official", depth=5, vanilla_blocks=(2,))
    assert set(params) > {"blocks_0", "blocks_2", "blocks_3"}
    tensors = names.unstacked(params)
    np.testing.assert_array_equal(
        tensors["blocks/4/outer/fc1/bias"], params["blocks_3"]["outer"]["fc1"]["bias"][1]
    )
    assert "blocks/2/inner/fc1/bias" not in tensors
    exported = dict(names.export("huawei", params))
    np.testing.assert_array_equal(
        exported["blocks.4.outer_mlp.fc1.bias"], tensors["blocks/4/outer/fc1/bias"]
    )


def test_other_networks_are_refused():
    with pytest.raises(InputError, match="holds no known TNT: .* of its 2 tensors; .*'conv1"):
        names.detect_naming("resnet.pth", ["conv1.weight", "fc.bias"])
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
    message = "has the wrong rank" + (" or cannot be split into 2 parts" if parts > 1 else "")
    with pytest.raises(InputError, match=re.escape(f"x {list(shape)} {message}")):
        names.to_ours("timm", ours, names.Place("x", 0, parts), names.shapes_only(shape))


def test_networks_have_names():
    model = create_model("tnt_s_patch16_224", num_classes=7, dtype="bfloat16", drop_path=0.3)
    assert identify.name_of(model) == "tnt_s_patch16_224"
    assert identify.variant_of(model) == "official"
    assert identify.name_of(model.clone(depth=3)) is None
    mixture = model.clone(norm_eps=1e-7)
    assert (identify.name_of(mixture), identify.variant_of(mixture)) == (None, "other")
    for variant in VARIANTS:
        assert identify.variant_of(TNT(**SMALL | VARIANTS[variant])) == variant
