# SPDX-License-Identifier: Apache-2.0
"""The network. `trap_<n>` in a name is trap n of the published code's list of differences."""

import functools
import itertools
import pathlib
import re

import flax.errors
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.goldens.scripts import models
from tests.helpers import numpy_tnt, timm_weights
from tests.helpers.jaxprs import equations
from tnt_flax.core.errors import InputError
from tnt_flax.models import TNT, VARIANTS, block_outputs
from tnt_flax.models.layers import TransformerBlock, check_images
from tnt_flax.models.tnt_blocks import TNTBlock, WordEmbedding, WordsToSentences

SMALL = dict(outer_dim=24, inner_dim=8, outer_heads=3, inner_heads=2, depth=3, num_classes=5)
IMAGE_SHAPE = (2, 32, 48, 3)  # six sentences; not square, so that a swap of the sides shows


def lineages(*names):
    return pytest.mark.parametrize("fields", [VARIANTS[name] for name in names], ids=names)


# Compiling is what these tests spend their time on; unoptimised code is compiled twice as fast.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def normal(*shape, seed=0):
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), jnp.float32)


def build(image_shape=IMAGE_SHAPE, gain=1.0, **fields):
    """A small network, random parameters in every place, random images."""
    model = TNT(**(SMALL | fields))
    shapes = param_shapes(model, image_shape)
    return model, numpy_tnt.random_params(shapes, gain=gain), normal(*image_shape)


@functools.cache
def param_shapes(model, image_shape):
    images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def apply(model, params, images, **kwargs):
    return jit(functools.partial(model.apply, **kwargs))({"params": params}, images)


def outputs(model, params, images):
    return jit(functools.partial(block_outputs, model))({"params": params}, images)


CAPTURED = ["intermediates", "maps"]


def captured(state):
    """Returns words and sentences after every block of the first group."""
    words, sentences = (state[collection]["blocks_0"] for collection in CAPTURED)
    return {"words": words["words"][0], "sentences": sentences["sentences"][0]}


def edited(params, values):
    """`params` with constants in the places whose path ends in a key of `values`."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for end, value in values.items():
        places = [path for path in flat if ("/" + path).endswith("/" + end)]
        assert places, end
        flat |= {path: np.full_like(flat[path], value) for path in places}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


# Attention and MLP of these blocks add nothing.
SILENT_INNER = {
    "inner/attention/out/kernel": 0,
    "inner/attention/out/bias": 0,
    "inner/fc2/kernel": 0,
    "inner/fc2/bias": 0,
}
SILENT_OUTER = {name.replace("inner", "outer"): 0 for name in SILENT_INNER}


# -- Equality with the equations, and with timm


@pytest.mark.parametrize(
    "fields",
    [
        *VARIANTS.values(),
        dict(se=True, mlp_ratio=2.5),
        dict(vanilla_blocks=(1,), depth=4),
        dict(depth=1, num_classes=0, outer_heads=1, inner_heads=4),
        dict(patch_size=8, inner_stride=3, depth=1),  # words of 3x3 = ceil(8 / 3) squared
    ],
    ids=lambda fields: "-".join(fields) or "official",
)
def test_equals_the_equations(fields):
    model, params, images = build(**fields)
    logits, _ = numpy_tnt.tnt(model, params, images)
    np.testing.assert_allclose(apply(model, params, images), logits, rtol=1e-5, atol=1e-5)


@lineages("official", "legacy", "mindspore_pets")
def test_trap_1_every_norm_where_its_epsilon_matters(fields):
    """Updates are so small that what every norm reads has a variance of the order of epsilon."""
    model, params, images = build(gain=1e-3, depth=2, **fields)
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


@pytest.mark.parametrize("lineage", ["official", "legacy"])
def test_equals_timm_in_values_and_gradients(lineage):
    with np.load(pathlib.Path(models.GOLDEN) / f"tnt_{lineage}.npz") as golden:
        golden = dict(golden)
    gradients = {
        name.removeprefix("gradient "): x for name, x in golden.items() if name.startswith("grad")
    }
    weights = timm_weights.random_state({name: x.shape for name, x in gradients.items()})
    params, expected = timm_weights.to_flax(weights), timm_weights.to_flax(gradients)
    model = TNT(**models.OUR_FIELDS, **VARIANTS[lineage])
    images = jnp.asarray(models.images())
    check_same_shapes(model, params, images)

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
    assert worst_relative_difference(found, expected) < 1e-3


def check_same_shapes(model, params, images):
    """Trap 18: names and shapes are the network's, none missing, none too many."""
    shapes = param_shapes(model, images.shape)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, shapes)


