# SPDX-License-Identifier: Apache-2.0
"""`preview` shows the network's input pixel for pixel, with the weights of its targets."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from tnt_flax.__main__ import main
from tnt_flax.tools import preview
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.optimizer import Optimizer
from tnt_flax.training.step import TrainState

MIXING = {
    "augment__mixup_alpha": 0.8,
    "augment__cutmix_alpha": 1.0,
    "augment__erase_prob": 0.5,
    "augment__repeats": 3,
}


class Recorder:
    """A network that records its input and returns its logits from the variables."""

    num_classes = 10

    def __init__(self):
        self.images = []

    def apply(self, variables, images, *, train, rngs, mutable):
        jax.debug.callback(lambda x: self.images.append(np.asarray(x)), images)
        return variables["params"]["logits"], {}


@pytest.mark.slow
def test_samples_equal_the_input_of_a_training_step(smoke_config, monkeypatch):
    # Compiling its sampler takes longer than all the rest.
    monkeypatch.setattr(jax.random, "beta", lambda key, a, b, shape: jax.random.uniform(key, shape))
    config = smoke_config(**MIXING)
    images, weights, _ = preview.first_samples(config)
    assert len(images) == 48

    experiment, tx, model = Experiment(config), optax.sgd(1.0), Recorder()
    batch = next(experiment.data.train_batches(0, 1))
    experiment.model, experiment.optimizer = model, Optimizer(tx, lambda count: 1.0)
    step = jax.jit(experiment.make_train_step())
    state = TrainState.create({"params": {"logits": jnp.zeros((48, 10))}}, tx)
    inputs = {name: batch[name] for name in ("image", "label")}
    after, _ = step(state, inputs, experiment.split_seed()[1])
    jax.effects_barrier()
    (seen,) = model.images
    np.testing.assert_allclose(images, seen, atol=1e-6)

    # The gradient of the loss is (softmax - targets) / 48, and the softmax of zeros is 1 / 10.
    targets = 0.1 + 48 * np.asarray(after.params["logits"])
    np.testing.assert_allclose(weights * 0.9 + 0.01, targets, atol=1e-5)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    assert ((weights > 0).sum(axis=1) <= 2).all()
    assert 0 < (weights.max(axis=1) < 1).sum()  # some are mixed
    assert (images.max(axis=(1, 2, 3)) > 1.01).any()  # and some erased, by noise
    assert config.augment.label_smoothing == 0.1  # the caller's config is unchanged


def test_to_pixels_inverts_normalization():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.5)
    normalized = (pixels / np.float32(255) - np.float32(mean)) / np.float32(std)
    np.testing.assert_array_equal(preview.to_pixels(normalized, mean, std), pixels)
    beyond = preview.to_pixels(np.float32([[[[-9, 0, 9]]]]), (0.5,) * 3, (0.5,) * 3)
    assert beyond.ravel().tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    "weights, text",
    [
        ([0, 1, 0], "dog"),
        ([0.63, 0.37, 0], "cat 0.63\ndog 0.37"),
        ([0.37, 0.63, 0], "dog 0.63\ncat 0.37"),
        ([0.996, 0.004, 0], "cat"),
        ([0, 0.5, 0.5], "dog 0.50\nan animal with a l\N{HORIZONTAL ELLIPSIS} 0.50"),
        ([0, 0, 1], "an animal with a long n\N{HORIZONTAL ELLIPSIS}"),
    ],
)
def test_captions(weights, text):
    names = ("cat", "dog", "an animal with a long name")
    assert preview.caption(np.float32(weights), names) == text
    assert all(len(line) <= preview.MAX_LETTERS for line in text.splitlines())


def test_caption_weights_sum_to_one():
    for share in np.linspace(0.5, 0.994, 300, dtype=np.float32):
        text = preview.caption(np.float32([share, 1 - share]), ("a", "b"))
        first, second = (float(line.split()[1]) for line in text.splitlines())
        assert round(first + second, 6) == 1
    assert preview.caption(np.float32([1]), ("only",)) == "only"


def test_spread_takes_rows_of_every_group():
    assert preview.spread(12, 3, 5).tolist() == [0, 4, 8, 1, 5]
    assert preview.spread(4, 1, 9).tolist() == [0, 1, 2, 3]


def test_the_sheet_shows_every_pixel(
    smoke_config, smoke_flags, root, tmp_path, monkeypatch, capsys
):
    captions = []
    original = preview.caption
    monkeypatch.setattr(
        preview, "caption", lambda *a: captions.append(original(*a)) or captions[-1]
    )
    out = tmp_path / "sheet.png"
    flags = ["--config.batch_size=12", f"--out={out}", "--rows=2", "--columns=5"]
    assert main(["preview", f"--config={root}/configs/digits.py", *smoke_flags, *flags]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "out": str(out),
        "images": 10,
        "of_two_classes": 0,
        "batch_size": 12,
        "classes": 10,
    }
    assert len(captions) == 10 and set(captions) <= set("0123456789")
    config = smoke_config(batch_size=12)
    images, _, _ = preview.first_samples(config)
    first = preview.to_pixels(images, config.data.mean, config.data.std)[0]
    with Image.open(out) as file:
        sheet = np.asarray(file)
    assert sheet.shape[1] == 12 + 5 * (160 + 12)
    np.testing.assert_array_equal(sheet[44:204:5, 12:172:5], first)  # 5 x 5 pixels for each
    assert sheet[:40].min() < 100 > sheet[208:230, 12:172].min()  # title and caption


def test_a_failed_write_exits_with_one(smoke_flags, root, tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    flags = [f"--out={tmp_path / 'a.png'}", "--rows=1", "--columns=1"]
    assert main(["preview", f"--config={root}/configs/digits.py", *smoke_flags, *flags]) == 1
    assert capsys.readouterr().err.endswith("a.png: No space left on device\n")
