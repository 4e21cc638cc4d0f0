# SPDX-License-Identifier: Apache-2.0
"""Parity with timm, live: `pytest -m oracle tests/models/test_oracle_models.py` (torch, timm).

Weights are random in every tensor, norms and biases included; the head's have variance 1 / inputs,
so that logits have a spread around 1. If torch or timm is missing these tests fail.
"""

import jax
import numpy as np
import pytest

from tests.goldens.scripts import models
from tests.helpers import timm_weights
from tnt_flax.models import create_model

pytestmark = pytest.mark.oracle

NAMES = ["tnt_s_patch16_224", "tnt_b_patch16_224", "tnt_s_legacy_patch16_224"]


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Highest precision, and XLA's optimizations, which the other tests do without."""
    with jax.default_matmul_precision("highest"):
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def torch():
    import torch

    return torch


@pytest.fixture(scope="module")
def timm():
    import timm
    import timm.models.tnt

    return timm


def fill(torch, network, seed=0):
    """Gives timm's network random weights; returns them as our parameters."""
    shapes = {name: tuple(x.shape) for name, x in network.state_dict().items()}
    weights = timm_weights.random_state(shapes, seed)
    network.load_state_dict({k: torch.from_numpy(x) for k, x in weights.items()}, strict=True)
    return timm_weights.to_flax(weights)


def random_images(batch, height=224, width=224):
    return np.random.RandomState(1).standard_normal((batch, height, width, 3)).astype(np.float32)


def to_torch(torch, images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_timms(name, torch, timm, record_property):
    network = timm.create_model(name, pretrained=False).eval()
    params, images = fill(torch, network), random_images(2)
    with torch.no_grad():
        theirs = network(to_torch(torch, images)).numpy()
        exact = network.double()(to_torch(torch, images).double()).numpy()
    model = create_model(name)
    ours = np.asarray(jax.jit(model.apply)({"params": params}, images))

    figures = {
        "logits' standard deviation": exact.std(),
        "max |ours - timm|": np.abs(ours - theirs).max(),
        "max |ours - timm in float64|": np.abs(ours - exact).max(),
        "max |timm - timm in float64|": np.abs(theirs - exact).max(),
    }
    report(name, figures, record_property)
    assert 0.3 < exact.std() < 3
    assert max(np.abs(ours - theirs).max(), np.abs(ours - exact).max()) <= 1e-4


def report(title, figures, record_property):
    print(f"\n{title}")
    for what, value in figures.items():
        print(f"  {what}: {value:.3g}")
        record_property(f"{title}: {what}", value)


def test_bfloat16_costs_little(torch, timm, record_property):
    name = "tnt_s_patch16_224"
    network = timm.create_model(name, pretrained=False).eval()
    params, images = fill(torch, network), random_images(8)
    exact, half = (
        np.asarray(jax.jit(create_model(name, dtype=dtype).apply)({"params": params}, images))
        for dtype in ("float32", "bfloat16")
    )
    with torch.no_grad():
        theirs = network.bfloat16()(to_torch(torch, images).bfloat16()).float().numpy()
    rms = lambda difference: np.sqrt(np.mean(difference**2))
    figures = {
        "logits' standard deviation": exact.std(),
        "max difference": np.abs(half - exact).max(),
        "rms difference": rms(half - exact),
        "equal argmax, of 8": (half.argmax(-1) == exact.argmax(-1)).sum(),
        "timm's max difference": np.abs(theirs - exact).max(),
        "timm's rms difference": rms(theirs - exact),
    }
    report("bfloat16, tnt_s_patch16_224", figures, record_property)
    assert figures["rms difference"] < 0.02 * exact.std()
    assert figures["max difference"] < 0.1 * exact.std()


@pytest.mark.parametrize("variant", ["official", "legacy"])
def test_goldens_are_what_the_script_writes(variant, tmp_path):
    models.main(tmp_path)
    name = f"tnt_{variant}.npz"
    with np.load(tmp_path / name) as fresh, np.load(models.GOLDEN / name) as committed:
        assert fresh.files == committed.files
        for key in fresh.files:
            np.testing.assert_allclose(fresh[key], committed[key], rtol=1e-5, atol=1e-9)