def worst_relative_difference(found, expected):
    difference = jax.tree.map(
        lambda x, y: float(np.linalg.norm(x - y) / np.linalg.norm(y)), found, expected
    )
    return max(jax.tree.leaves(difference))


# -- The stem (traps 3, 4, 10, 11)


@pytest.mark.parametrize("conv_first", [False, True])
def test_trap_3_windows_begin_three_pixels_before_their_word(conv_first):
    """All impulses of one patch: image p has a single 1, at pixel p."""
    impulses = jnp.eye(256).reshape(256, 16, 16, 1)
    kernel = normal(7, 7, 1, 2)
    embed = WordEmbedding(2, conv_first=conv_first, use_bias=False)
    words = embed.apply({"params": {"conv": {"kernel": kernel}}}, impulses)
    expected = np.zeros((16, 16, 4, 4, 2), np.float32)
    for y, x, row, column in np.ndindex(16, 16, 4, 4):
        dy, dx = y - (4 * row - 3), x - (4 * column - 3)
        if 0 <= dy < 7 and 0 <= dx < 7:
            expected[y, x, row, column] = kernel[dy, dx, 0]
    np.testing.assert_allclose(words.reshape(expected.shape), expected, atol=1e-6)


@pytest.mark.parametrize(
    "conv_first, changed", [(False, {0}), (True, {0, 1, 3, 4})], ids=["official", "legacy"]
)
def test_trap_4_a_pixel_at_a_patch_corner(conv_first, changed):
    """Pixel (15, 15) is the lower right corner of the first patch of 2 x 3."""
    embed = WordEmbedding(4, conv_first=conv_first)
    images = normal(1, 32, 48, 3)
    variables = jit(embed.init)(jax.random.key(0), images)
    before = jit(embed.apply)(variables, images)
    after = jit(embed.apply)(variables, images.at[0, 15, 15].add(1.0))
    differs = np.asarray((before != after).any(axis=(2, 3)))[0]
    assert set(np.flatnonzero(differs)) == changed


def test_trap_10_word_positions_are_word_by_channel():
    model, params, images = build(depth=1)
    params = edited(params, SILENT_INNER | {"word_embed/conv/kernel": 0, "conv/bias": 0})
    params["word_pos"] = np.arange(16 * 8, dtype=np.float32).reshape(1, 16, 8)
    (block,) = outputs(model, params, images)
    expected = np.broadcast_to(params["word_pos"][:, None], (2, 6, 16, 8))
    np.testing.assert_array_equal(block["words"], expected)


@pytest.mark.parametrize("norm_each_word", [False, True])
def test_trap_11_a_sentence_is_word_after_word(norm_each_word):
    """Word m alone has a large channel c, so that m * C + c is the largest of the sentence."""
    words = jnp.eye(16 * 8).reshape(1, 128, 16, 8)
    project = WordsToSentences(128, norm_each_word=norm_each_word, norm_out=False)
    params = jit(project.init)(jax.random.key(0), words)["params"]
    params["dense"]["kernel"] = jnp.eye(128)
    out = jit(project.apply)({"params": params}, words)
    np.testing.assert_array_equal(out[0].argmax(axis=-1), np.arange(128))


@pytest.mark.parametrize(
    "fields, norm1, dense, norm2",
    [
        ({}, (3, 128), {"kernel"}, True),
        (VARIANTS["legacy"], (3, 8), {"kernel", "bias"}, False),
        (VARIANTS["mindspore"], (3, 128), {"kernel"}, True),
        (VARIANTS["mindspore_pets"], (3, 128), {"kernel", "bias"}, False),
    ],
    ids=VARIANTS.keys(),
)
def test_trap_5_shapes_of_the_bridge(fields, norm1, dense, norm2):
    bridge = build(**fields)[1]["blocks_0"]["proj"]
    assert bridge["norm1"]["scale"].shape == norm1
    assert bridge["dense"].keys() == dense
    assert ("norm2" in bridge) == norm2


