# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tnt_flax import create_model
from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import named_leaves
from tnt_flax.training.config import check_config
from tnt_flax.training.optimizer import (
    OPTIMIZERS,
    SCHEDULES,
    decay_mask,
    layer_scales,
    learning_rates,
    make_optimizer,
    make_schedule,
    per_epoch_schedule,
)

PUBLISHED = dict(
    learning_rate=1e-3,
    warmup_learning_rate=1e-6,
    min_learning_rate=1e-5,
    warmup_epochs=5,
    cooldown_epochs=10,
)


def test_published_learning_rates():
    rates = learning_rates(np.arange(310), 300, **PUBLISHED)
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


# ---------------------------------------------------------------------------- other optimizers

OPTIONS = dict(beta1=0.9, beta2=0.99, eps=1e-8, momentum=0.8, weight_decay=0.05, clip_norm=0.0)
BLOCKS = 3


def normal(seed, scale):
    """Three stacked blocks and a head, with random numbers."""
    random = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(random.normal(0, scale, shape), jnp.float32)
    return {
        "blocks_0": {"outer": {"fc1": {"kernel": array(BLOCKS, 6, 9), "bias": array(BLOCKS, 9)}}},
        "head": {"kernel": array(9, 4), "bias": array(4)},
    }


def run(name, params, grads_of_steps, **changes):
    """Returns the parameters after all steps, and the last state."""
    schedule = lambda step: 0.01 / (1 + step)
    tx = make_optimizer(schedule, name=name, **(OPTIONS | changes)).tx
    state = tx.init(params)
    for grads in grads_of_steps:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(found, expected, start, tolerance=1e-5):
    """Compares parameters relative to how far they moved from `start`."""
    for (name, x), y, z in zip(
        named_leaves(found).items(), jax.tree.leaves(expected), jax.tree.leaves(start), strict=True
    ):
        moved = np.abs(y - z).max()
        assert moved > 1e-4, name
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * moved + 1e-7, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_norms_and_matrices_are_those_of_single_blocks(name):
    start, grads = normal(0, 0.5), [normal(seed, 0.1) for seed in range(1, 4)]
    together, _ = run(name, start, grads)
    for i in range(BLOCKS):
        cut = lambda tree, i=i: (
            tree | {"blocks_0": jax.tree.map(lambda x: x[i:][:1], tree["blocks_0"])}
        )
        alone, _ = run(name, cut(start), list(map(cut, grads)))
        assert_close(cut(together), alone, cut(start))


def test_muon_orthogonalizes_matrices_of_blocks_only():
    start, grads = normal(0, 0.5), [normal(1, 0.1)]
    found, state = run("muon", start, grads, weight_decay=0.0)
    moved = (
        found["blocks_0"]["outer"]["fc1"]["kernel"] - start["blocks_0"]["outer"]["fc1"]["kernel"]
    )
    singular = np.linalg.svd(np.asarray(moved), compute_uv=False) / (0.01 * 0.2 * 9**0.5)
    assert singular.shape == (BLOCKS, 6)
    np.testing.assert_allclose(singular, 1, atol=0.3)
    expected, _ = run("adamw", start, grads, weight_decay=0.0)
    jax.tree.map(np.testing.assert_array_equal, found["head"], expected["head"])
    sizes = [x.shape for x in jax.tree.leaves(state)]
    assert sizes.count((BLOCKS, 6, 9)) == 1 and sizes.count((9, 4)) == 2  # no second moment


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layer_decay_freezing_and_clipping_apply_to_every_optimizer(name):
    start, grads = normal(0, 0.5), [normal(1, 0.1)]
    plain, _ = run(name, start, grads)
    frozen, state = run(name, start, grads, freeze="^head/")
    rounded = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(rounded, frozen["blocks_0"], plain["blocks_0"])
    assert (9, 4) not in {np.shape(x) for x in jax.tree.leaves(state)}
    half, _ = run(name, start, grads, layer_decay=0.5)
    delta = lambda tree: jax.tree.map(jnp.subtract, tree, start)
    scaled = jax.tree.map(jnp.multiply, delta(plain), layer_scales(start, 0.5))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-7)
    jax.tree.map(close, delta(half), scaled)
    clipped, _ = run(name, start, grads, clip_norm=0.1)
    norm = optax.tree.norm(grads[0])
    smaller, _ = run(name, start, [jax.tree.map(lambda x: x * 0.1 / norm, grads[0])])
    jax.tree.map(close, clipped, smaller)


@pytest.mark.parametrize(
    "key, value",
    [("name", "adam"), ("schedule", "step"), ("schedule_interval", "update"), ("momentum", 1.0)],
)
def test_unknown_optimizers_and_schedules_are_errors(smoke_config, key, value):
    config = smoke_config(**{f"optimizer__{key}": value})
    with pytest.raises(InputError, match=f"optimizer.{key}='?{value}'? is "):
        check_config(config)


