# SPDX-License-Identifier: Apache-2.0
"""Mixing and erasing beside timm's, live: `python -m pytest -m oracle` (needs torch, timm).

Given the same draws, pixels and targets are equal to the bit. Draws cannot be: for those, the
Kolmogorov-Smirnov distance of 10,000 to 20,000 of timm's and ours (two samples of the same
distribution differ by more than 1.95 sqrt(2 / n), 0.0195 to 0.028, once in a thousand times).
"""

import random
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_flax.training import mixup as augment
from tnt_flax.training.step import smooth_one_hot

pytestmark = pytest.mark.oracle

SIZE = 224
MIX = dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5)
ERASE = dict(prob=0.25, area=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))


@pytest.fixture(scope="module")
def timm():
    import timm.data.mixup
    import timm.data.random_erasing

    return timm


def report(record_property, figures):
    for what, value in figures.items():
        print(f"  {what}: {value:.4g}")
        record_property(what, value)


def distance(ours, theirs):
    """Kolmogorov-Smirnov distance of two samples."""
    ours, theirs = np.sort(ours), np.sort(theirs)
    x = np.concatenate([ours, theirs])
    cdf = lambda known: np.searchsorted(known, x, side="right") / len(known)
    return np.abs(cdf(ours) - cdf(theirs)).max()


class Places(list):
    """In an image's stead: remembers top, bottom, left and right of what is written to it."""

    def __setitem__(self, where, value):
        self.append((where[1].start, where[1].stop, where[2].start, where[2].stop))


@pytest.fixture
def no_noise():
    with mock.patch("timm.data.random_erasing._get_pixels", lambda *_, **__: None):
        yield


