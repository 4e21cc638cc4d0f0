# SPDX-License-Identifier: Apache-2.0
import types

import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from tnt_flax.core.errors import InputError
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.losses import balanced_class_weights, make_loss_fn, read_class_weights

random = np.random.default_rng(0)
LOGITS = random.normal(0, 3, (6, 5)).astype(np.float32)
MIXED = random.dirichlet(np.full(5, 0.3), 6).astype(np.float32)  # as after mixup and smoothing
WEIGHTS = np.array([0.5, 3.0, 1.0, 0.0, 2.0], np.float32)


def source(*class_names):
    return types.SimpleNamespace(class_names=class_names)


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


@pytest.mark.parametrize("bce_sum", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.2])
def test_binary_cross_entropy_follows_its_equation(threshold, bce_sum):
    loss_fn = make_loss_fn("bce", bce_threshold=threshold, bce_sum=bce_sum, class_weights=WEIGHTS)
    targets = MIXED if threshold is None else np.where(MIXED > threshold, 1.0, 0.0)
    terms = WEIGHTS * targets * log_sigmoid(LOGITS) + (1 - targets) * log_sigmoid(-LOGITS)
    expected = -(terms.sum(axis=1) if bce_sum else terms.mean(axis=1))
    np.testing.assert_allclose(loss_fn(LOGITS, MIXED), expected, rtol=1e-5)


def test_class_weights_multiply_the_terms_of_the_softmax():
    log_probabilities = LOGITS - np.log(np.exp(LOGITS).sum(axis=1, keepdims=True))
    found = make_loss_fn("softmax", class_weights=WEIGHTS)(LOGITS, MIXED)
    expected = -(WEIGHTS * MIXED * log_probabilities).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_binary_cross_entropy_is_finite_for_extreme_logits():
    logits, targets = jnp.array([[1e4, -1e4]]), jnp.array([[0.0, 1.0]])
    np.testing.assert_allclose(make_loss_fn("bce")(logits, targets), [1e4])


def test_a_step_uses_the_loss_of_the_config(monkeypatch):
    config = digits.get_config()
    config.update_from_flattened_dict({"loss.name": "bce", "loss.bce_threshold": 0.1})
    monkeypatch.setattr(
        "tnt_flax.training.step.make_train_step", lambda *args, loss_fn, **options: loss_fn
    )
    found = Experiment(config, num_classes=5, steps_per_epoch=10).make_train_step()
    expected = make_loss_fn("bce", bce_threshold=0.1)
    np.testing.assert_array_equal(found(LOGITS, MIXED), expected(LOGITS, MIXED))


def test_balanced_weights_count_every_label_of_the_training_data():
    config = digits.get_config()
    config.loss.class_weights = "balanced"
    experiment = Experiment(config)
    labels = np.array([label for _, label in experiment.data.train_source])
    share = np.bincount(labels) / len(labels)
    logits, targets = np.zeros((10, 10), np.float32), np.eye(10, dtype=np.float32)
    np.testing.assert_allclose(
        experiment.loss_fn(logits, targets), np.log(10) / (10 * share), rtol=1e-5
    )


def test_balanced_weights_of_several_labels_per_image_and_of_an_absent_class():
    labels = np.array([[0, 1], [0, -1], [0, -1], [-1, -1]])
    np.testing.assert_allclose(balanced_class_weights(labels, 3), [4 / 6, 4 / 2, 0])


def test_class_weights_are_read_by_name(tmp_path):
    path = tmp_path / "weights.csv"
    path.write_bytes('\ufeffclass,weight\r\n"b, c",2\r\na,0.5\r\n'.encode())
    assert read_class_weights(str(path), source("a", "b, c")).tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,1\n", "no weight of bird"),
        ("a,1\nbirb,2\n", "line 2: the data have no class 'birb' .did you mean 'bird'"),
        ("a,1\nbird,-2\n", "line 2: expected CLASS,WEIGHT"),
        ("a,1\nbird\n", "line 2: expected CLASS,WEIGHT"),
        ("a,1\nbird,two\n", "line 2: expected CLASS,WEIGHT"),
        ("a,1\nbird,1,2\n", "line 2: expected CLASS,WEIGHT"),
    ],
)
def test_class_weights_that_do_not_fit_are_refused(text, message, tmp_path):
    path = tmp_path / "weights.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_class_weights(str(path), source("a", "bird"))


# ---------------------------------------------------------------------------------------- oracle


@pytest.mark.oracle
@pytest.mark.parametrize("threshold", [None, 0.0, 0.2])
@pytest.mark.parametrize("bce_sum", [False, True])
def test_binary_cross_entropy_equals_timm(threshold, bce_sum):
    import torch
    from timm.loss import BinaryCrossEntropy

    options = dict(pos_weight=torch.tensor(WEIGHTS), sum_classes=bce_sum)
    theirs = BinaryCrossEntropy(target_threshold=threshold, **options)
    expected = theirs(torch.tensor(LOGITS), torch.tensor(MIXED))
    ours = make_loss_fn("bce", bce_threshold=threshold, bce_sum=bce_sum, class_weights=WEIGHTS)
    np.testing.assert_allclose(ours(LOGITS, MIXED).mean(), expected, rtol=1e-6)


@pytest.mark.oracle
def test_weighted_cross_entropy_equals_torch():
    import torch

    tensors = (torch.tensor(LOGITS), torch.tensor(MIXED))
    expected = torch.nn.functional.cross_entropy(*tensors, weight=torch.tensor(WEIGHTS))
    found = make_loss_fn("softmax", class_weights=WEIGHTS)(LOGITS, MIXED).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.oracle
def test_balanced_weights_equal_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.random.default_rng(1).choice(4, 1000, p=[0.9, 0.05, 0.04, 0.01])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(balanced_class_weights(labels, 4), expected)