@pytest.mark.parametrize(
    "fields, dense, norm2",
    [
        ({}, {"kernel", "bias"}, True),
        (VARIANTS["legacy"], {"kernel", "bias"}, True),
        (VARIANTS["mindspore"], {"kernel"}, True),
        (VARIANTS["mindspore_pets"], {"kernel", "bias"}, False),
    ],
    ids=VARIANTS.keys(),
)
def test_trap_7_shapes_of_the_stem(fields, dense, norm2):
    stem = build(**fields)[1]["proj"]
    assert stem["norm1"]["scale"].shape == (128,)  # over all words, in every lineage
    assert stem["dense"].keys() == dense
    assert ("norm2" in stem) == norm2


# -- The bridge (traps 12, 13): who reaches whom


def sentences_of_one_block(model, params, images):
    return block_outputs(model, {"params": params}, images)[0]["sentences"]


def small_block(vanilla=False):
    inner = None if vanilla else TransformerBlock(2)
    return TNTBlock(inner, WordsToSentences(24), TransformerBlock(3))


def test_trap_12_the_bridge_adds_word_group_i_to_sentence_i_and_spares_the_class_token():
    words, sentences = normal(2, 6, 16, 8), normal(2, 7, 24, seed=1)
    block = small_block()
    shapes = jax.eval_shape(
        lambda: block.init(jax.random.key(0), words, sentences, None, train=False)
    )
    params = edited(numpy_tnt.random_params(shapes["params"]), SILENT_OUTER)
    step = jit(functools.partial(block.apply, drop_path_rate=None, train=False))
    new_words, new = step({"params": params}, words, sentences)
    np.testing.assert_array_equal(new[:, 0], sentences[:, 0])
    update = WordsToSentences(24).apply({"params": params["proj"]}, new_words)
    np.testing.assert_allclose(new[:, 1:] - sentences[:, 1:], update, atol=1e-5)


def test_trap_12_patch_i_reaches_only_sentence_i_before_the_outer_attention():
    """By the support of the Jacobian of (sentence n) with respect to (patch k)."""
    model, params, images = build((1, 32, 48, 3), depth=1)
    params = edited(params, SILENT_OUTER)
    direction = normal(24, seed=2)  # a sum over the channels would vanish behind a LayerNorm
    jacobian = jit(jax.jacrev(lambda x: sentences_of_one_block(model, params, x)[0] @ direction))(
        images
    )
    per_patch = np.abs(jacobian).reshape(7, 2, 16, 3, 16, 3).max(axis=(2, 4, 5)).reshape(7, 6)
    expected = np.concatenate([np.zeros((1, 6), bool), np.eye(6, dtype=bool)])
    np.testing.assert_array_equal(per_patch > 0, expected)
    pixels = np.abs(jacobian).reshape(7, 2, 16, 3, 16, 3).max(axis=(0, 5))
    assert (pixels > 0).all()  # every pixel of every patch is read


def test_trap_13_sentences_are_their_start_plus_the_bridges_of_updated_words():
    model, params, images = build()
    params = edited(params, SILENT_OUTER)
    blocks = outputs(model, params, images)
    for i, (before, after) in enumerate(itertools.pairwise(blocks), start=1):
        bridge = jax.tree.map(lambda x, i=i: x[i], params["blocks_0"]["proj"])
        update = WordsToSentences(24).apply({"params": bridge}, after["words"])
        assert np.abs(after["words"] - before["words"]).max() > 0.1
        change = after["sentences"] - before["sentences"]
        np.testing.assert_allclose(change[:, 1:], update, atol=2e-5)
        np.testing.assert_array_equal(change[:, 0], 0)


# -- Gradients


def loss(model, images, params):
    weights = normal(2, 5, seed=3)
    return jnp.sum(weights * model.apply({"params": params}, images))


@functools.cache
def value_and_gradients(lineage, **fields):
    model, params, images = build(**VARIANTS[lineage], **fields)
    return jit(jax.value_and_grad(functools.partial(loss, model, images)))(params)


