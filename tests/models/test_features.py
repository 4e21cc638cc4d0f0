# SPDX-License-Identifier: Apache-2.0
"""Maps of features from images of any size, with the shapes of the documentation."""

import functools
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.helpers.networks import SMALL, jit
from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import named_leaves
from tnt_flax.models import TNT, PyramidTNT, block_outputs, create_model, feature_maps
from tnt_flax.models.features import with_positions
from tnt_flax.models.layers import resample

SLOW = pytest.mark.slow
PYRAMID = dict(outer_dim=8, inner_dim=2, outer_heads=2, inner_heads=1, depths=(1, 1, 1, 1))


def initial(model, size):
    """Shapes of the variables of `model` for square images."""
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def map_shapes(model, variables, height, width):
    images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    maps = jax.eval_shape(functools.partial(feature_maps, model), variables, images)
    assert {each.valid for each in maps} == {(height, width)}
    return [(each.stride, *each.features.shape) for each in maps]


@pytest.mark.parametrize(
    "height, width, tnt, pyramid",
    [
        (224, 224, (14, 14), [(28, 28), (14, 14), (7, 7), (4, 4)]),
        pytest.param(8, 100, (1, 7), [(4, 13), (2, 7), (1, 4), (1, 2)], marks=SLOW),
        pytest.param(384, 384, (24, 24), [(48, 48), (24, 24), (12, 12), (6, 6)], marks=SLOW),
        pytest.param(512, 512, (32, 32), [(64, 64), (32, 32), (16, 16), (8, 8)], marks=SLOW),
        pytest.param(800, 1333, (50, 84), [(100, 167), (50, 84), (25, 42), (13, 21)], marks=SLOW),
    ],
)
def test_shapes_equal_the_documented_table(height, width, tnt, pyramid, root):
    model = create_model("tnt_s_patch16_224")
    shapes = map_shapes(model, initial(model, 224), height, width)
    assert shapes == [(16, 2, *tnt, 384)] * 4
    model = create_model("ptnt_s_patch16_256")
    shapes = map_shapes(model, initial(model, 256), height, width)
    expected = zip((8, 16, 32, 64), pyramid, (128, 256, 512, 512), strict=True)
    assert shapes == [(stride, 2, *grid, d) for stride, grid, d in expected]
    as_text = lambda grid, width: f"{grid[0]}x{grid[1]}x{width}"
    stages = ", ".join(map(as_text, pyramid, (128, 256, 512, 512)))
    row = f"| {height}x{width} | {as_text(tnt, 384)} | {stages} |"
    assert (row in (root / "docs/feature_maps.md").read_text()) == (height != 8)


def small_tnt():
    return TNT(**SMALL | dict(depth=2)), (1, 32, 32, 3)


def small_pyramid():
    return PyramidTNT(**PYRAMID | dict(num_classes=3)), (1, 64, 64, 3)


@pytest.mark.slow
@pytest.mark.parametrize("make", [small_tnt, small_pyramid])
def test_maps_are_the_outputs_of_the_blocks(make):
    """At the size of the weights, where the head's input comes from the last map."""
    model, shape = make()
    images = jnp.asarray(np.random.RandomState(0).standard_normal(shape), jnp.float32)
    variables = jit(model.init)(jax.random.key(0), images)
    features = model.clone(num_classes=0)
    both = jit(lambda *args: (feature_maps(model, *args), features.apply(*args)))
    maps, features = both(variables, images)
    if isinstance(model, PyramidTNT):
        last = maps[-1].features.reshape(1, -1, maps[-1].features.shape[-1])
        spread = jnp.sqrt(last.var(-1, keepdims=True) + 1e-5)
        normal = (last - last.mean(-1, keepdims=True)) / spread
        np.testing.assert_allclose(normal.mean(1), features, atol=1e-5)
    else:
        assert [each.features.shape for each in maps] == [(1, 2, 2, 24)] * 2
        blocks = block_outputs(model, variables, images)
        for each, block in zip(maps, blocks, strict=True):
            sentences = block["sentences"][:, 1:].reshape(each.features.shape)
            np.testing.assert_allclose(each.features, sentences, atol=1e-5)


