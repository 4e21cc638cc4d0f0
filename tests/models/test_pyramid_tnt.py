# SPDX-License-Identifier: Apache-2.0
"""PyramidTNT against the official code, by goldens of a tiny network."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import tnt_flax
from tests.goldens.scripts.pyramid import CLASSES, FIELDS, GOLDEN, LABELS, SIZE, digest, images
from tests.helpers import networks, numpy_tnt
from tests.helpers.networks import jit
from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import fingerprint, named_leaves
from tnt_flax.models import MODELS, PyramidTNT, block_outputs, create_model
from tnt_flax.models.pyramid_tnt import BatchNorm, stage_grids, word_maps
from tnt_flax.training.optimizer import decay_mask
from tnt_flax.weights import names, write
from tnt_flax.weights.formats import torch
from tnt_flax.weights.read import read_checkpoint

TINY = FIELDS | dict(num_classes=CLASSES)


@pytest.fixture(scope="module")
def found():
    return read_checkpoint(GOLDEN / "tiny.pth.tar", inner_heads=1)


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDEN / "expected.npz") as golden:
        return dict(golden)


def sentences_of_stage(state, i):
    """Returns the sentences after the last block of a stage: [B, N, D]."""
    groups = state["maps"][f"stages_{i}"]
    last = max(groups, key=lambda name: int(name.split("_")[1]))
    return groups[last]["sentences"][0][-1]


# -- Equality with the official code


def test_logits_and_stages_equal_the_official_code(found, expected):
    model = found.network.model.clone(inner_impl="reference", outer_impl="reference")
    run = jit(functools.partial(model.apply, mutable=["maps"]))
    logits, state = run(found.variables, jnp.asarray(images()))
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=5e-6)
    assert np.abs(expected["logits"][0] - expected["logits"][1]).max() > 0.1
    for i in range(4):
        theirs = expected[f"stage_{i}"]
        ours = sentences_of_stage(state, i).reshape(theirs.shape)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.slow
def test_layer_scale_multiplies_the_outputs_of_attention_and_mlp():
    """As if the kernels and biases of `out` and `fc2` were multiplied."""
    model = PyramidTNT(**TINY, layer_scale=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(images()))
    params = flatten_dict(numpy_tnt.random_params(shapes["params"]))
    plain = {path: x for path, x in params.items() if not path[-1].startswith("layer_scale")}
    assert len(plain) < len(params)
    for *block, name in set(params) - set(plain):
        layer = ("fc2",) if name == "layer_scale2" else ("attention", "out")
        for leaf in ("kernel", "bias"):
            scale, path = params[*block, name], (*block, *layer, leaf)
            plain[path] = plain[path] * (scale[:, None] if leaf == "kernel" else scale)
    stats = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes["batch_stats"])

    def logits(model, params):
        variables = {"params": unflatten_dict(params), "batch_stats": stats}
        return jit(model.apply)(variables, jnp.asarray(images()))

    expected = logits(PyramidTNT(**TINY), plain)
    np.testing.assert_allclose(logits(model, params), expected, rtol=1e-4)


@pytest.mark.slow
def test_bfloat16_is_as_near_with_gpu_as_with_the_reference():
    """At the widths of PyramidTNT-Ti."""
    impls = dict(inner_impl="reference", outer_impl="reference")
    reference = tnt_flax.create_model(
        "ptnt_ti_patch16_192", num_classes=10, depths=(1, 1, 1, 1), **impls
    )
    pixels = networks.normal(4, 128, 128, 3)
    variables = jit(reference.init)(jax.random.key(1), pixels)
    model = reference.clone(inner_impl="gpu", outer_impl="gpu")
    networks.check_bfloat16(model, reference, variables, pixels)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["cpu", "gpu"])
def test_loss_gradients_and_statistics_equal_the_official_code(found, expected, impl):
    """With rematerialization, and every block compiled separately."""
    options = dict(remat="block", unroll=True)
    model = found.network.model.clone(inner_impl=impl, outer_impl=impl, **options)
    variables = found.variables

    def loss_of(params):
        logits, changed = model.apply(
            variables | {"params": params},
            jnp.asarray(images()),
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(LABELS))
        return losses.mean(), changed["batch_stats"]

    step = jit(jax.value_and_grad(loss_of, has_aux=True))
    (loss, statistics), gradients = step(variables["params"])
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    tree = names.join_collections({"params": gradients, "batch_stats": statistics})
    theirs = dict(names.export("huawei_pyramid", tree))
    compared = 0
    for key, x in expected.items():
        kind, _, name = key.partition(" ")
        if name.endswith("num_batches_tracked"):
            assert theirs[name] == x == 8 and theirs[name].dtype == np.int64
        elif kind in ("after", "gradient"):
            # A bias before a BatchNorm has the gradient 0, but for rounding; the other gradients
            # pass through norms of two channels, which enlarge it to 1e-4.
            zero = name.startswith("patch_embed") and name.endswith("bias")
            size = max(np.abs(x).max(), 1e-2 if zero else 0)
            atol = size * (1e-5 if kind == "after" else 3e-4)
            np.testing.assert_allclose(theirs[name], x, rtol=0, atol=atol, err_msg=name)
            compared += 1
    assert compared > 30


def test_batch_norm_statistics_equal_torchs_by_hand():
    """1, 2, 3 and 6 have the mean 3 and the unbiased variance 14 / 3."""
    x = jnp.array([1.0, 2.0, 3.0, 6.0]).reshape(2, 2, 1, 1)
    module = BatchNorm()
    variables = module.init(jax.random.key(0), x, train=False)
    apply = functools.partial(module.apply, variables, x)
    out, changed = apply(train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(out.ravel(), (x.ravel() - 3) / np.sqrt(3.5 + 1e-5), rtol=1e-6)
    assert named_leaves(changed["batch_stats"]) == pytest.approx(
        {"mean": 0.1 * 3, "var": 0.9 + 0.1 * 14 / 3, "count": 1}
    )
    for frozen in (apply(train=True), apply(train=False)):
        np.testing.assert_allclose(frozen.ravel(), x.ravel() / np.sqrt(1 + 1e-5), rtol=1e-6)


# -- The official files


def test_official_files_are_recognized_and_written_identically(found):
    assert (found.naming, found.network.grid) == ("huawei_pyramid", (8, 8))
    model = found.network.model
    assert isinstance(model, PyramidTNT)
    assert {name: getattr(model, name) for name in TINY} == TINY
    original = torch.read(GOLDEN / "tiny.pth.tar")
    written = dict(names.export("huawei_pyramid", names.join_collections(found.variables)))
    assert sorted(written) == sorted(original)
    for name, x in original.items():
        assert written[name].dtype == x.dtype, name
        np.testing.assert_array_equal(written[name], x)


def test_loading_for_another_size_classes_and_channels(found):
    model, variables = tnt_flax.load(
        GOLDEN / "tiny.pth.tar", inner_heads=1, image_size=(96, 72), num_classes=2, in_channels=1
    )
    images = jax.ShapeDtypeStruct((1, 96, 72, 1), jnp.float32)
    wanted = jax.eval_shape(model.init, jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, dict(wanted))
    same = tnt_flax.load(GOLDEN / "tiny.pth.tar", inner_heads=1, image_size=SIZE)[1]
    assert fingerprint(same) == fingerprint(found.variables)


def test_other_frameworks_have_no_pyramid(found):
    with pytest.raises(InputError, match="tiny.pth.tar is a PyramidTNT, which timm does not have"):
        write.to_framework(found, "timm")
    with pytest.raises(
        InputError, match="words of width 2, not a published size.*set inner_heads="
    ):
        read_checkpoint(GOLDEN / "tiny.pth.tar")
    with pytest.raises(InputError, match="another network, not ptnt_s_patch16_256"):
        read_checkpoint(GOLDEN / "tiny.pth.tar", "ptnt_s_patch16_256", inner_heads=1)
    with pytest.raises(InputError, match="another network, not tnt_s_patch16_224"):
        read_checkpoint(GOLDEN / "tiny.pth.tar", "tnt_s_patch16_224", inner_heads=1)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("ptnt_")])
def test_names_and_shapes_equal_the_official_code(name):
    size = int(name[-3:])
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(create_model(name).init, jax.random.key(0), images)
    exported = names.exported_shapes("huawei_pyramid", names.join_collections(variables))
    shapes = {theirs: x.shape for theirs, x in exported.items()}
    assert digest(shapes) == json.loads((GOLDEN / "names.json").read_text())[name]


# -- The network by itself


@functools.cache
def abstract(**fields):
    """Shapes of the variables of a tiny network."""
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return jax.eval_shape(PyramidTNT(**TINY | fields).init, jax.random.key(0), images)


def test_word_maps_join_neighbouring_sentences():
    """Words numbered by their place in the image; odd grids are padded with zeros."""
    rows, columns = 3, 5
    numbers = 1.0 + jnp.arange(4 * rows * 4 * columns).reshape(4 * rows, 4 * columns)
    words = numbers.reshape(rows, 4, columns, 4).swapaxes(1, 2).reshape(1, rows * columns, 16, 1)
    padded = np.pad(np.asarray(numbers), ((0, 4), (0, 4)))
    found = np.asarray(word_maps(words, (rows, columns)))[..., 0]
    for tile, (y, x) in zip(found, np.ndindex(2, 3), strict=True):
        np.testing.assert_array_equal(tile, padded[8 * y : 8 * y + 8, 8 * x : 8 * x + 8])


@pytest.mark.slow
def test_initial_values_have_the_official_distributions():
    spread = {
        "stem/sentences_2/conv/kernel": (2 / (9 * 40)) ** 0.5,
        "sentence_merges_1/conv/kernel": (2 / (9 * 160)) ** 0.5,
        "stages_0/relative_pos": 1,
        "stages_1/blocks_2/outer/fc1/kernel": 0.02,
        "sentence_pos": 0.02,
    }
    model, images = PyramidTNT(**TINY | dict(outer_dim=40)), jnp.zeros((1, SIZE, SIZE, 3))

    @jit
    def init(key):
        params = named_leaves(model.init(key, images)["params"])
        return {n: x for n, x in params.items() if n in spread or n.endswith(("bias", "scale"))}

    for name, x in init(jax.random.key(0)).items():
        if name in spread:
            assert x.std() == pytest.approx(spread[name], rel=0.05), name
        else:
            assert (x == name.endswith("scale")).all(), name


def test_kernels_and_relative_positions_decay():
    decayed = {name for name, on in named_leaves(decay_mask(abstract()["params"])).items() if on}
    kinds = {name.rpartition("/")[2] for name in decayed}
    assert kinds == {"kernel", "relative_pos"}
    assert sum(name.endswith("relative_pos") for name in decayed) == 4
    assert "sentence_pos" not in decayed and "word_pos" not in decayed


def test_shapes_of_block_outputs():
    model = PyramidTNT(**TINY | dict(depths=(1, 2, 1, 1)))
    images = jax.ShapeDtypeStruct((2, 32, 72, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    blocks = jax.eval_shape(functools.partial(block_outputs, model), variables, images)
    assert len(blocks) == 5
    assert [b["sentences"].shape[1] for b in blocks] == [36, 10, 10, 3, 2]
    assert stage_grids((4, 9)) == [(4, 9), (2, 5), (1, 3), (1, 2)]
    assert blocks[0]["outer_attention"].shape == (2, 2, 36, 2)  # two squares of 4x4 sentences
    assert blocks[0]["inner_attention"].shape == (2, 36, 1, 16, 16)
    assert ["inner_attention" in b for b in blocks] == [True, True, False, True, True]


@pytest.mark.slow
def test_drop_path_spares_the_first_block(found):
    model = found.network.model.clone(drop_path=0.9)
    apply = functools.partial(model.apply, found.variables, train=True, mutable=["maps"])

    @jit
    def run(key):  # nothing of the later stages is compiled
        state = apply(jnp.asarray(images()), rngs={"dropout": key})[1]
        return sentences_of_stage(state, 0), sentences_of_stage(state, 1)

    one, other = run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(one[0], other[0])
    assert (one[1] != other[1]).any()


def test_dropout_applies_to_positions_and_not_to_sentences(found):
    seen = []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout) and len(context.module.path) == 1:
            seen.append(args[0].shape)
        return call(*args, **kwargs)

    model = found.network.model.clone(dropout=0.5)
    with nn.intercept_methods(watch):
        jax.eval_shape(
            lambda key: model.apply(
                found.variables, jnp.asarray(images()), train=True, rngs={"dropout": key}
            ),
            jax.random.key(0),
        )
    assert seen == [(1, 64, 4)]


@pytest.mark.slow
def test_bfloat16_is_close(found, expected):
    model = found.network.model.clone(dtype=jnp.bfloat16)

    @jit
    def run(variables):
        logits, state = model.apply(variables, jnp.asarray(images()), mutable=["maps"])
        assert logits.dtype == jnp.float32
        return sentences_of_stage(state, 0)

    ours, theirs = run(found.variables), expected["stage_0"]
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, atol=0.03 * theirs.std())


@pytest.mark.parametrize(
    "shape, fields, message",
    [
        ((1, 60, 64, 3), {}, "image size 60x64 is not divisible by patch size 8"),
        ((1, 64, 24, 3), {}, "images of 64x24 are too small: use at least 32 pixels"),
        ((1, 72, 64, 3), {}, r"weights' sentence_pos has shape \(1, 64, 4\), but these images"),
        ((1, 64, 64, 3), dict(inner_impl="lanes"), "inner_impl='lanes' is none of"),
        ((1, 64, 64, 3), dict(drop_path=1.0), r"drop_path=1.0 is outside \[0, 1\)"),
        ((1, 64, 64, 3), dict(depths=(1, 2)), r"depths=\(1, 2\) must be the blocks of 4 stages"),
    ],
)
def test_invalid_images_and_fields_are_refused(found, shape, fields, message):
    model = found.network.model.clone(**fields)
    with pytest.raises(InputError, match=message):
        jax.eval_shape(model.apply, found.variables, jnp.zeros(shape))
