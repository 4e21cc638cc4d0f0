# SPDX-License-Identifier: Apache-2.0
"""TNT as a whole: its function, the outputs of its blocks, sizes, errors, devices and dtypes."""

import functools
import pathlib
import re

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.goldens.scripts import models
from tests.helpers import numpy_tnt, timm_weights
from tests.helpers.jaxprs import equations
from tests.helpers.networks import (
    CAPTURED,
    SMALL,
    apply,
    build,
    captured,
    jit,
    normal,
    param_shapes,
)
from tnt_flax.core.errors import InputError
from tnt_flax.models import TNT, VARIANTS, block_outputs
from tnt_flax.models.layers import check_images


def outputs(model, params, images):
    return jit(functools.partial(block_outputs, model))({"params": params}, images)


# -- Equality with the equations, and with timm


@pytest.mark.parametrize(
    "fields",
    [
        *VARIANTS.values(),
        dict(se=True, layer_scale=True, mlp_ratio=2.5),
        dict(vanilla_blocks=(1,), depth=4),
        dict(depth=1, num_classes=0, outer_heads=1, inner_heads=4),
        dict(patch_size=8, inner_stride=3, depth=1),  # words of 3x3 = ceil(8 / 3) squared
    ],
    ids=lambda fields: "-".join(fields) or "official",
)
def test_logits_equal_the_equations_in_float64(fields):
    model, params, images = build(**fields)
    logits, _ = numpy_tnt.tnt(model, params, images)
    np.testing.assert_allclose(apply(model, params, images), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["official", "legacy", "mindspore_pets"])
def test_every_layer_norm_has_the_published_epsilon(variant):
    """Updates are so small that the variance of every norm's input is of the order of epsilon."""
    model, params, images = build(gain=1e-3, depth=2, **VARIANTS[variant])
    logits, trace = numpy_tnt.tnt(model, params, images)
    words, sentences = (np.stack([image[-1][i] for image in trace]) for i in (0, 1))
    found, state = apply(model, params, images, mutable=CAPTURED)
    last = {name: x[-1] for name, x in captured(state).items()}
    for ours, expected in (
        (found, logits),
        (last["words"], words),
        (last["sentences"][:, 0], sentences[:, 0]),
        (last["sentences"][:, 1:], sentences[:, 1:]),
    ):
        tolerance = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", ["official", pytest.param("legacy", marks=pytest.mark.slow)])
def test_logits_blocks_and_gradients_equal_timm(variant):
    with np.load(pathlib.Path(models.GOLDEN) / f"tnt_{variant}.npz") as golden:
        golden = dict(golden)
    gradients = {
        name.removeprefix("gradient "): x for name, x in golden.items() if name.startswith("grad")
    }
    weights = timm_weights.random_state({name: x.shape for name, x in gradients.items()})
    params, expected = timm_weights.to_flax(weights), timm_weights.to_flax(gradients)
    model = TNT(**models.OUR_FIELDS, **VARIANTS[variant])
    images = jnp.asarray(models.images())
    shapes = param_shapes(model, images.shape)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)

    def loss(params):
        logits, state = model.apply({"params": params}, images, mutable=CAPTURED)
        picked = jax.nn.log_softmax(logits)[jnp.arange(2), jnp.array(models.LABELS)]
        return -picked.mean(), (logits, captured(state))

    (value, (logits, blocks)), found = jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5)
    np.testing.assert_allclose(value, golden["loss"], atol=1e-5)
    for i in range(model.depth):
        for name in ("words", "sentences"):
            x = blocks[name][i]
            np.testing.assert_allclose(x, golden[f"{name}_{i}"].reshape(x.shape), atol=2e-5)
    difference = jax.tree.map(
        lambda x, y: float(np.linalg.norm(x - y) / np.linalg.norm(y)), found, expected
    )
    assert max(jax.tree.leaves(difference)) < 1e-3


# -- Groups of blocks, and what comes out of them