@pytest.mark.parametrize("lam, cutmix", [(0.40625, False), (54321 / 2**16, False), (0.3, True)])
def test_the_same_draw_gives_timms_pixels_and_targets(lam, cutmix, timm):
    random_state = np.random.RandomState(0)
    images = random_state.randint(0, 256, (8, 32, 48, 3)).astype(np.uint8)
    labels = random_state.randint(0, 10, 8)
    box = (3, 21, 0, 30)
    collate = timm.data.mixup.FastCollateMixup(0.8, 1.0, num_classes=10)
    collate._params_per_batch = lambda: (lam, cutmix)
    with mock.patch("timm.data.mixup.rand_bbox", lambda *_, **__: box):
        theirs, their_targets = collate(
            list(zip(images.transpose(0, 3, 1, 2), labels.tolist(), strict=True))
        )
    drawn = augment.Mix(
        jnp.array([1.0 if cutmix else lam], jnp.float32), jnp.array([box if cutmix else (0,) * 4])
    )
    targets = smooth_one_hot(jnp.asarray(labels), 10, 0.1)
    ours, our_targets = jax.jit(augment.apply_mix)(images, targets, drawn)
    np.testing.assert_array_equal(ours, theirs.numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(our_targets, their_targets.numpy(), rtol=0, atol=1.2e-7)


def test_the_same_center_gives_timms_box(timm):
    """timm now makes odd boxes a pixel longer than it did then; boxes of even sides are equal."""
    lam = np.arange(0, 2**16, 97) / 2**16
    centers = np.random.RandomState(0).randint(0, SIZE, (2, len(lam)))
    ours = augment.cut_box(jnp.asarray(lam, jnp.float32), *jnp.asarray(centers), SIZE, SIZE)
    even = 0
    for weight, y, x, box in zip(lam, *centers, np.asarray(ours), strict=True):
        with mock.patch("numpy.random.randint", side_effect=[y, x]):
            top, bottom, left, right = timm.data.mixup.rand_bbox((3, SIZE, SIZE), weight)
        longer = np.array([top, bottom, left, right]) - box
        if int(SIZE * np.sqrt(1 - weight)) % 2 == 0:
            assert not longer.any()
            even += 1
        assert not longer[[0, 2]].any() and set(longer) <= {0, 1}
    assert even > 300


def test_draws_of_mixing_are_distributed_as_timms(timm, record_property):
    np.random.seed(0)
    mixup = timm.data.mixup.FastCollateMixup(0.8, 1.0, prob=1.0, switch_prob=0.5)
    blends, areas, heights, tops = [], [], [], []
    for _ in range(20_000):
        lam, cutmix = mixup._params_per_batch()
        if cutmix:
            (top, bottom, left, right), lam = timm.data.mixup.cutmix_bbox_and_lam(
                (3, SIZE, SIZE), lam
            )
            areas.append(1 - lam)
            heights.append(bottom - top)
            tops.append(top)
        else:
            blends.append(lam)
    draw = jax.jit(lambda key: augment.sample_mix(key, 20_000, SIZE, SIZE, **MIX))
    blend, box = map(np.asarray, draw(jax.random.key(5)))
    cut = blend == 1
    top, bottom, left, right = box[cut].T
    area = (bottom - top) * (right - left) / SIZE**2
    figures = {
        "mixup weights": distance(blend[~cut], blends),
        "cutmix areas": distance(area, areas),
        # timm's odd boxes are a pixel longer
        "cutmix heights": distance((bottom - top) // 2, np.array(heights) // 2),
        "cutmix tops": distance(top, tops),
    }
    report(record_property, figures)
    assert max(figures.values()) < 0.028
    shares = cut.mean(), len(areas) / 20_000
    report(record_property, dict(zip(("share of cutmix", "timm's"), shares, strict=True)))
    assert abs(shares[0] - shares[1]) < 0.02
    assert abs(area.mean() - np.mean(areas)) < 0.012


def test_erased_boxes_are_distributed_as_timms(timm, no_noise, record_property):
    boxes = Places()
    random.seed(0)
    erasing = timm.data.random_erasing.RandomErasing(0.25, mode="pixel", device="cpu")
    for _ in range(60_000):
        erasing._erase(boxes, 3, SIZE, SIZE, None)
    draw = jax.jit(lambda key: augment.sample_boxes(key, 60_000, SIZE, SIZE, **ERASE))
    ours = np.asarray(draw(jax.random.key(6)))
    ours = ours[ours[:, 1] > ours[:, 0]]
    measures = {
        "areas": lambda t, b, l, r: (b - t) * (r - l),
        "aspect ratios": lambda t, b, l, r: (b - t) / (r - l),
        "tops": lambda t, b, l, r: t,
        "lefts": lambda t, b, l, r: l,
        "rights": lambda t, b, l, r: r,
    }
    figures = {
        f"erased {what}": distance(measure(*ours.T), measure(*np.array(boxes).T))
        for what, measure in measures.items()
    }
    report(record_property, figures)
    assert max(figures.values()) < 0.0225  # 15,000 of each
    shares = len(ours) / 60_000, len(boxes) / 60_000
    report(record_property, dict(zip(("share of erased", "timm's"), shares, strict=True)))
    assert abs(shares[0] - shares[1]) < 0.01


def test_the_same_numbers_erase_a_box_of_the_same_size(timm, no_noise):
    """Aspect ratios go beyond the published ones, so that tries fail."""
    generator = np.random.RandomState(0)
    height, width = 40, 24
    erasing = timm.data.random_erasing.RandomErasing(1.0, mode="pixel", device="cpu")
    areas = generator.uniform(0.02, 1 / 3, (300, 10)).astype(np.float32)
    logs = generator.uniform(-3, 3, (300, 10)).astype(np.float32)
    boxes = Places()
    for draws in np.stack([areas, logs], axis=2).reshape(300, 20):
        with mock.patch("random.uniform", side_effect=draws.tolist()):
            erasing._erase(boxes, 3, height, width, None)
    top, bottom, left, right = np.array(boxes).T
    ours = augment.first_fit(jnp.asarray(areas), jnp.exp(jnp.asarray(logs)), height, width)
    np.testing.assert_array_equal(ours, [bottom - top, right - left])
