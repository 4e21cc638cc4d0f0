# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np

from tnt_flax.training.losses import smooth_one_hot, soft_target_cross_entropy
from tnt_flax.training.mixup import Mix, apply_mix


def test_smoothing_is_folded_into_the_targets_once():
    targets = smooth_one_hot(jnp.array([3, 0]), 1000, 0.1)
    assert targets.shape == (2, 1000)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(targets[0, 3], 0.9001, rtol=1e-6)  # reference value at 1000 classes
    np.testing.assert_allclose(targets[0, 4], 0.0001, rtol=1e-6)


def test_trap_26_mixed_targets_are_smoothed_once():
    labels = jnp.array([3, 0, 5, 5])
    images = jnp.zeros((4, 1, 1, 3), jnp.uint8)
    drawn = Mix(jnp.array([0.25, 0.5]), jnp.zeros((2, 4), jnp.int32))
    _, targets = apply_mix(images, smooth_one_hot(labels, 1000, 0.1), drawn)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-5)
    on, off = 0.9001, 0.0001
    np.testing.assert_allclose(targets[0, 3], 0.25 * on + 0.75 * off, rtol=1e-5)
    np.testing.assert_allclose(targets[0, 0], 0.75 * on + 0.25 * off, rtol=1e-5)
    np.testing.assert_allclose(targets[1, 3], 0.75 * on + 0.25 * off, rtol=1e-5)
    np.testing.assert_allclose(targets[:, 4], off, rtol=1e-5)
    np.testing.assert_allclose(targets[2:, 5], on, rtol=1e-5)  # partners of the same class


def test_cross_entropy_by_hand():
    logits = jnp.array([[1.0, 2.0, 4.0]])
    targets = jnp.array([[0.2, 0.3, 0.5]])
    log_sum = np.log(np.exp(1) + np.exp(2) + np.exp(4))
    expected = -(0.2 * (1 - log_sum) + 0.3 * (2 - log_sum) + 0.5 * (4 - log_sum))
    np.testing.assert_allclose(soft_target_cross_entropy(logits, targets), [expected], rtol=1e-6)