# The gradients of the official and the legacy network are also compared with timm's above.
@pytest.mark.slow
@pytest.mark.parametrize("lineage", ["official", "mindspore_pets"])
def test_every_parameter_gets_a_gradient(lineage):
    _, gradients = value_and_gradients(lineage)
    gradients = flax.traverse_util.flatten_dict(gradients, sep="/")
    largest = max(float(jnp.abs(g).max()) for g in gradients.values())
    for path, gradient in gradients.items():
        if path.endswith("key/bias"):  # moves all scores of a query alike: no effect
            assert jnp.abs(gradient).max() < 1e-6 * largest, path
            continue
        # One row per block, or per position.
        if path.endswith("_pos"):
            gradient = gradient[0]
        elif not path.startswith("blocks"):
            gradient = gradient[None]
        for row in gradient:
            assert np.mean(np.abs(row) > 1e-7 * largest) > 0.98, path


WAYS = [
    dict(inner_impl="cpu", outer_impl="cpu"),
    dict(remat="block"),
    dict(remat="inner", inner_impl="cpu"),
    dict(inner_impl="lanes"),
]


@pytest.mark.parametrize("fields", WAYS, ids=str)
@pytest.mark.parametrize("lineage", ["official", "mindspore_pets"])
def test_every_way_to_compute_gives_the_same(lineage, fields):
    plain = dict(inner_impl="reference", outer_impl="reference", remat="none")
    value, gradients = value_and_gradients(lineage, **plain)
    other_value, other_gradients = value_and_gradients(lineage, **(plain | fields))
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    assert_near(other_gradients, gradients)


def assert_near(found, expected):
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6 * largest)


@pytest.mark.parametrize("remat", ["none", "inner", "block"])
def test_remat_is_there_when_asked_for(remat):
    model, params, images = build(remat=remat)
    jaxpr = jax.make_jaxpr(functools.partial(loss, model, images))(params)
    found = [e for e in equations(jaxpr) if e.primitive.name in ("checkpoint", "remat2")]
    assert "scan" in {e.primitive.name for e in equations(jaxpr)}
    widths = {
        e.outvars[0].aval.shape[-1]
        for outer in found
        for e in equations(outer.params["jaxpr"])
        if e.primitive.name == "dot_general"
    }
    # 32 and 96 are the MLPs of words and sentences.
    assert (32 in widths, 96 in widths) == (remat != "none", remat == "block")


def test_only_the_plain_definition_has_forward_mode_derivatives():
    model, params, images = build(inner_impl="reference", outer_impl="reference", depth=1)
    moved = jax.jvp(lambda x: model.apply({"params": params}, x), (images,), (images,))[1]
    assert jnp.isfinite(moved).all() and jnp.abs(moved).max() > 0
    fast = model.clone(outer_impl="cpu")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: fast.apply({"params": params}, x), (images,), (images,))


@pytest.mark.parametrize(
    "fields", [{}, dict(depth=1), dict(vanilla_blocks=(2,)), dict(se=True)], ids=str
)
def test_the_last_block_may_stand_apart(fields):
    """Where intermediates are asked for, all of it is computed; the results must not change."""
    model, params, images = build(**fields)

    def logits_and_gradients(mutable):
        def loss(params):
            found = model.apply({"params": params}, images, mutable=mutable)
            logits = found[0] if mutable else found
            return jnp.sin(logits).sum(), logits

        return jit(jax.grad(loss, has_aux=True))(params)

    gradients, logits = logits_and_gradients(False)
    all_gradients, all_logits = logits_and_gradients(["intermediates"])
    np.testing.assert_allclose(logits, all_logits, atol=2e-6)
    assert_near(gradients, all_gradients)


@pytest.mark.parametrize("se", [False, True])
def test_the_last_block_computes_its_mlp_for_the_class_token_alone(se):
    model, params, images = build(se=se)
    jaxpr = jax.make_jaxpr(model.apply)({"params": params}, images)
    shapes = {
        e.outvars[0].aval.shape for e in equations(jaxpr) if e.primitive.name == "dot_general"
    }
    assert ((2, 96) in shapes) == (not se)  # squeeze-excite reads the mean over all tokens


# -- Scanned groups and what comes out of them


