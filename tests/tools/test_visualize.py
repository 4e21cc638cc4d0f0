# SPDX-License-Identifier: Apache-2.0
"""The pictures show what the network computes, in its place, and the numbers behind them add up."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from tests.helpers import small_network
from tnt_flax.__main__ import main
from tnt_flax.models.network import BlockLayout
from tnt_flax.tools import attention as tracing
from tnt_flax.tools import figures, visualize
from tnt_flax.weights.read import read_checkpoint


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_rollout_by_hand():
    """Two blocks of two heads, against the definition written out token by token."""
    attention = softmax(np.random.default_rng(0).normal(size=(2, 2, 4, 4)))
    totals = tracing.rollout(attention.astype(np.float32))
    first = [
        [0.5 * attention[0, :, i, j].mean() + 0.5 * (i == j) for j in range(4)] for i in range(4)
    ]
    np.testing.assert_allclose(totals[0], first, atol=1e-6)
    second = [
        [
            sum(
                (0.5 * attention[1, :, i, k].mean() + 0.5 * (i == k)) * first[k][j]
                for k in range(4)
            )
            for j in range(4)
        ]
        for i in range(4)
    ]
    np.testing.assert_allclose(totals[1], second, atol=1e-6)
    np.testing.assert_allclose(totals.sum(axis=-1), 1, atol=1e-6)


def test_what_reaches_the_head_of_a_pyramid():
    """Values of sentences, carried through the stages by hand: the weights of their mean."""
    random = np.random.default_rng(0)
    values = random.normal(size=(5, 6))
    stages, grids, ratios = [0, 0, 1, 2, 3], [(5, 6), (3, 3), (2, 2), (1, 1)], [4, 2, 1, 1]
    keys = [1, 1, 1, 4, 1]
    attention = [
        softmax(random.normal(size=(2, np.prod(grids[stage]), k)))
        for stage, k in zip(stages, keys, strict=True)
    ]
    layouts = [BlockLayout(grids[stage], 2**stage, ratios[stage]) for stage in stages]
    seen = tracing.Trace(None, layouts, False, attention, {}, [], {}, None)
    x = values
    for weights, stage, reached in zip(attention, stages, seen.rollout_maps(), strict=True):
        (rows, columns), side = grids[stage], ratios[stage]
        if x.shape != (rows, columns):
            x = [
                [x[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() for j in range(columns)]
                for i in range(rows)
            ]
            x = np.array(x)
        averages = [
            x[side * i : side * (i + 1), side * j : side * (j + 1)].mean()
            for i in range(rows // side)
            for j in range(columns // side)
        ]
        x = (x + (weights.mean(axis=0) @ averages).reshape(rows, columns)) / 2
        assert (reached * values).sum() == pytest.approx(x.mean(), abs=1e-6)
        assert reached.sum() == pytest.approx(1)
    assert [seen.enclosing_sentence(block, 4 * 6 + 3) for block in range(5)] == [
        27,
        27,
        2 * 3 + 1,
        2,
        0,
    ]
    looked = [maps.shape for maps in seen.attention_maps()]
    assert looked == [(2, 1, 1), (2, 1, 1), (2, 1, 1), (2, 2, 2), (2, 1, 1)]


def test_colors_follow_from_depth_to_depth():
    """Tokens turned and scaled are the same picture, also where there are fewer of them."""
    random = np.random.default_rng(0)
    tokens = random.normal(size=(50, 8)) * [9, 5, 3, 0, 0, 0, 0, 0]
    turn, _ = np.linalg.qr(random.normal(size=(8, 8)))
    first, second = tracing.principal_colors([tokens, 7 * tokens @ turn + 1])
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert first.min() == 0 and first.max() == 1 and first.shape == (50, 3)
    picture = tokens[:48].reshape(6, 8, 8).repeat(2, axis=0).repeat(2, axis=1)
    large, small = tracing.principal_colors([picture, -picture[::2, ::2]])
    np.testing.assert_allclose(large[::2, ::2], small, atol=0.05)  # of other percentiles
    (few,) = tracing.principal_colors([random.normal(size=(2, 8))])  # two tokens, one component
    assert few.shape == (2, 3) and np.isfinite(few).all()


def test_places():
    maps = np.arange(2 * 3 * 2 * 3).reshape(2, 3, 2, 3)
    picture = tracing.tile(maps, zoom=1)
    assert picture.shape == (2 * 4 - 2, 3 * 5 - 2)
    np.testing.assert_array_equal(picture[4:6, 10:13], maps[1, 2])
    assert np.isnan(picture[2:4]).all() and np.isnan(picture[:, 3:5]).all()

    words = np.arange(6 * 4).reshape(6, 4)  # 2 x 3 sentences of 2 x 2 words
    placed = tracing.words_in_place(words, (2, 3))
    np.testing.assert_array_equal(placed[2:, 4:], words[5].reshape(2, 2))
    assert placed.shape == (4, 6)


def test_similarity():
    vectors = np.float32([[1, 0], [-1, 0], [0, 1], [0, -1]])
    expected = [[1, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 1, -1], [0, 0, -1, 1]]
    np.testing.assert_allclose(tracing.similarity(vectors + 5), expected, atol=1e-5)


def test_light_falls_where_the_weight_is():
    pixels = np.full((32, 32, 3), 200, np.uint8)
    lit = figures.overlay_heatmap(pixels, np.float32([[0, 0], [0, 1]]))
    assert lit[-1, -1].tolist() == [200] * 3 and lit[0, 0].max() < 40
    assert lit[:, 0].max() < 40 and lit[0].max() < 40


def test_looking_is_what_the_network_computes(tmp_path):
    """Two images at once; the class token of the last block gives the answer by hand."""
    found = read_checkpoint(small_network.save(tmp_path))
    pixels = tracing.load_image(found, small_network.photo(tmp_path))
    assert pixels.shape == (48, 48, 3)
    first, second = tracing.trace_attention(found, np.stack([pixels, pixels[::-1]]))
    assert first.grid == (3, 3)
    assert [x.shape for x in first.outer_attention] == [(2, 10, 10)] * 3
    assert first.inner_attention[2].shape == (9, 2, 16, 16) and first.words[0].shape == (9, 16, 4)
    np.testing.assert_array_equal(second.pixels, pixels[::-1])
    params = found.params
    for seen in (first, second):
        token = seen.sentences[-1][0]
        token = (token - token.mean()) / np.sqrt(token.var() + 1e-5)
        token = token * params["norm"]["scale"] + params["norm"]["bias"]
        logits = token @ params["head"]["kernel"] + params["head"]["bias"]
        np.testing.assert_allclose(seen.probabilities, softmax(logits), atol=1e-4)
    chosen = tracing.most_attended(first, 2)
    reached = tracing.rollout(first.outer_attention)[-1, 0, 1:]
    assert reached[chosen[0]] == reached.max() and len(chosen) == 2


@pytest.mark.slow
def test_looking_with_a_pyramid(tmp_path):
    """The mean of the last sentences gives the answer by hand."""
    found = read_checkpoint(
        small_network.save(tmp_path, "ptnt_ti_patch16_192", 64, depths=(1, 2, 1, 1))
    )
    pixels = tracing.load_image(found, small_network.photo(tmp_path))
    (seen,) = tracing.trace_attention(found, pixels[None])
    assert seen.grid == (8, 8) and [layout.side for layout in seen.layouts] == [1, 2, 2, 4, 8]
    maps = [(8, 8, 8), (4, 4, 16), (4, 4, 16), (2, 2, 32), (1, 1, 32)]
    assert [x.shape for x in seen.sentence_maps()] == maps
    read = [(2, 2, 2), (4, 2, 2), (4, 2, 2), (8, 2, 2), (8, 1, 1)]
    assert [x.shape for x in seen.attention_maps()] == read
    for x in seen.attention_maps():
        np.testing.assert_allclose(x.mean(axis=(1, 2)), 1, rtol=1e-5)  # of all tokens alike
    assert sorted(seen.inner_attention) == [0, 1, 3, 4]
    norm, head = found.params["norm"], found.params["head"]
    x = seen.sentences[-1]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    logits = (x * norm["scale"] + norm["bias"]).mean(axis=0) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(seen.probabilities, softmax(logits), atol=1e-4)
    assert tracing.most_attended(seen, 3) == [4 * 8 + 4]  # there is one sentence at the end


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, size, patches",
    [("tnt_s_patch16_224", 48, ["--patches", "0,0", "2,1"]), ("ptnt_ti_patch16_192", 128, [])],
)
def test_every_picture_is_drawn(name, size, patches, tmp_path, capsys):
    path, image = small_network.save(tmp_path, name, size), small_network.photo(tmp_path)
    out = tmp_path / "new" / "figures"
    assert main(["visualize", str(path), str(image), f"--out={out}", *patches]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["class"].startswith("class ") and 0.1 <= result["probability"] <= 1
    assert sorted(result["figures"]) == sorted(path.name for path in out.iterdir())
    for name in result["figures"]:
        drawn = np.asarray(Image.open(out / name).convert("RGB"))
        assert drawn.shape[1] > 500 and drawn.std() > 20, name


def test_the_predicted_class_has_a_name(tmp_path):
    found = read_checkpoint(small_network.save(tmp_path, depth=1))
    first = np.eye(1000)[0]
    assert visualize.top_class(found, first[:10]) == {"class": "class 0", "probability": 1.0}
    published = dataclasses.replace(found, info={})
    assert visualize.top_class(published, first)["class"] == "tench, Tinca tinca"
    assert visualize.top_class(published, first[:10])["class"] == "0"
    assert visualize.top_class(published, None) == {}


@pytest.mark.slow
def test_without_words_or_head(tmp_path, capsys):
    """Blocks without words have no inner attention to draw; features are no answer."""
    path = small_network.save(tmp_path, depth=2, vanilla_blocks=(0, 1), num_classes=0)
    assert (
        main(
            [
                "visualize",
                str(path),
                str(small_network.photo(tmp_path)),
                f"--out={tmp_path / 'out'}",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "inner_attention.png" not in result["figures"] and len(result["figures"]) == 4
    assert "class" not in result


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["CHECKPOINT", "no.jpg"], "cannot read the image no.jpg: No such file"),
        (["CHECKPOINT", "CHECKPOINT"], "is not a usable image: not an image format"),
        (["no.safetensors", "PHOTO"], "no.safetensors"),
        (["CHECKPOINT", "PHOTO", "--patches", "3,0"], "--patches 3,0: write ROW,COLUMN, from 0,0"),
        (["CHECKPOINT", "PHOTO", "--patches", "1"], "--patches 1: write ROW,COLUMN"),
        (["CHECKPOINT", "PHOTO", "--out=PHOTO/x"], "cannot make the folder"),
        (["CHECKPOINT"], "the following arguments are required: IMAGE"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    known = {
        "CHECKPOINT": small_network.save(tmp_path, depth=1),
        "PHOTO": small_network.photo(tmp_path),
    }
    arguments = [f"--out={tmp_path / 'out'}", *arguments]
    for word, path in known.items():
        arguments = [argument.replace(word, str(path)) for argument in arguments]
    code = main(["visualize", *arguments])
    out, err = capsys.readouterr()
    assert code == 2 and not out
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
