# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tnt_flax import create_model
from tnt_flax.core.trees import named_leaves
from tnt_flax.training.optimizer import (
    decay_mask,
    epoch_learning_rates,
    make_optimizer,
    per_epoch_schedule,
)

PUBLISHED = dict(
    epochs=300,
    learning_rate=1e-3,
    warmup_learning_rate=1e-6,
    min_learning_rate=1e-5,
    warmup_epochs=5,
    cooldown_epochs=10,
)


def test_published_learning_rates():
    rates = epoch_learning_rates(**PUBLISHED)
    assert len(rates) == 310
    expected = [1e-6, 2.008e-4, 4.006e-4, 6.004e-4, 8.002e-4, 9.993216e-4, 9.990232e-4]
    np.testing.assert_allclose(rates[:7], expected, rtol=1e-6)
    expected = [9.972883e-4, 7.525e-4, 5.05e-4, 2.575e-4, 1.0027141e-5, 1e-5, 1e-5]
    np.testing.assert_allclose(rates[[10, 100, 150, 200, 299, 300, 309]], expected, rtol=1e-6)


def test_rate_changes_between_epochs_only():
    schedule = jax.jit(per_epoch_schedule(np.array([1.0, 2.0, 3.0]), steps_per_epoch=4))
    assert [float(schedule(s)) for s in range(14)] == [1.0] * 4 + [2.0] * 4 + [3.0] * 6


def test_decay_mask_lists_exactly_the_kernels():
    model = create_model("tnt_s_patch16_224", depth=2, se=True, qkv_bias=True)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    decayed = {name for name, decays in named_leaves(decay_mask(params)).items() if decays}
    layers = [
        f"{t}/attention/{p}" for t in ("inner", "outer") for p in "query key value out".split()
    ]
    layers += [f"{t}/{fc}" for t in ("inner", "outer", "outer/se") for fc in ("fc1", "fc2")]
    assert decayed == {
        "word_embed/conv/kernel",
        "proj/dense/kernel",
        "head/kernel",
        "blocks_0/proj/dense/kernel",
        *(f"blocks_0/{layer}/kernel" for layer in layers),
    }


def test_three_steps_of_adamw_by_hand():
    beta1, beta2, eps, decay, rate = 0.9, 0.999, 1e-8, 0.05, 1e-2
    tx = make_optimizer(
        lambda step: rate, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay, clip_norm=0.0
    ).tx
    params = {"kernel": jnp.array([0.5, -1.0]), "bias": jnp.array([0.25, 0.75])}
    expected = {name: np.asarray(x, np.float64) for name, x in params.items()}
    m = {name: np.zeros(2) for name in params}
    v = {name: np.zeros(2) for name in params}
    state = tx.init(params)
    for t, scale in enumerate([1.0, -0.3, 2.0], start=1):
        grads = {"kernel": jnp.array([0.1, -0.2]) * scale, "bias": jnp.array([1e-4, 3.0]) * scale}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name in params:  # torch.optim.AdamW, as its documentation states it
            g = np.asarray(grads[name], np.float64)
            if name == "kernel":
                expected[name] *= 1 - rate * decay
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g**2
            denominator = np.sqrt(v[name]) / np.sqrt(1 - beta2**t) + eps
            expected[name] -= rate / (1 - beta1**t) * m[name] / denominator
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=2e-5)


def test_clipping_scales_the_whole_gradient():
    common = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
    params = {"kernel": jnp.ones(2)}
    grads = {"kernel": jnp.array([3.0, 4.0])}
    clipped = make_optimizer(optax.constant_schedule(1.0), clip_norm=1.0, **common).tx
    _, state = clipped.update(grads, clipped.init(params), params)
    moments = optax.tree.get(state, "mu")["kernel"]
    np.testing.assert_allclose(moments, 0.1 * np.array([0.6, 0.8]), rtol=1e-6)
