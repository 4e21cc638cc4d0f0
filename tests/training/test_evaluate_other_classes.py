# SPDX-License-Identifier: Apache-2.0
"""Evaluation on data sets whose classes differ from those of the network."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from configs import imagenet_variants
from tests.helpers.photos import png
from tests.helpers.random_weights import random_params
from tests.helpers.tfds_files import write_multi_label
from tnt_flax import create_model
from tnt_flax.core.errors import InputError
from tnt_flax.data.labels import imagenet_synsets
from tnt_flax.training.config import check_config
from tnt_flax.training.evaluate import (
    calibration_error,
    evaluate_checkpoint,
    mean_per_class,
    relabeled,
)
from tnt_flax.training.step import CALIBRATION_BINS, make_eval_step
from tnt_flax.weights.write import save_weights

SYNSETS = imagenet_synsets()
HALF = (0.5, 0.5, 0.5)
FLAT = png(np.full((8, 8, 3), 127, np.uint8))


# --------------------------------------------------------------------------------- evaluation sums


class LogitsFromPixels:
    """A network whose logits are the first channel of the images' first row."""

    num_classes = 6

    def apply(self, variables, images, train):
        return (images[:, 0, : self.num_classes, 0] * 127.5 + 127.5) / 10


def evaluated(logits, labels, classes=None, mask=None):
    """Returns the evaluation sums for these logits, multiples of 0.1 from 0 to 25.5."""
    logits = np.asarray(logits)
    image = np.zeros((len(logits), 1, 6, 3), np.uint8)
    image[:, 0, :, 0] = np.round(logits * 10)
    batch = {
        "image": jnp.asarray(image),
        "label": jnp.asarray(labels, jnp.int32),
        "mask": jnp.ones(len(logits), bool) if mask is None else jnp.asarray(mask),
    }
    step = make_eval_step(LogitsFromPixels(), mean=HALF, std=HALF, classes=classes)
    return jax.tree.map(np.asarray, jax.jit(step)({}, batch))


LOGITS = [[5, 4, 3, 2, 1, 0], [0, 9, 1, 2, 3, 4], [1, 1.5, 0.5, 0, 2, 2.5], [9, 0, 1, 2, 3, 4]]


def test_sums_of_each_class_and_of_confidence():
    sums = evaluated(LOGITS, [0, 2, 5, 0], mask=[True, True, True, False])
    expected = np.zeros((3, 6))
    expected[:, 0], expected[:, 2], expected[:, 5] = (1, 1, 1), (1, 0, 1), (1, 1, 1)
    np.testing.assert_array_equal(sums["per_class"], expected)
    assert mean_per_class(sums["per_class"]) == pytest.approx(2 / 3)

    # Expected calibration error, by its definition.
    confidence, right = softmax(LOGITS[:3], axis=1).max(axis=1), np.array([1, 0, 1])
    bins = np.ceil(confidence * CALIBRATION_BINS)
    error = sum(
        (bins == b).mean() * abs(right[bins == b].mean() - confidence[bins == b].mean())
        for b in set(bins)
    )
    assert calibration_error(sums["calibration"]) == pytest.approx(error, rel=1e-5)
    assert sums["calibration"].shape == (3, CALIBRATION_BINS)
    certain = evaluated([[25, 0, 0, 0, 0, 0]], [0])
    assert certain["calibration"][0, -1] == 1  # a confidence of 1 is in the last bin
    assert calibration_error(certain["calibration"]) < 1e-5


def test_any_label_of_a_multi_label_image_is_correct():
    labels = [[1, 0, -1], [2, -1, -1], [0, 4, 5], [-1, -1, -1]]
    sums = evaluated(LOGITS, labels, mask=[True, True, True, False])
    assert (sums["top1"], sums["images"]) == (2, 3)
    p = softmax(LOGITS, axis=1)
    right = [p[0, 0] + p[0, 1], p[1, 2], p[2, 0] + p[2, 4] + p[2, 5]]
    np.testing.assert_allclose(sums["loss"], -np.log(right).sum(), rtol=1e-5)


