# SPDX-License-Identifier: Apache-2.0
"""`visualize`: attention and features against the network and by hand; figures; errors."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from tests.helpers import small_network
from tnt_flax.__main__ import main
from tnt_flax.inference.preprocess import Preprocessor
from tnt_flax.models.network import BlockLayout
from tnt_flax.tools import attention as tracing
from tnt_flax.tools import figures, visualize
from tnt_flax.weights.read import read_checkpoint


def test_rollout_by_hand():
    attention = softmax(np.random.default_rng(0).normal(size=(2, 2, 4, 4)), -1)
    totals = tracing.rollout(attention.astype(np.float32))
    first, second = ((block.mean(axis=0) + np.eye(4)) / 2 for block in attention)
    np.testing.assert_allclose(totals, [first, second @ first], atol=1e-6)
    np.testing.assert_allclose(totals.sum(axis=-1), 1, atol=1e-6)


def average(values, side, grid):
    """Averages [R, C] over `grid` squares of `side`, which may be smaller at the edges."""
    square = lambda i, j: values[side * i : side * (i + 1), side * j : side * (j + 1)]
    return np.array([[square(i, j).mean() for j in range(grid[1])] for i in range(grid[0])])


def test_rollout_of_a_pyramid():
    """Weights of the mean sentence, for values that are carried through the stages by hand."""
    random = np.random.default_rng(0)
    values = random.normal(size=(5, 6))
    stages = [BlockLayout((5, 6), 1, 4), BlockLayout((3, 3), 2, 2), BlockLayout((2, 2), 4, 1)]
    layouts = [stages[0], *stages]
    averaged = [(1, 1), (1, 1), (1, 1), (2, 2)]
    attention = [
        softmax(random.normal(size=(2, np.prod(layout.grid), np.prod(grid))), -1)
        for layout, grid in zip(layouts, averaged, strict=True)
    ]
    trace = tracing.Trace(None, layouts, False, attention, {}, [], {}, None)
    x = values
    for i, reached in enumerate(trace.rollout_maps()):
        if x.shape != layouts[i].grid:
            x = average(x, 2, layouts[i].grid)
        attended = average(x, layouts[i].reduction, averaged[i]).ravel()
        x = (x + (attention[i].mean(axis=0) @ attended).reshape(x.shape)) / 2
        assert (reached * values).sum() == pytest.approx(x.mean(), abs=1e-6)
        assert reached.sum() == pytest.approx(1)
    assert [trace.enclosing_sentence(block, 4 * 6 + 3) for block in range(4)] == [27, 27, 7, 2]
    assert [maps.shape for maps in trace.attention_maps()] == [(2, *grid) for grid in averaged]


def test_principal_colors_are_aligned_between_depths():
    """Rotated and scaled tokens have the same colors, also on a coarser grid."""
    random = np.random.default_rng(0)
    tokens = random.normal(size=(50, 8)) * [9, 5, 3, 0, 0, 0, 0, 0]
    rotation, _ = np.linalg.qr(random.normal(size=(8, 8)))
    first, second = tracing.principal_colors([tokens, 7 * tokens @ rotation + 1])
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert first.min() == 0 and first.max() == 1 and first.shape == (50, 3)
    grid = tokens[:48].reshape(6, 8, 8).repeat(2, axis=0).repeat(2, axis=1)
    large, small = tracing.principal_colors([grid, -grid[::2, ::2]])
    np.testing.assert_allclose(large[::2, ::2], small, atol=0.05)  # of other percentiles
    (few,) = tracing.principal_colors([random.normal(size=(2, 8))])  # two tokens, one component
    assert few.shape == (2, 3) and np.isfinite(few).all()


def test_tile_and_words_in_place():
    maps = np.arange(2 * 3 * 2 * 3).reshape(2, 3, 2, 3)
    tiled = tracing.tile(maps, zoom=1)
    assert tiled.shape == (2 * 4 - 2, 3 * 5 - 2)
    np.testing.assert_array_equal(tiled[4:6, 10:13], maps[1, 2])
    assert np.isnan(tiled[2:4]).all() and np.isnan(tiled[:, 3:5]).all()

    words = np.arange(6 * 4).reshape(6, 4)  # 2 x 3 sentences of 2 x 2 words
    placed = tracing.words_in_place(words, (2, 3))
    np.testing.assert_array_equal(placed[2:, 4:], words[5].reshape(2, 2))
    assert placed.shape == (4, 6)


def test_similarity():
    vectors = np.float32([[1, 0], [-1, 0], [0, 1], [0, -1]])
    expected = [[1, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 1, -1], [0, 0, -1, 1]]
    np.testing.assert_allclose(tracing.similarity(vectors + 5), expected, atol=1e-5)


def test_overlay_heatmap_darkens_small_weights():
    pixels = np.full((32, 32, 3), 200, np.uint8)
    darkened = figures.overlay_heatmap(pixels, np.float32([[0, 0], [0, 1]]))
    assert darkened[-1, -1].tolist() == [200] * 3 and darkened[0, 0].max() < 40
    assert darkened[:, 0].max() < 40 and darkened[0].max() < 40


@pytest.mark.slow
def test_trace_of_tnt(tmp_path):
    """Traces two images; the class token of the last block gives the prediction by hand."""
    found = read_checkpoint(small_network.save(tmp_path))
    pixels = Preprocessor(found).read(small_network.photo(tmp_path))
    assert pixels.shape == (48, 48, 3)
    first, second = tracing.trace_attention(found, np.stack([pixels, pixels[::-1]]))
    assert first.grid == (3, 3)
    assert [x.shape for x in first.outer_attention] == [(2, 10, 10)] * 3
    assert first.inner_attention[2].shape == (9, 2, 16, 16) and first.words[0].shape == (9, 16, 4)
    np.testing.assert_array_equal(second.pixels, pixels[::-1])
    params = found.params
    for trace in (first, second):
        token = trace.sentences[-1][0]
        token = (token - token.mean()) / np.sqrt(token.var() + 1e-5)
        token = token * params["norm"]["scale"] + params["norm"]["bias"]
        logits = token @ params["head"]["kernel"] + params["head"]["bias"]
        np.testing.assert_allclose(trace.probabilities, softmax(logits, -1), atol=1e-4)
    chosen = tracing.most_attended(first, 2)
    reached = tracing.rollout(first.outer_attention)[-1, 0, 1:]
    assert reached[chosen[0]] == reached.max() and len(chosen) == 2


@pytest.mark.slow
def test_trace_of_a_pyramid(tmp_path):
    """The mean of the last sentences gives the prediction by hand."""
    found = read_checkpoint(
        small_network.save(tmp_path, "ptnt_ti_patch16_192", 64, depths=(1, 2, 1, 1))
    )
    pixels = Preprocessor(found).read(small_network.photo(tmp_path))
    (trace,) = tracing.trace_attention(found, pixels[None])
    assert trace.grid == (8, 8) and [layout.side for layout in trace.layouts] == [1, 2, 2, 4, 8]
    maps = [(8, 8, 8), (4, 4, 16), (4, 4, 16), (2, 2, 32), (1, 1, 32)]
    assert [x.shape for x in trace.sentence_maps()] == maps
    read = [(2, 2, 2), (4, 2, 2), (4, 2, 2), (8, 2, 2), (8, 1, 1)]
    assert [x.shape for x in trace.attention_maps()] == read
    for x in trace.attention_maps():
        np.testing.assert_allclose(x.mean(axis=(1, 2)), 1, rtol=1e-5)  # relative to uniform
    assert sorted(trace.inner_attention) == [0, 1, 3, 4]
    norm, head = found.params["norm"], found.params["head"]
    x = trace.sentences[-1]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    logits = (x * norm["scale"] + norm["bias"]).mean(axis=0) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(trace.probabilities, softmax(logits, -1), atol=1e-4)
    assert tracing.most_attended(trace, 3) == [4 * 8 + 4]  # there is one sentence at the end


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, size, patches",
    [("tnt_s_patch16_224", 48, ["--patches", "0,0", "2,1"]), ("ptnt_ti_patch16_192", 128, [])],
)
def test_every_figure_is_written(name, size, patches, tmp_path, capsys):
    path, image = small_network.save(tmp_path, name, size), small_network.photo(tmp_path)
    out = tmp_path / "new" / "figures"
    assert main(["visualize", str(path), str(image), f"--out={out}", *patches]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["class"].startswith("class ") and 0.1 <= result["probability"] <= 1
    assert sorted(result["figures"]) == sorted(path.name for path in out.iterdir())
    for name in result["figures"]:
        image = np.asarray(Image.open(out / name).convert("RGB"))
        assert image.shape[1] > 500 and image.std() > 20, name


def test_top_class(tmp_path):
    found = read_checkpoint(small_network.save(tmp_path, depth=1))
    first = np.eye(1000)[0]
    assert visualize.top_class(found, first[:10]) == {"class": "class 0", "probability": 1.0}
    assert visualize.top_class(found, None) == {}


@pytest.mark.slow
def test_network_without_words_or_head(tmp_path, capsys):
    """Blocks without words have no inner attention, and features no class."""
    path = small_network.save(tmp_path, depth=2, vanilla_blocks=(0, 1), num_classes=0)
    image, out = small_network.photo(tmp_path), tmp_path / "out"
    assert main(["visualize", str(path), str(image), f"--out={out}"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "inner_attention.png" not in result["figures"] and len(result["figures"]) == 4
    assert "class" not in result