def test_groups_are_runs_of_equal_blocks():
    def groups(**fields):
        return list(TNT(**(SMALL | fields)).groups())

    assert groups() == [(0, 3, False)]
    assert groups(depth=6, vanilla_blocks=(0, 3, 4)) == [
        (0, 1, True),
        (1, 3, False),
        (3, 5, True),
        (5, 6, False),
    ]
    names = {name for name in build(depth=6, vanilla_blocks=(0, 3, 4))[1] if "blocks" in name}
    assert names == {"blocks_0", "blocks_1", "blocks_3", "blocks_5"}


def test_weights_of_another_depth_are_refused():
    params, images = build(depth=3)[1:]
    with pytest.raises(InputError, match=r"the weights' blocks_0 has \[3\] blocks, not 2"):
        build(depth=2)[0].apply({"params": params}, images)


def test_a_scanned_group_is_its_blocks_one_after_the_other():

    model, params, images = build(vanilla_blocks=(2,))
    blocks = outputs(model, params, images)
    unstacked = list(numpy_tnt.unstacked_blocks(params))
    words, sentences = blocks[0]["words"], blocks[0]["sentences"]
    for i in (1, 2):
        block = small_block(vanilla=i == 2)
        step = jit(functools.partial(block.apply, drop_path_rate=None, train=False))
        words, sentences = step({"params": unstacked[i]}, words, sentences)
        np.testing.assert_allclose(blocks[i]["words"], words, atol=1e-5)
        np.testing.assert_allclose(blocks[i]["sentences"], sentences, atol=1e-5)


