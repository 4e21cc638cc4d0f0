# SPDX-License-Identifier: Apache-2.0
"""The table of networks, `create_model`, and the cost of `import tnt_flax`."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tnt_flax.core.errors import InputError
from tnt_flax.models import create_model, list_models

# Trainable parameters; timm's tables say 23.77, 65.43, 23.76 and 65.41 million.
COUNTS = {
    "tnt_ti_patch16_224": 6_076_408,
    "tnt_s_patch16_224": 23_768_584,
    "tnt_b_patch16_224": 65_428_680,
    "tnt_s_legacy_patch16_224": 23_755_336,
    "tnt_b_legacy_patch16_224": 65_406_600,
    "tnt_s_mindspore_patch16_224": 23_757_384,
    "tnt_b_mindspore_patch16_224": 65_410_680,
    "tnt_b_mindspore_pets_patch16_384": 65_070_117,
    "ptnt_ti_patch16_192": 10_578_529,
    "ptnt_s_patch16_256": 31_953_200,
    "ptnt_m_patch16_256": 84_943_572,
    "ptnt_b_patch16_256": 156_990_072,
}
TNTS = [name for name in list_models() if name.startswith("tnt_")]


def shapes(name, image_size=224, channels=3, **fields):
    model = create_model(name, **fields)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", list_models())
def test_parameter_count_of_every_published_name(name):
    assert count(shapes(name, image_size=int(name[-3:]))) == COUNTS[name]


# The m = 64 and m = 4 rows of paper Table 8 are published with 196 * 384 frozen zeros, the official
# code's unused `outer_tokens`. With one channel the stem has 2 * 49 * 24 weights less.
@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("tnt_ti_patch16_224", dict(image_size=384), 6_149_368),
        ("tnt_s_patch16_224", dict(image_size=384), 23_914_504),
        ("tnt_b_patch16_224", dict(image_size=384), 65_671_880),
        ("tnt_s_patch16_224", dict(se=True), 24_668_296),
        (
            "tnt_s_patch16_224",
            dict(inner_dim=6, inner_stride=2, inner_heads=2),
            23_761_264 - 196 * 384,
        ),
        ("tnt_s_patch16_224", dict(inner_dim=96, inner_stride=8), 25_107_304 - 196 * 384),
        (
            "tnt_s_patch16_224",
            dict(vanilla_blocks=tuple(range(1, 12))),
            23_768_584 - 11 * (7_152 + 148_992),
        ),
        ("tnt_s_patch16_224", dict(num_classes=0), 23_768_584 - 385_000),
        ("tnt_s_patch16_224", dict(channels=1), 23_768_584 - 2 * 49 * 24),
    ],
)
def test_parameter_count_of_variants(name, options, expected):
    assert count(shapes(name, **options)) == expected


@pytest.mark.parametrize("name", TNTS)
def test_constants_of_the_published_names(name):
    model = create_model(name)
    assert model.outer_dim / model.outer_heads == 64
    assert model.inner_dim / model.inner_heads == (10 if "_b_" in name else 6)  # also of TNT-Ti
    numerics = (1e-7, "tanh") if "_mindspore_" in name else (1e-5, "erf")
    assert (model.norm_eps, model.gelu) == numerics
    assert (model.depth, model.patch_size) == (12, 16)


def test_list_models_is_sorted():
    assert list_models() == sorted(COUNTS)


def test_overrides_are_fields():
    model = create_model("tnt_s_patch16_224", dtype="bfloat16", vanilla_blocks=[1, 2], depth=5)
    assert model.dtype == jnp.bfloat16
    assert model.vanilla_blocks == (1, 2)
    assert model.depth == 5
    assert create_model("tnt_s_patch16_224").depth == 12  # the table is not written to
    same = dict(dtype=jnp.bfloat16, vanilla_blocks=(1, 2), depth=5)
    assert hash(model) == hash(create_model("tnt_s_patch16_224", **same))


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("tnt_s_patch16", {}, "unknown model 'tnt_s_patch16' (did you mean 'tnt_s_patch16_224'?)"),
        ("resnet", {}, "unknown model 'resnet'; known: ['ptnt_b_patch16_256', "),
        (
            "tnt_s_patch16_224",
            {"num_clases": 10},
            "TNT has no field 'num_clases' (did you mean 'num_classes'?)",
        ),
        ("tnt_s_patch16_224", {"zzz": 1}, "TNT has no field 'zzz'"),
        ("tnt_s_patch16_224", {"parent": None}, "TNT has no field 'parent'"),
        ("ptnt_s_patch16_256", {"depth": 3}, "PyramidTNT has no field 'depth' (did you mean 'dept"),
    ],
)
def test_unknown_names_and_fields(name, fields, message):
    with pytest.raises(InputError, match="^" + re.escape(message)):
        create_model(name, **fields)


def test_import_loads_no_framework_and_dir_lists_the_public_names():
    code = (
        "import sys, tnt_flax; names = dir(tnt_flax); "
        "print([m for m in ('jax', 'flax', 'numpy', 'torch') if m in sys.modules]); "
        "print(*[n for n in names if n in tnt_flax.__all__]); "
        "print(tnt_flax.TNT.__name__, tnt_flax.create_model('tnt_ti_patch16_224').outer_dim)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "[]",
        "PyramidTNT TNT block_outputs create_model feature_maps list_models load load_classifier "
        "load_exported",
        "TNT 192",
    ]


def test_unknown_attribute_of_the_package():
    import tnt_flax

    with pytest.raises(AttributeError, match="module 'tnt_flax' has no attribute 'nothing'"):
        _ = tnt_flax.nothing
