# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.losses import make_loss_fn

random = np.random.default_rng(0)
LOGITS = random.normal(0, 3, (6, 5)).astype(np.float32)
MIXED = random.dirichlet(np.full(5, 0.3), 6).astype(np.float32)  # as after mixup and smoothing
WEIGHTS = np.array([0.5, 3.0, 1.0, 0.0, 2.0], np.float32)


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
