# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np

from tnt_flax.losses import smooth_one_hot, soft_target_cross_entropy


def test_smoothing_is_folded_into_the_targets_once():
    targets = smooth_one_hot(jnp.array([3, 0]), 1000, 0.1)
    assert targets.shape == (2, 1000)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(targets[0, 3], 0.9001, rtol=1e-6)  # reference value at 1000 classes
    np.testing.assert_allclose(targets[0, 4], 0.0001, rtol=1e-6)


def test_cross_entropy_by_hand():
    logits = jnp.array([[1.0, 2.0, 4.0]])
    targets = jnp.array([[0.2, 0.3, 0.5]])
    log_sum = np.log(np.exp(1) + np.exp(2) + np.exp(4))
    expected = -(0.2 * (1 - log_sum) + 0.3 * (2 - log_sum) + 0.5 * (4 - log_sum))
    np.testing.assert_allclose(soft_target_cross_entropy(logits, targets), [expected], rtol=1e-6)