def test_block_outputs():
    model, params, images = build(depth=4, vanilla_blocks=(2,))
    blocks = outputs(model, params, images)
    shapes = {
        "words": (2, 6, 16, 8),
        "sentences": (2, 7, 24),
        "outer_attention": (2, 3, 7, 7),
        "inner_attention": (2, 6, 2, 16, 16),
    }
    for i, block in enumerate(blocks):
        expected = dict(shapes)
        if i == 2:
            del expected["inner_attention"]
        assert {name: x.shape for name, x in block.items()} == expected
        for name in expected:
            if name.endswith("attention"):
                np.testing.assert_allclose(block[name].sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(blocks[1]["words"], blocks[2]["words"])  # vanilla: left alone

    logits, trace = numpy_tnt.tnt(model, params, images)
    for i, block in enumerate(blocks):
        words, sentences, inner, outer = (
            np.stack(x) for x in zip(*[image[i] for image in trace], strict=True)
        )
        np.testing.assert_allclose(block["words"], words, rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(block["sentences"], sentences, rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(block["outer_attention"], outer, atol=1e-5)
        if i != 2:
            np.testing.assert_allclose(block["inner_attention"], inner, atol=1e-5)

    last = np.asarray(blocks[-1]["sentences"], np.float64)[:, 0]
    features = numpy_tnt.layer_norm(params["norm"], last, 1e-5)
    np.testing.assert_allclose(numpy_tnt.dense(params["head"], features), logits, atol=1e-5)


def test_block_outputs_without_any_inner_branch():
    model, params, images = build(inner_heads=0)
    assert "inner" not in params["blocks_0"]
    blocks = jax.eval_shape(functools.partial(block_outputs, model), {"params": params}, images)
    assert all("inner_attention" not in block for block in blocks)


def scan_outputs(function, *args):
    """How many stacked arrays the scans of `function` return besides words, sentences, number."""
    scans = [e for e in equations(jax.make_jaxpr(function)(*args)) if e.primitive.name == "scan"]
    assert scans
    return sum(len(e.outvars) - 3 for e in scans)


def test_nothing_is_kept_from_the_blocks_when_nobody_asks():
    model, params, images = build()
    variables = {"params": params}
    out = jax.eval_shape(model.apply, variables, images)
    assert isinstance(out, jax.ShapeDtypeStruct)  # logits alone, no state beside them
    assert scan_outputs(model.apply, variables, images) == 0
    assert scan_outputs(functools.partial(block_outputs, model), variables, images) == 4


def test_what_a_caller_of_block_outputs_drops_is_not_computed():
    model, params, images = build()

    def compiled(names):
        def chosen(params):
            block = block_outputs(model, {"params": params}, images)[-1]
            return [block[name] for name in names]

        return jit(chosen).lower(params).compile().as_text()

    stacked = "f32[3,2,6,2,16,16]"  # the inner attention of three blocks
    assert stacked in compiled(["inner_attention"])
    assert stacked not in compiled(["sentences"])


# -- Training mode (trap 14)

# Every update is a constant: 1 of attention, 10 of the MLP, 100 of the bridge.
CONSTANT_UPDATES = {
    name: {"attention/out/bias": 1, "fc2/bias": 10}.get(name.split("/", 1)[1], 0)
    for name in SILENT_INNER | SILENT_OUTER
} | {
    "blocks_0/proj/norm2/scale": 0,
    "blocks_0/proj/norm2/bias": 100,
    "word_embed/conv/kernel": 0,
    "word_embed/conv/bias": 0,
    "word_pos": 0,
    "cls_token": 0,
    "sentence_pos": 0,
}


def decode(change, keep):
    """Splits (attention + 10 MLP) / keep into two arrays of zeros and ones."""
    code = np.rint(np.asarray(change) * keep)
    np.testing.assert_allclose(change, code / keep, atol=1e-3)
    assert set(np.unique(code)) <= {0, 1, 10, 11}
    return code % 10, code // 10


def dropped_updates(model, params, images, key):
    """For every block, the masks of the inner updates (B, N) and of the outer ones (B,)."""
    run = functools.partial(model.apply, train=True, mutable=CAPTURED)
    _, state = jit(run)({"params": params}, images, rngs={"dropout": key})
    words = jnp.diff(captured(state)["words"], axis=0, prepend=0)
    sentences = np.array(jnp.diff(captured(state)["sentences"], axis=0, prepend=0))
    stem = np.zeros((1, 1, 1, 1), np.float32)  # the class token starts at 0, the others at the stem
    masks = []
    for i, rate in enumerate(np.linspace(0, model.drop_path, model.depth)):
        word_change, sentence_change = np.asarray(words[i]), sentences[i] - stem[0]
        sentence_change[:, 1:] -= 100  # the bridge is never dropped
        np.testing.assert_array_equal(word_change, word_change[:, :, :1, :1] + 0 * word_change)
        np.testing.assert_allclose(
            sentence_change, sentence_change[:, :1, :1] + 0 * sentence_change, atol=1e-3
        )
        inner = decode(word_change[:, :, 0, 0], 1 - rate)
        outer = decode(sentence_change[:, 0, 0], 1 - rate)
        masks.append((*inner, *outer))
    return masks


def test_trap_14_drop_path_masks():
    model, params, images = build((64, 32, 48, 3), drop_path=0.5)
    params = edited(params, CONSTANT_UPDATES)
    params["proj"] = edited(params["proj"], {"norm2/scale": 0, "norm2/bias": 0})
    masks = jax.tree.map(np.asarray, dropped_updates(model, params, images, jax.random.key(1)))

    assert all((mask == 1).all() for mask in masks[0])  # block 0 drops nothing
    for i, keep in ((1, 0.75), (2, 0.5)):
        for mask in masks[i]:
            assert abs(mask.mean() - keep) < 4 * (keep * (1 - keep) / mask.size) ** 0.5
        for mask in masks[i][:2]:
            assert (mask != mask[:, :1]).any()  # one draw per sentence, not per image
    # All draws are different ones: two sites, two blocks, or word and sentence masks agree by
    # chance only.
    draws = [mask for block in masks[1:] for mask in block]
    for mask, other in itertools.combinations(draws, 2):
        one, two = np.broadcast_arrays(*(x.reshape(64, -1) for x in (mask, other)))
        for column in range(one.shape[1]):
            assert (one[:, column] != two[:, column]).any()
    inner = [mask for block in masks[1:] for mask in block[:2]]
    for mask, other in itertools.combinations(inner, 2):
        assert abs(np.corrcoef(mask.ravel(), other.ravel())[0, 1]) < 0.25  # 384 draws: 5 sigma


@functools.cache
def official_logits():
    return apply(*build())


@pytest.mark.parametrize(
    "rates",
    [{"dropout": 0.3}, {"attention_dropout": 0.3}, {"drop_path": 0.5}],
    ids=lambda rates: next(iter(rates)),
)
def test_training_mode_is_random_and_evaluation_is_not(rates):
    model, params, images = build(**rates)
    variables = {"params": params}
    same_program = {str(jax.make_jaxpr(m.apply)(variables, images)) for m in (model, TNT(**SMALL))}
    assert len(same_program) == 1
    train = jit(lambda key: model.apply(variables, images, train=True, rngs={"dropout": key}))
    one, same, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-2
    assert np.abs(one - official_logits()).max() > 1e-2
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        model.apply(variables, images, train=True)


def test_training_mode_without_rates_needs_no_rng():
    logits = apply(*build(), train=True)
    np.testing.assert_allclose(logits, official_logits(), atol=1e-6)


def test_dropout_of_positions_falls_on_sentences_alone():
    model, params, images = build((8, 32, 48, 3), depth=1, dropout=0.5)
    params = edited(params, SILENT_INNER | SILENT_OUTER | {"blocks_0/proj/norm2/scale": 0})
    params = edited(params, {"blocks_0/proj/norm2/bias": 0})

    run = functools.partial(model.apply, train=True, mutable=CAPTURED)
    rngs = {"dropout": jax.random.key(0)}
    trained = captured(jit(run)({"params": params}, images, rngs=rngs)[1])
    _, trace = numpy_tnt.tnt(model, params, images)
    words, sentences = (np.stack([image[0][i] for image in trace]) for i in (0, 1))
    np.testing.assert_allclose(trained["words"][0], words, atol=1e-5)
    ratio = np.asarray(trained["sentences"][0] / sentences)
    np.testing.assert_allclose(ratio, 2 * np.rint(ratio / 2), atol=0.02)
    assert 0.45 < np.mean(ratio > 1) < 0.55
    assert 0 < np.mean(ratio[:, 0] > 1) < 1  # the class token's too


# -- Initial values (trap 15)


def test_trap_15_initial_values():
    model = TNT(outer_dim=192, inner_dim=24, outer_heads=3, inner_heads=4, depth=2)
    params = jit(model.init)(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    for name in ("sentence_pos", "word_pos", "cls_token"):
        x = params[name]
        assert abs(x.std() - 0.02) < 0.02 * 4 / (2 * x.size) ** 0.5, name
    assert abs(params["sentence_pos"]).max() > 0.07  # not cut at 2 sigma
    for kernel in (params["head"], params["proj"]["dense"], params["blocks_0"]["proj"]["dense"]):
        assert abs(kernel["kernel"].std() - 0.02) < 2e-4  # 73,728 draws or more: 4 sigma
        assert 0.075 < abs(kernel["kernel"]).max() < 0.14
    np.testing.assert_array_equal(params["head"]["bias"], 0)
    np.testing.assert_array_equal(params["proj"]["dense"]["bias"], 0)
    query = params["blocks_0"]["outer"]["attention"]["query"]["kernel"]
    assert (query[0] != query[1]).mean() > 0.99  # every block of a group draws its own


@pytest.mark.parametrize("channels, bound", [(3, 0.0824786), (1, 0.1428571)])
def test_trap_15_the_stems_convolution_keeps_torchs_default(channels, bound):
    embed = WordEmbedding(1024)
    conv = jit(embed.init)(jax.random.key(0), jnp.zeros((1, 16, 16, channels)))["params"]["conv"]
    for x in (conv["kernel"], conv["bias"]):  # uniform in +-bound
        assert 0.98 * bound < x.max() <= bound
        assert -bound <= x.min() < -0.98 * bound
        assert abs(x.std() / (bound / 3**0.5) - 1) < 0.08
        assert abs(x.mean()) < 0.1 * bound


# -- Sizes and errors (traps 17, 18)


@pytest.mark.parametrize(
    "image_shape, fields",
    [
        ((1, 16, 16, 3), {}),
        ((3, 48, 16, 1), {}),
        ((2, 16, 64, 5), {}),
        ((1, 24, 40, 3), dict(patch_size=8)),
    ],
)
def test_any_image_size_and_number_of_channels(image_shape, fields):
    model, params, images = build(image_shape, depth=1, **fields)
    patch = model.patch_size
    sentences = (image_shape[1] // patch) * (image_shape[2] // patch)
    assert params["sentence_pos"].shape == (1, sentences + 1, 24)
    assert params["word_embed"]["conv"]["kernel"].shape == (7, 7, image_shape[3], 8)
    logits = jax.eval_shape(model.apply, {"params": params}, images)
    assert (logits.shape, logits.dtype) == ((image_shape[0], 5), jnp.float32)


def test_no_classes_give_features():
    model, params, images = build(num_classes=0)
    assert "head" not in params
    assert jax.eval_shape(model.apply, {"params": params}, images).shape == (2, 24)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(gelu="exact"), "gelu='exact' is none of ['erf', 'tanh']"),
        (dict(remat="full"), "remat='full' is none of ('auto', 'none', 'inner', 'block')"),
        (
            dict(inner_impl="gpu"),
            "inner_impl='gpu' is none of ('auto', 'reference', 'cpu', 'lanes', 'pallas')",
        ),
        (
            dict(outer_impl="lanes"),
            "outer_impl='lanes' is none of ('auto', 'reference', 'cpu', 'pallas')",
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
def test_impossible_fields(fields, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + r"(\n|$)"):
        build(**fields)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 30, 32, 3), "image size 30x32 is not divisible by patch size 16"),
        ((1, 32, 8, 3), "image size 32x8 is not divisible by patch size 16"),
        ((1, 0, 16, 3), "image size 0x16 is not divisible by patch size 16"),
    ],
)
def test_impossible_image_sizes(shape, message):
    with pytest.raises(ValueError, match="^" + message + r"(\n|$)"):
        build(shape)


def test_images_of_the_wrong_rank():
    # Called alone: the shape checks that only tests switch on would come first.
    with pytest.raises(
        ValueError, match=r"images must be \[B, H, W, channels\], not \[32, 32, 3\]"
    ):
        check_images(jnp.zeros((32, 32, 3)), 16)


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (2, 64, 48, 3)])
def test_trap_17_weights_know_their_image_size(shape):
    model, params, _ = build()
    sentences = shape[1] * shape[2] // 256 + 1
    message = (
        f"the weights' sentence_pos has shape (1, 7, 24), but these images and this patch size "
        f"need (1, {sentences}, 24): give images of the size the weights were made for"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(model.apply, {"params": params}, normal(*shape))


def test_trap_18_weights_of_another_network_do_not_load():
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

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def test_communication_can_be_seen():
    split = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    text = jit(jnp.mean).lower(jax.device_put(normal(16, 5), split)).compile().as_text()
    assert "num_partitions=8" in text
    assert "all-reduce" in text


@pytest.mark.parametrize("fields", [VARIANTS["legacy"], dict(drop_path=0.1, dropout=0.1)])
def test_a_batch_split_over_devices_needs_no_communication(fields):
    model, params, images = build((16, 32, 48, 3), depth=2, **fields)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
    params, images = jax.device_put(params, whole), jax.device_put(images, split)

    def forward(params, images):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply({"params": params}, images, train="dropout" in fields, rngs=rngs)

    compiled = jit(forward).lower(params, images).compile()
    text = compiled.as_text()
    assert "num_partitions=8" in text
    assert not [name for name in COLLECTIVES if name in text]
    assert compiled(params, images).sharding.is_equivalent_to(split, 2)


def test_bfloat16_stays_near_float32():
    model, params, images = build(dtype=jnp.bfloat16)
    half, exact = apply(model, params, images), official_logits()
    assert half.dtype == jnp.float32
    difference = np.abs(half - exact).max()
    assert 0 < difference < 0.03 * np.abs(exact).max(), difference


def test_bfloat16_products_but_float32_norms_and_softmax():
    model, params, images = build(dtype=jnp.bfloat16)
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


def test_images_that_were_not_normalized():
    with pytest.raises(ValueError, match="must be normalized to floats first, these are uint8"):
        check_images(jnp.zeros((1, 32, 32, 3), jnp.uint8), 16)


def test_an_empty_batch():
    model = TNT(**SMALL)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    logits = jax.eval_shape(model.apply, shapes, jnp.zeros((0, 32, 32, 3)))
    assert logits.shape == (0, model.num_classes)