@pytest.mark.oracle
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_updates_equal_timms(name, monkeypatch):
    """Of every block by itself, with timm's parameter groups."""
    import torch
    from timm.optim import create_optimizer_v2
    from timm.optim import muon as timm_muon

    # timm orthogonalizes in bfloat16.
    defaults = timm_muon.zeropower_via_newtonschulz.__defaults__
    defaults = tuple(torch.float64 if x is torch.bfloat16 else x for x in defaults)
    monkeypatch.setattr(timm_muon.zeropower_via_newtonschulz, "__defaults__", defaults)
    start, grads = normal(0, 0.5), [normal(seed, 0.3) for seed in range(1, 11)]

    def tensors(tree):  # per block; kernels [out, in]
        fc1 = tree["blocks_0"]["outer"]["fc1"]
        kernels = [*fc1["kernel"], tree["head"]["kernel"]]
        arrays = [np.asarray(x, np.float64).T for x in kernels]
        arrays += [np.asarray(x, np.float64) for x in (*fc1["bias"], tree["head"]["bias"])]
        return [torch.from_numpy(x.copy()) for x in arrays]

    params = [torch.nn.Parameter(x) for x in tensors(start)]
    decay = OPTIONS["weight_decay"]
    groups = [
        dict(params=params[:BLOCKS], weight_decay=decay),
        dict(params=params[BLOCKS : BLOCKS + 1], weight_decay=decay, use_fallback=True),
        dict(params=params[BLOCKS + 1 :], weight_decay=0.0, use_fallback=True),
    ]
    options = dict(betas=(0.9, 0.99), eps=1e-8) if name != "lion" else dict(betas=(0.9, 0.99))
    options = {} if name == "sgd" else options
    optimizer = create_optimizer_v2(
        groups, opt=name, lr=0.01, weight_decay=decay, momentum=OPTIONS["momentum"], **options
    )
    for step, tree in enumerate(grads):
        for param, grad in zip(params, tensors(tree), strict=True):
            param.grad = grad
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.step()
    clip_norm = 1.0 if name == "lamb" else 0.0  # timm's LAMB clips by itself
    with jax.default_matmul_precision("highest"):
        found, _ = run(name, start, grads, clip_norm=clip_norm)
    for x, y, z in zip(tensors(found), params, tensors(start), strict=True):
        moved = (y.detach() - z).abs().max()
        assert moved > 1e-3
        np.testing.assert_allclose(x, y.detach(), rtol=0, atol=1e-5 * moved + 5e-7)


@pytest.mark.oracle
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_equal_timms_schedulers(schedule, interval):
    import torch
    from timm.scheduler import create_scheduler_v2

    epochs, cooldown, steps = 40, 10, 7
    options = PUBLISHED | dict(cooldown_epochs=cooldown)
    names = {"cosine": "cosine", "linear": "poly", "constant": "wsd"}
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    constant = schedule == "constant"
    scheduler, total = create_scheduler_v2(
        sgd,
        sched=names[schedule],
        num_epochs=epochs + cooldown if constant else epochs,
        cooldown_epochs=0 if constant else cooldown,
        decay_epochs=cooldown,
        decay_rate=1.0,
        decay_fn="linear",
        min_lr=1e-5,
        warmup_lr=1e-6,
        warmup_epochs=5,
        step_on_epochs=interval == "epoch",
        updates_per_epoch=steps,
    )
    assert total == epochs + cooldown
    expected = []
    for step in range(total * steps):
        expected.append(sgd.param_groups[0]["lr"])
        scheduler.step_update(step + 1)
        if (step + 1) % steps == 0:
            scheduler.step((step + 1) // steps)
    ours = make_schedule(epochs, steps, schedule=schedule, schedule_interval=interval, **options)
    found = jax.vmap(ours)(jnp.arange(total * steps))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)  # the peak is 1e-3


def test_a_constant_rate_falls_in_the_cool_down_only():
    options = PUBLISHED | dict(schedule="constant", warmup_epochs=2, cooldown_epochs=4)
    schedule = make_schedule(6, 10, schedule_interval="step", **options)
    rates = [float(schedule(step)) for step in (0, 10, 20, 60, 80, 100, 1000)]
    expected = [1e-6, 5.005e-4, 1e-3, 1e-3, 5.05e-4, 1e-5, 1e-5]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    steady = make_schedule(6, 10, **(options | dict(cooldown_epochs=0)))
    assert float(steady(1000)) == np.float32(1e-3)


def test_clipping_scales_the_whole_gradient():
    common = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
    params = {"kernel": jnp.ones(2)}
    grads = {"kernel": jnp.array([3.0, 4.0])}
    clipped = make_optimizer(optax.constant_schedule(1.0), clip_norm=1.0, **common).tx
    _, state = clipped.update(grads, clipped.init(params), params)
    moments = optax.tree.get(state, "mu")["kernel"]
    np.testing.assert_allclose(moments, 0.1 * np.array([0.6, 0.8]), rtol=1e-6)