def test_predictions_are_restricted_to_selected_classes():
    sums = evaluated(LOGITS, [1, 4, 4, 4], classes=(1, 3, 4))
    assert (sums["top1"], sums["images"]) == (3, 4)  # 1, 1, 4, 4
    p = softmax(np.asarray(LOGITS)[:, [1, 3, 4]], axis=1)
    loss = -np.log(p[range(4), [0, 2, 2, 2]]).sum()
    np.testing.assert_allclose(sums["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(sums["calibration"][2].sum(), p.max(axis=1).sum(), rtol=1e-5)


def test_images_of_other_classes_are_masked_out():
    def with_labels(*labels):
        mask = np.array([True] * (len(labels) - 1) + [False])
        return (batch for batch in [{"label": np.array(labels), "mask": mask}])

    (few,) = relabeled(with_labels(0, 1, 2, 0), np.array([4, 5, 6]), (4, 6))
    assert few["label"].tolist() == [[4], [-1], [6], [4]]
    assert few["mask"].tolist() == [True, False, True, False]
    (all_of_them,) = relabeled(
        with_labels([2, 0], [1, -1], [-1, -1], [0, 0]), np.arange(3)[::-1], None
    )
    assert all_of_them["label"].tolist() == [[0, 2], [1, -1], [-1, -1], [2, 2]]
    assert all_of_them["mask"].tolist() == [True, True, False, False]


# ------------------------------------------------------------------------------- ImageNet variants


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Weights for 1,000 classes that predict class 0, 6 or 11, and tiny copies of the test sets."""
    root = tmp_path_factory.mktemp("sets")
    fields = dict(depth=1, outer_dim=24, inner_dim=4, outer_heads=3, inner_heads=2)
    model = create_model("tnt_s_patch16_224", num_classes=1000, **fields)
    params = random_params(model, 32)
    params["head"]["bias"] = jnp.zeros(1000).at[jnp.array([0, 6, 11])].set(jnp.array([3.0, 2, 1]))
    config = {"model": {"name": "tnt_s_patch16_224", **fields}}
    save_weights(root / "w.safetensors", params, {"config": config})
    a = imagenet_synsets("imagenet-a")
    for path in (
        *(f"imagenet-a/{synset}/{i}.png" for synset in a for i in range(1 + (synset == a[0]))),
        *(f"imagenetv2-matched-frequency-format-val/{i}/x.png" for i in range(1000)),
        *(f"val/{SYNSETS[i % 2]}/ILSVRC2012_val_{i + 1:08}.JPEG" for i in range(4)),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(FLAT)
    (root / "real.json").write_text(json.dumps([[7, 0], [3], [], [0]]))
    return root


def evaluate(name, root, table=None):
    config = imagenet_variants.get_config(name)
    config.data.update(root=str(root), image_size=32, threads=2)
    return evaluate_checkpoint(config, None, str(root / "w.safetensors"), table)


@pytest.mark.slow
def test_imagenet_a_and_its_table_of_classes(imagenet, tmp_path):
    # The prediction is class 6, the first class of ImageNet-A, which has two images.
    table = str(tmp_path / "classes.csv")
    result = evaluate("a", imagenet, table)
    assert (result["top1"], result["images"], result["classes"]) == (2 / 201, 201, 200)
    assert result["top5"] >= 3 / 201 and result["mean_per_class"] == pytest.approx(1 / 200)
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 200
    assert rows[0] == {
        "class": SYNSETS[6], "name": "stingray", "images": "2", "top1": "1.0", "top5": "1.0",
    }  # fmt: skip


@pytest.mark.slow
def test_imagenet_v2(imagenet):
    v2 = evaluate("v2", imagenet)
    assert (v2["top1"], v2["images"], v2["mean_per_class"]) == (0.001, 1000, 0.001)
    assert 0 < v2["ece"] < 1
    with pytest.raises(InputError, match="classes.txt is not a known kind of table"):
        evaluate("v2", imagenet, "classes.txt")


@pytest.mark.slow
def test_real_labels_from_json_and_tfds(imagenet, tmp_path):
    table = str(tmp_path / "classes.csv")
    real = evaluate("real", imagenet)
    assert (real["top1"], real["images"]) == (2 / 3, 3)  # the third image has no label
    assert "mean_per_class" not in real
    with pytest.raises(InputError, match="several classes .*: --per-class needs"):
        evaluate("real", imagenet, table)

    # The same images and labels in tfds.
    rows = [FLAT] * 4, [[7, 0], [3], [], [0]]
    write_multi_label(imagenet, "imagenet2012_real", SYNSETS, *rows, "tfrecord")
    assert evaluate("real_tfds", imagenet) == pytest.approx(real)
    with pytest.raises(InputError, match="several classes .*: --per-class needs"):
        evaluate("real_tfds", imagenet, table)


def test_every_variant_has_a_config():
    for name in imagenet_variants.NAMES:
        config = imagenet_variants.get_config(name)
        config.model.name = "tnt_s_patch16_224"
        check_config(config)
        assert (config.data.source == "tfds") == name.endswith("_tfds") == bool(config.data.name)
    assert {"v2", "a_tfds", "r", "sketch_tfds", "real"} < set(imagenet_variants.NAMES)
    with pytest.raises(InputError, match="imagenet_variants.py:b: the argument after the colon"):
        imagenet_variants.get_config("b")
