# SPDX-License-Identifier: Apache-2.0
"""Distillation: the losses by their equations, teachers of other networks, and whole steps."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import softmax

from tests.helpers import small_network
from tests.helpers.photos import png
from tnt_flax.__main__ import main
from tnt_flax.core.errors import InputError
from tnt_flax.data.stored_logits import RecordLogits, is_logits_file, open_logits
from tnt_flax.runtime import sharding
from tnt_flax.training.distillation import load_teacher, make_distillation_loss
from tnt_flax.training.experiment import Experiment
from tnt_flax.weights.load import load

random = np.random.default_rng(0)
LOGITS, TEACHER = random.normal(0, 3, (2, 6, 5)).astype(np.float32)
TARGETS = random.dirichlet(np.ones(5), 6).astype(np.float32)
LABELS = optax.softmax_cross_entropy(LOGITS, TARGETS)
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def distill(**options):
    options = dict(kind="soft", temperature=1.0, weight=1.0) | options
    return make_distillation_loss(optax.softmax_cross_entropy, **options)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_soft_distillation_follows_its_equation(weight):
    ours, theirs = softmax(LOGITS / 2, 1), softmax(TEACHER / 2, 1)
    expected = weight * 4 * (theirs * np.log(theirs / ours)).sum(axis=1) + (1 - weight) * LABELS
    found = distill(temperature=2.0, weight=weight)(LOGITS, (TARGETS, TEACHER))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_hard_distillation_is_the_cross_entropy_of_the_teachers_prediction():
    hard = -np.log(softmax(LOGITS, 1))[np.arange(6), TEACHER.argmax(axis=1)]
    found = distill(kind="hard", weight=0.5)(LOGITS, (TARGETS, TEACHER))
    np.testing.assert_allclose(found, (hard + LABELS) / 2, rtol=1e-5)


def test_a_student_equal_to_its_teacher_has_neither_loss_nor_gradient():
    loss = lambda logits: distill(temperature=3.0)(logits, (TARGETS, LOGITS)).sum()
    value, gradient = jax.value_and_grad(loss)(LOGITS)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


# ------------------------------------------------------------------------------------- teachers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tnt_s_patch16_224", "ptnt_s_patch16_256"])
def test_a_teacher_is_renormalized_resampled_and_has_the_classes_of_the_data(name, tmp_path):
    path = small_network.save(tmp_path, name, 32, data={"mean": [0.3, 0.4, 0.5]})
    model, variables = load(path, image_size=64)
    pixels = random.uniform(0, 1, (2, 64, 64, 3)).astype(np.float32)
    theirs = (pixels - np.float32([0.3, 0.4, 0.5])) / 0.25
    expected = jax.jit(model.apply)(variables, theirs)[:, jnp.array([7, 2])]
    options = dict(image_size=(64, 64), dtype="float32")
    teacher = load_teacher(str(path), ("class 7", "class 2"), **HALF, **options)
    found = jax.jit(teacher.logits)(teacher.variables, {"image": pixels * 2 - 1})
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="none is called 'dog'"):
        load_teacher(str(path), ("class 7", "dog"), **HALF, **options)


def test_a_teacher_needs_a_head(tmp_path):
    path = small_network.save(tmp_path, num_classes=0)
    with pytest.raises(InputError, match="has no head"):
        load_teacher(str(path), 3, **HALF, image_size=(48, 48), dtype="float32")


# --------------------------------------------------------------------------------- stored logits


@pytest.fixture
def stored(tmp_path):
    """Logits of three images of the classes b, a and c; the last image is unreadable."""
    path = tmp_path / "logits.safetensors"
    names = [f"/data/train/{name}.png" for name in ("x/0", "y/1", "y/2")]
    with open_logits(path, names, 3, ("b", "a", "c")) as write:
        write(np.float32([0, 1, 2]))
        write(np.float32([3, 4, 5]))
        write(None)
    return str(path)


def test_stored_logits_are_found_by_the_names_of_images_and_classes(stored, caplog):
    assert is_logits_file(stored) and not is_logits_file(__file__)
    for folder in ("/data/train", "/mnt/elsewhere"):  # the data may have moved
        logits = RecordLogits(stored, [f"{folder}/y/1.png", f"{folder}/x/0.png"], ("a", "b"))
        for each in (logits, pickle.loads(pickle.dumps(logits))):  # as worker processes do
            assert [each[i].tolist() for i in (0, 1)] == [[4, 3], [1, 0]]
    assert caplog.messages == ["warning: images below /mnt/elsewhere get the logits of /data/train"]
    with pytest.raises(InputError, match="no logits of 1 of the 2 training images, such as .*y/2"):
        RecordLogits(stored, ["/data/train/x/0.png", "/data/train/y/2.png"], ("a", "b"))
    with pytest.raises(InputError, match="none is called 'd'"):
        RecordLogits(stored, ["/data/train/x/0.png"], ("a", "d"))


def test_stored_logits_do_not_fit_mixed_images(stored, smoke_config):
    with pytest.raises(InputError, match="not of mixed ones: set augment.mixup_alpha=0"):
        Experiment(smoke_config(distill__teacher=stored, augment__mixup_alpha=0.8))


@pytest.mark.slow
def test_stored_logits_train_like_their_teacher_if_views_are_those_of_the_evaluation(
    smoke_config, tmp_path
):
    names = ("ant", "bee")
    teacher = small_network.save(tmp_path, size=32, num_classes=2, class_names=[*names])
    for i in range(24):
        path = tmp_path / "data" / "train" / names[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(random.integers(0, 256, (32, 32, 3), np.uint8)))
    logits = tmp_path / "logits.safetensors"
    arguments = [str(teacher), str(tmp_path / "data/train"), f"--logits={logits}"]
    assert main(["predict", *arguments]) == 0
    evaluation_view = dict(augment__scale=(1.0, 1.0), augment__ratio=(1.0, 1.0))
    data = dict(data__source="folder", data__root=str(tmp_path / "data"), batch_size=24)
    losses = []
    for path in (teacher, logits):
        config = smoke_config(
            **data | evaluation_view, distill__teacher=str(path), distill__weight=1.0
        )
        experiment = Experiment(config)
        (batch,) = experiment.data.train_batches(0, 1)
        batch.pop("replaced")
        state, batch = experiment.new_state(), sharding.to_global(batch, experiment.mesh)
        arguments = experiment.keys.steps, *experiment.teacher_variables
        losses.append(experiment.train_step(state, batch, *arguments)[1]["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert losses[0] > 1e-4


# ---------------------------------------------------------------------------------------- steps


@pytest.mark.slow
def test_a_step_distils_on_a_mesh_with_micro_batches(smoke_config, tmp_path):
    """Sharding and micro-batches change nothing; a student that is its teacher has no loss."""
    path = small_network.save(tmp_path, size=32, class_names=[*"0123456789"], data=dict(HALF))
    model = {f"model__{k}": x for k, x in small_network.SMALL.items() if k != "num_classes"}
    images = random.integers(0, 256, (48, 32, 32, 3), np.uint8)
    batch = {"image": images, "label": random.integers(0, 10, 48, np.int32)}

    def first_step(**changes):
        config = smoke_config(**model | changes, distill__teacher=str(path), distill__weight=1.0)
        experiment = Experiment(config, num_classes=10, steps_per_epoch=29)
        state, inputs = experiment.new_state(), sharding.to_global(batch, experiment.mesh)
        step, key = experiment.train_step, experiment.keys.steps
        _, metrics = step(state, inputs, key, *experiment.teacher_variables)
        return metrics

    alone = first_step(mesh__data=1, mesh__fsdp=8)
    split = first_step(accumulate=2, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    assert alone["loss"] > 0.1
    np.testing.assert_allclose(alone["loss"], split["loss"], rtol=1e-5)
    np.testing.assert_allclose(alone["grad_norm"], split["grad_norm"], rtol=1e-4)

    same = first_step(init_from=str(path))
    np.testing.assert_allclose(same["loss"], 0, atol=1e-5)
    assert same["grad_norm"] < 1e-3