@pytest.mark.slow
def test_images_are_padded_with_zeros_to_the_right_and_below():
    model, _ = small_tnt()
    images = jnp.asarray(np.random.RandomState(0).standard_normal((1, 20, 40, 3)), jnp.float32)
    padded = jnp.pad(images, ((0, 0), (0, 12), (0, 8), (0, 0)))
    variables = jit(model.init)(jax.random.key(0), jnp.zeros((1, 48, 32, 3)))  # as many sentences
    run = jit(functools.partial(feature_maps, model, at=(1,)))
    (ours,), (theirs,) = run(variables, images), run(variables, padded)
    np.testing.assert_array_equal(ours.features, theirs.features)
    assert (ours.valid, theirs.valid) == ((20, 40), (32, 48))


@pytest.mark.slow
def test_gradients_reach_all_but_the_head_and_frozen_statistics_stay():
    """At another size than the weights', so that positions are resampled."""
    model, shape = small_pyramid()
    variables = jit(model.init)(jax.random.key(0), jnp.zeros(shape))
    images = jnp.asarray(np.random.RandomState(0).standard_normal((2, 90, 70, 3)), jnp.float32)

    def loss(params, mutable):
        found = feature_maps(
            model, {**variables, "params": params}, images, train=True, mutable=mutable
        )
        maps, changed = found if mutable else (found, {})
        return sum((each.features**2).sum() for each in maps), changed

    run = jit(jax.grad(loss, has_aux=True), static_argnums=1)
    gradients, changed = run(variables["params"], ("batch_stats",))
    silent = {name for name, x in named_leaves(gradients).items() if not np.any(x)}
    assert silent <= {"head/kernel", "head/bias", "norm/scale", "norm/bias"}
    for before, after in zip(
        jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(changed), strict=True
    ):
        assert (before != after).all()
    _, changed = jax.eval_shape(lambda params: loss(params, ()), variables["params"])
    assert changed == {}


@pytest.mark.slow
def test_relative_positions_are_resampled_along_four_axes():
    """A ramp along one axis stays a ramp along that axis alone."""
    ramp = jnp.arange(8.0)[:, None, None, None] + jnp.zeros((8, 8, 4, 4))
    table = ramp.reshape(1, 1, 64, 16)
    found = resample(table, 2, [(8, 8), (4, 4)], [(16, 12), (2, 6)]).reshape(16, 12, 2, 6)
    expected = (np.arange(16) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(
        found[4:12], np.broadcast_to(expected[4:12, None, None, None], (8, 12, 2, 6)), atol=1e-5
    )
    swapped = jnp.moveaxis(ramp, (0, 1), (1, 0)).reshape(1, 1, 64, 16)
    found = resample(swapped, 2, [(8, 8), (4, 4)], [(12, 16), (2, 6)]).reshape(12, 16, 2, 6)
    np.testing.assert_allclose(found[0, 4:12, 0, 0], expected[4:12], atol=1e-5)


def test_unknown_maps_are_refused():
    model, _ = small_pyramid()
    for i in (4, -1):
        with pytest.raises(
            InputError, match=rf"at=\[{i}\]: the maps of this PyramidTNT are 0 to 3"
        ):
            feature_maps(model, initial(model, 64), jnp.zeros((1, 64, 64, 3)), at=(i,))


def test_only_positions_of_squares_are_resampled():
    model, _ = small_tnt()
    params = {"sentence_pos": jnp.zeros((1, 7, 24))}
    assert with_positions(model, params, (2, 3)) is params
    with pytest.raises(InputError, match="these weights have 6 sentences, which form no square"):
        with_positions(model, params, (2, 2))


@pytest.mark.soak
def test_the_segmentation_example_learns_and_plots(root, tmp_path, monkeypatch, capsys):
    source = root / "examples" / "segmentation.py"
    assert len(source.read_text().splitlines()) < 60
    monkeypatch.setattr(sys, "argv", ["segmentation.py", str(tmp_path / "masks.png"), "12"])
    losses = runpy.run_path(str(source))["losses"]
    assert losses[0] == pytest.approx(np.log(3), rel=1e-3)  # of a guess
    assert len(losses) == 12 and np.mean(losses[-3:]) < 0.7 * losses[0]
    assert capsys.readouterr().out.startswith(f"loss 1.10 to {losses[-1]:.2f}; ")
    with Image.open(tmp_path / "masks.png") as picture:
        assert picture.size == (8 * 150, 3 * 100)