def test_equal_consecutive_blocks_form_a_group():
    params = build(depth=6, vanilla_blocks=(0, 3, 4))[1]
    groups = {name: group for name, group in params.items() if name.startswith("blocks_")}
    lengths = {name: len(group["outer"]["norm1"]["scale"]) for name, group in groups.items()}
    assert lengths == {"blocks_0": 1, "blocks_1": 2, "blocks_3": 2, "blocks_5": 1}


def test_weights_of_another_depth_are_refused():
    params, images = build(depth=3)[1:]
    with pytest.raises(InputError, match=r"the weights' blocks_0 has \[3\] blocks, not 2"):
        build(depth=2)[0].apply({"params": params}, images)


def test_block_outputs_equal_the_equations():
    model, params, images = build(depth=4, vanilla_blocks=(2,))
    blocks = outputs(model, params, images)
    names = {"words", "sentences", "outer_attention", "inner_attention"}
    assert [set(block) for block in blocks] == [
        names - {"inner_attention"} if i == 2 else names for i in range(4)
    ]
    np.testing.assert_array_equal(blocks[1]["words"], blocks[2]["words"])  # vanilla: left alone

    _, trace = numpy_tnt.tnt(model, params, images)
    for i, block in enumerate(blocks):
        words, sentences, inner, outer = (
            np.stack(x) for x in zip(*[image[i] for image in trace], strict=True)
        )
        np.testing.assert_allclose(block["words"], words, rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(block["sentences"], sentences, rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(block["outer_attention"], outer, atol=1e-5)
        if i != 2:
            np.testing.assert_allclose(block["inner_attention"], inner, atol=1e-5)


def test_block_outputs_without_inner_heads():
    model, params, images = build(inner_heads=0)
    assert "inner" not in params["blocks_0"]
    blocks = jax.eval_shape(functools.partial(block_outputs, model), {"params": params}, images)
    assert all("inner_attention" not in block for block in blocks)


def test_unused_block_outputs_are_not_computed():
    model, params, images = build()

    def compiled(names):
        def chosen(params):
            block = block_outputs(model, {"params": params}, images)[-1]
            return [block[name] for name in names]

        return jit(chosen).lower(params).compile().as_text()

    stacked = "f32[3,2,6,2,16,16]"  # the inner attention of three blocks
    assert stacked in compiled(["inner_attention"])
    assert stacked not in compiled(["sentences"])


# -- Sizes and errors


@pytest.mark.parametrize(
    "image_shape, fields",
    [
        ((1, 16, 16, 3), {}),
        ((3, 48, 16, 1), {}),
        ((0, 16, 64, 5), {}),
        ((1, 24, 40, 3), dict(patch_size=8)),
    ],
)
def test_any_image_size_channels_and_batch(image_shape, fields):
    model, params, images = build(image_shape, depth=1, **fields)
    patch = model.patch_size
    sentences = (image_shape[1] // patch) * (image_shape[2] // patch)
    assert params["sentence_pos"].shape == (1, sentences + 1, 24)
    assert params["word_embed"]["conv"]["kernel"].shape == (7, 7, image_shape[3], 8)
    logits = jax.eval_shape(model.apply, {"params": params}, images)
    assert (logits.shape, logits.dtype) == ((image_shape[0], 5), jnp.float32)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(gelu="exact"), "gelu='exact' is none of ('erf', 'tanh')"),
        (dict(remat="full"), "remat='full' is none of ('auto', 'none', 'block')"),
        (
            dict(inner_impl="cuda"),
            "inner_impl='cuda' is none of ('auto', 'reference', 'cpu', 'gpu', 'mosaic', 'lanes', "
            "'pallas')",
        ),
        (
            dict(outer_impl="lanes"),
            "outer_impl='lanes' is none of ('auto', 'reference', 'cpu', 'gpu', 'pallas')",
        ),
        (dict(depth=0), "depth=0: a network has one block at least"),
        (dict(dropout=1.0), "dropout=1.0 is outside [0, 1)"),
        (dict(attention_dropout=-0.1), "attention_dropout=-0.1 is outside [0, 1)"),
        (dict(drop_path=1.5), "drop_path=1.5 is outside [0, 1)"),
        (dict(vanilla_blocks=(1, 3, -1)), "vanilla_blocks [3, -1] are outside the 3 blocks"),
        (dict(outer_heads=5), "width 24 is not divisible by 5 attention heads"),
        (dict(inner_heads=3), "width 8 is not divisible by 3 attention heads"),
        (
            dict(conv_first=True, inner_stride=3),
            "conv_first needs a patch size (16) divisible by the inner stride (3)",
        ),
    ],
)
def test_invalid_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + r"(\n|$)"):
        build(**fields)


