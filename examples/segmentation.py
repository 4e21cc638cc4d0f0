# SPDX-License-Identifier: Apache-2.0
"""Trains PyramidTNT for segmentation: `python examples/segmentation.py masks.png 300`.

Writes images, true masks and predictions. With pretrained weights, call `tnt_flax.load(FILE)`.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

import tnt_flax

PATH, STEPS, CLASSES, RNG = sys.argv[1], int(sys.argv[2]), 3, np.random.default_rng(0)
sizes = dict(outer_dim=24, inner_dim=4, outer_heads=2, inner_heads=1, depths=(1, 1, 1, 1))
model = tnt_flax.create_model("ptnt_ti_patch16_192", num_classes=0, **sizes)


def make_batch(count=8):
    """Returns noisy images [count, 100, 150, 3] and masks: 0 background, 1 disc, 2 diamond."""
    (y, x), masks = np.mgrid[:100, :150], np.zeros((count, 100, 150), int)
    for mask in masks:
        for kind in (2, 1):
            dy, dx, r = y - RNG.integers(20, 80), x - RNG.integers(20, 130), RNG.integers(14, 28)
            mask[dx**2 + dy**2 < r**2 if kind == 1 else abs(dx) + abs(dy) < r] = kind
    images = np.stack([RNG.uniform(-1, 1, (CLASSES, 3))[mask] for mask in masks])
    return jnp.asarray(images + RNG.normal(0, 0.1, images.shape), jnp.float32), jnp.asarray(masks)


def loss_of(params, statistics, images, masks):
    backbone = {"params": params["backbone"], "batch_stats": statistics}
    maps, new = tnt_flax.feature_maps(model, backbone, images, train=True, mutable=["batch_stats"])
    logits = jnp.zeros((*masks.shape, CLASSES))
    for each, head in zip(maps, params["heads"], strict=True):
        shape = (len(images), *(each.stride * n for n in each.features.shape[1:3]), CLASSES)
        pixels = jax.image.resize(each.features @ head, shape, "bilinear")
        logits += pixels[:, : each.valid[0], : each.valid[1]]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, masks)
    return losses.mean(), (new["batch_stats"], logits.argmax(-1))


variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 128, 128, 3)))
heads = [jnp.zeros((24 * width, CLASSES)) for width in (1, 2, 4, 4)]
params, statistics = {"backbone": variables["params"], "heads": heads}, variables["batch_stats"]
optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))
state, losses = optimizer.init(params), []
step, update = jax.jit(jax.value_and_grad(loss_of, has_aux=True)), jax.jit(optimizer.update)
for _ in range(STEPS):
    images, masks = make_batch()
    (loss, (statistics, predicted)), gradients = step(params, statistics, images, masks)
    updates, state = update(gradients, state)
    params, losses = optax.apply_updates(params, updates), [*losses, float(loss)]
colors = np.array([[40, 40, 40], [230, 160, 0], [0, 160, 230]], np.uint8)
rows = [np.uint8(127.5 * (images.clip(-1, 1) + 1)), colors[masks], colors[predicted]]
Image.fromarray(np.vstack([np.hstack(list(row)) for row in rows])).save(PATH)
print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}; pixel accuracy {(predicted == masks).mean():.1%}")