@pytest.mark.parametrize("size", ["30x32", "32x8", "0x16"])
def test_indivisible_image_sizes_are_refused(size):
    message = f"^image size {size} is not divisible by patch size 16" + r"(\n|$)"
    with pytest.raises(ValueError, match=message):
        build((1, *map(int, size.split("x")), 3))


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((32, 32, 3), np.float32), "images must be [B, H, W, channels], not [32, 32, 3]"),
        (np.zeros((1, 32, 32, 3), np.uint8), "must be normalized to floats first, these are uint8"),
    ],
)
def test_images_of_wrong_rank_or_type_are_refused(images, message):
    # Called directly: the shape checks that only tests enable would come first.
    with pytest.raises(ValueError, match=re.escape(message)):
        check_images(jnp.asarray(images), 16)


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (2, 64, 48, 3)])
def test_images_of_another_size_than_the_weights_are_refused(shape):
    model, params, _ = build()
    sentences = shape[1] * shape[2] // 256 + 1
    message = (
        f"the weights' sentence_pos has shape (1, 7, 24), but these images and this patch size "
        f"need (1, {sentences}, 24): give images of the size the weights were made for"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(model.apply, {"params": params}, normal(*shape))


def test_weights_of_another_network_are_refused():
    _, params, images = build()

    def load(params, images=images, **fields):
        jax.eval_shape(TNT(**(SMALL | fields)).apply, {"params": params}, images)

    load(params)
    with pytest.raises(flax.errors.ScopeParamShapeError, match="head"):
        load(params, num_classes=7)
    with pytest.raises(flax.errors.ScopeParamShapeError, match="conv"):
        load(params, images[..., :1])
    with pytest.raises(flax.errors.ScopeParamNotFoundError):
        load(params, qkv_bias=True)
    del params["norm"]
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match="norm"):
        load(params)


# -- Devices and dtypes


def test_bfloat16_stays_near_float32():
    model, params, images = build(dtype=jnp.bfloat16)
    half, exact = apply(model, params, images), apply(*build())
    assert half.dtype == jnp.float32
    difference = np.abs(half - exact).max()
    assert 0 < difference < 0.03 * np.abs(exact).max(), difference


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_products_are_bfloat16_and_norms_and_softmax_float32(impl):
    model, params, images = build(dtype=jnp.bfloat16, inner_impl=impl, outer_impl=impl)
    jaxpr = jax.make_jaxpr(model.apply)({"params": params}, images)
    dtypes = {}
    for equation in equations(jaxpr):
        kinds = {v.aval.dtype.name for v in equation.invars if v.aval.ndim}
        dtypes.setdefault(equation.primitive.name, set()).update(kinds)
    for name in ("exp", "rsqrt", "square", "reduce_sum", "reduce_max"):
        assert dtypes[name] == {"float32"}, name
    for name in ("dot_general", "erf"):
        assert dtypes[name] == {"bfloat16"}, name
    assert {v.aval.dtype.name for v in jaxpr.jaxpr.outvars} == {"float32"}
    inits = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {x.dtype.name for x in jax.tree.leaves(inits)} == {"float32"}
