# SPDX-License-Identifier: Apache-2.0
"""Mixing, normalizing and erasing, against closed forms and, with `-m oracle`, against timm.

With equal random numbers, pixels and targets are bit-identical to timm's. The random numbers cannot
be: their distributions are compared with closed forms by the Kolmogorov-Smirnov distance of 10,000
to 20,000 samples.
"""

import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tnt_flax.training import mixup
from tnt_flax.training.mixup import Mix, normalize

PUBLISHED_MIX = dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5)
PUBLISHED_ERASE = dict(prob=0.25, area=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))
EMPTY = (0, 0, 0, 0)
SIZE = 224


def test_pixels_are_normalized_per_channel():
    pixels = np.array([0, 127, 128, 255], np.uint8).repeat(3).reshape(1, 2, 2, 3)
    out = normalize(jnp.asarray(pixels), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, ((pixels.astype(np.float32)) - 127.5) / 127.5)
    out = normalize(jnp.full((1, 1, 1, 3), 255, jnp.uint8), (0.0, 0.5, 0.25), (1.0, 0.5, 0.25))
    np.testing.assert_allclose(out[0, 0, 0], [1, 1, 3], rtol=1e-6)


# ---------------------------------------------------------------- mixing, with a given mix


def apply(images, blend, box, targets=None):
    targets = jnp.eye(len(images)) if targets is None else targets
    blend, box = jnp.asarray(blend, jnp.float32), jnp.asarray(box, jnp.int32)
    mixed, targets = jax.jit(mixup.apply_mix)(images, targets, Mix(blend, box))
    assert mixed.dtype == jnp.uint8 and targets.dtype == jnp.float32
    return np.asarray(mixed), np.asarray(targets)


def random_images(batch, height=10, width=14):
    return np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), np.uint8)


def test_partners_are_mirrored_within_groups_of_consecutive_rows():
    images = np.arange(12, dtype=np.uint8).repeat(3).reshape(12, 1, 1, 3)
    mixed, targets = apply(images, [0, 1, 0], [EMPTY] * 3)
    partners = [3, 2, 1, 0, 4, 5, 6, 7, 11, 10, 9, 8]
    assert mixed[:, 0, 0, 0].tolist() == partners
    np.testing.assert_array_equal(targets, np.eye(12)[partners])


def test_mixup_is_correctly_rounded_for_every_pair_of_pixels():
    """Weights are multiples of 2^-16: products are exact, so a fused multiply-add cannot differ.

    The first, one half, gives halves, which are rounded to even.
    """
    own, partner = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    pair = np.stack([own, partner])[..., None].repeat(3, axis=3)
    lam = np.append(0.5, np.random.default_rng(0).integers(1, 2**16, 5) / 2**16)
    mixed, targets = apply(np.tile(pair, (6, 1, 1, 1)), lam, [EMPTY] * 6)
    for i, weight in enumerate(lam):
        exact = own * weight + partner * (1 - weight)  # in float64
        np.testing.assert_array_equal(mixed[2 * i, ..., 0], np.rint(exact))
        exact = partner * weight + own * (1 - weight)
        np.testing.assert_array_equal(mixed[2 * i + 1, ..., 2], np.rint(exact))
        np.testing.assert_array_equal(targets[2 * i, 2 * i : 2 * i + 2], [weight, 1 - weight])


def test_cutmix_pastes_the_box_and_corrects_the_targets():
    images = random_images(4)
    mixed, targets = apply(images, [1, 1], [(2, 5, 0, 14), EMPTY])
    expected = images.copy()
    expected[:2, 2:5] = images[1::-1, 2:5]
    np.testing.assert_array_equal(mixed, expected)
    share = 1 - 3 * 14 / 140
    np.testing.assert_allclose(targets[:2, :2], [[share, 1 - share], [1 - share, share]], rtol=1e-6)
    np.testing.assert_array_equal(targets[2:], np.eye(4)[2:])


def test_cutmix_box_equals_float64_arithmetic_for_every_weight():
    lam = np.arange(2**16 + 1) / 2**16
    height, width = 224, 96
    y, x = np.random.default_rng(0).integers(0, (height, width), (len(lam), 2)).T
    boxes = mixup.cut_box(
        jnp.asarray(lam, jnp.float32), jnp.asarray(y), jnp.asarray(x), height, width
    )
    for size, center, low, high in ((height, y, 0, 1), (width, x, 2, 3)):
        half = np.trunc(size * np.sqrt(1 - lam)).astype(int) // 2
        np.testing.assert_array_equal(boxes[:, low], np.maximum(center - half, 0))
        np.testing.assert_array_equal(boxes[:, high], np.minimum(center + half, size))
    assert boxes[-1].tolist() == [y[-1], y[-1], x[-1], x[-1]]  # nothing at lam = 1


# ---------------------------------------------------------------- mixing, at random


def sample(function, count, **options):
    """Samples for `count` groups or images of 224 x 224 pixels."""
    jitted = jax.jit(lambda key: function(key, count, SIZE, SIZE, **options))
    return jax.device_get(jitted(jax.random.key(0)))


@pytest.fixture(scope="module")
def mixes():
    """Blend [20000] and box [20000, 4]."""
    return sample(mixup.sample_mix, 20_000, **PUBLISHED_MIX)


@pytest.fixture(scope="module")
def boxes():
    """Erased boxes of 60,000 images."""
    return sample(mixup.sample_boxes, 60_000, **PUBLISHED_ERASE)


def ks_distance(samples, cdf):
    """Kolmogorov-Smirnov: the largest distance between the samples' distribution and `cdf`."""
    samples = np.sort(samples)
    steps = np.arange(len(samples) + 1) / len(samples)
    expected = np.asarray(cdf(samples))
    return max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())


def test_half_of_the_groups_are_mixup_with_beta_weights(mixes):
    blend, box = mixes
    is_mixup = blend < 1
    assert is_mixup.mean() == pytest.approx(0.5, abs=0.015)
    assert (box[is_mixup, 0] == box[is_mixup, 1]).all()
    np.testing.assert_array_equal(blend * 2**16, np.rint(blend * 2**16))
    beta = lambda x: jax.scipy.special.betainc(0.8, 0.8, x)
    assert ks_distance(blend[is_mixup], beta) < 0.02  # 1.95 / sqrt(10,000): one run in a thousand


def test_boxes_of_cutmix(mixes):
    blend, box = mixes
    top, bottom, left, right = box[blend == 1].T
    height, width = bottom - top, right - left
    assert (top >= 0).all() and (bottom <= SIZE).all() and (height >= 0).all()
    # Given lam, the sides are independent: average over every center, then over every lam.
    half = np.trunc(SIZE * np.sqrt(1 - np.arange(0, 2**16, 16) / 2**16)).astype(int)[:, None] // 2
    center = np.arange(SIZE)[None]
    sides = np.minimum(center + half, SIZE) - np.maximum(center - half, 0)
    area = (sides.mean(axis=1) ** 2).mean()
    assert (height * width).mean() == pytest.approx(area, rel=0.04)
    known = np.sort(sides.ravel())
    cdf = lambda x: np.searchsorted(known, x, side="right") / len(known)
    jitter = np.random.default_rng(0).random(len(height))  # makes whole numbers continuous
    for side in (height, width):
        smooth = lambda x: cdf(x // 1 - 1) + (x % 1) * (cdf(x // 1) - cdf(x // 1 - 1))
        assert ks_distance(side + jitter, smooth) < 0.02


def test_mixup_alone_and_only_sometimes():
    options = PUBLISHED_MIX | {"cutmix_alpha": 0.0, "prob": 0.3}
    blend, box = sample(mixup.sample_mix, 20_000, **options)
    assert (blend < 1).mean() == pytest.approx(0.3, abs=0.015)
    np.testing.assert_array_equal(box[:, 0], box[:, 1])
    np.testing.assert_array_equal(box[:, 2], box[:, 3])


def test_every_group_has_its_own_mix():
    images = random_images(32)

    @jax.jit
    def mix(key, images):
        mixed = mixup.mix(key, images, jnp.eye(32), groups=4, **PUBLISHED_MIX)
        return mixed, mixup.sample_mix(key, 4, 10, 14, **PUBLISHED_MIX)

    (mixed, targets), (blend, box) = mix(jax.random.key(2), images)
    assert len({(float(b), *map(int, x)) for b, x in zip(blend, box, strict=True)}) == 4
    expected, expected_targets = apply(images, blend, box)
    np.testing.assert_array_equal(mixed, expected)
    np.testing.assert_allclose(targets, expected_targets, rtol=1e-6)


# ---------------------------------------------------------------- erasing


def test_sides_are_rounded_halves_to_even_and_must_be_smaller_than_the_image():
    cases = [  # pixels and ratios of two tries; height and width that come of them
        ((2.25, 4.0), (1.0, 1.0), (2, 2)),
        ((6.25, 9.0), (1.0, 1.0), (2, 2)),
        ((12.25, 9.0), (1.0, 1.0), (4, 4)),
        ((64.0, 49.0), (1.0, 1.0), (7, 7)),  # the first is as large as the image
        ((16.0, 9.0), (4.0, 4.0), (6, 2)),  # 8 high
        ((16.0, 9.0), (0.25, 0.25), (2, 6)),  # 8 wide
        ((64.0, 16.0), (1.0, 4.0), (0, 0)),
    ]
    pixels, ratios, expected = map(jnp.array, zip(*cases, strict=True))
    np.testing.assert_array_equal(mixup.first_fit(pixels / 64, ratios, 8, 8), expected.T)


def test_a_quarter_of_the_images_is_erased_inside_their_borders(boxes):
    top, bottom, left, right = boxes.T
    erased = bottom > top
    assert erased.mean() == pytest.approx(0.25, abs=0.0075)
    np.testing.assert_array_equal(erased, right > left)
    assert (top >= 0).all() and (left >= 0).all() and (bottom <= 224).all() and (right <= 224).all()


def test_areas_ratios_and_places_of_erased_boxes(boxes):
    top, bottom, left, right = boxes[boxes[:, 1] > boxes[:, 0]].T
    height, width = bottom - top, right - left
    # The first try that fits is distributed as any try, given that it fits.
    areas, logs = np.meshgrid(
        np.linspace(0.02, 1 / 3, 801), np.linspace(math.log(0.3), -math.log(0.3), 801)
    )
    h = np.rint(np.sqrt(areas * SIZE**2 * np.exp(logs)))
    w = np.rint(np.sqrt(areas * SIZE**2 / np.exp(logs)))
    fits = (h < SIZE) & (w < SIZE)
    assert 0.95 < fits.mean() < 1
    for ours, expected in ((height * width, (h * w)[fits]), (height / width, (h / w)[fits])):
        expected = np.sort(expected)
        cdf = lambda x, known=expected: np.searchsorted(known, x) / len(known)
        assert ks_distance(ours, cdf) < 0.018
    # top / (SIZE - height + 1) is uniform, except that top is whole
    for start, room in ((top, SIZE - height + 1), (left, SIZE - width + 1)):
        jitter = np.random.default_rng(0).random(len(start))
        assert ks_distance((start + jitter) / room, lambda x: x) < 0.014
        assert (start == 0).any() and (start == room - 1).any()  # both ends are included


def test_erased_pixels_are_noise_and_the_others_untouched():
    options = PUBLISHED_ERASE | {"prob": 0.5}

    @jax.jit
    def erase(key, images):
        boxes = mixup.sample_boxes(jax.random.split(key)[0], 64, 32, 24, **options)
        return mixup.erase(key, images, **options), boxes

    erased, boxes = map(np.asarray, erase(jax.random.key(0), jnp.full((64, 32, 24, 3), 7.0)))
    noise = []
    for image, (top, bottom, left, right) in zip(erased, boxes, strict=True):
        changed = np.zeros((32, 24), bool)
        changed[top:bottom, left:right] = True
        np.testing.assert_array_equal(image != 7, np.repeat(changed[..., None], 3, axis=2))
        noise.append(image[changed])
    noise = np.concatenate(noise)  # [pixels, 3]
    assert len(noise) > 3000
    normal = lambda x: jax.scipy.stats.norm.cdf(x)
    assert ks_distance(noise.ravel(), normal) < 1.95 / math.sqrt(noise.size)
    correlation = np.corrcoef(noise.T) - np.eye(3)
    assert np.abs(correlation).max() < 0.07  # channels are independent
    assert len(np.unique(noise)) > 0.99 * noise.size  # as are pixels


# ---------------------------------------------------------------- timm


@pytest.fixture(scope="module")
def timm():
    import timm.data.mixup
    import timm.data.random_erasing

    return timm


class Places(list):
    """Replaces an image; records top, bottom, left and right of each box written to it."""

    def __setitem__(self, where, value):
        self.append((where[1].start, where[1].stop, where[2].start, where[2].stop))


@pytest.fixture
def no_noise():
    with mock.patch("timm.data.random_erasing._get_pixels", lambda *_, **__: None):
        yield


@pytest.mark.oracle
@pytest.mark.parametrize("lam, cutmix", [(0.40625, False), (54321 / 2**16, False), (0.3, True)])
def test_equal_mixes_give_timms_pixels_and_targets(lam, cutmix, timm):
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
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)
    blend, box = ([1.0], [box]) if cutmix else ([lam], [EMPTY])
    ours, our_targets = apply(images, blend, box, targets)
    np.testing.assert_array_equal(ours, theirs.numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(our_targets, their_targets.numpy(), rtol=0, atol=1.2e-7)


@pytest.mark.oracle
def test_equal_random_numbers_erase_boxes_of_timms_size(timm, no_noise):
    """Aspect ratios go beyond the published ones, so that tries fail."""
    generator = np.random.RandomState(0)
    height, width = 40, 24
    erasing = timm.data.random_erasing.RandomErasing(1.0, mode="pixel", device="cpu")
    areas = generator.uniform(0.02, 1 / 3, (300, 10)).astype(np.float32)
    logs = generator.uniform(-3, 3, (300, 10)).astype(np.float32)
    boxes = Places()
    for samples in np.stack([areas, logs], axis=2).reshape(300, 20):
        with mock.patch("random.uniform", side_effect=samples.tolist()):
            erasing._erase(boxes, 3, height, width, None)
    top, bottom, left, right = np.array(boxes).T
    ours = mixup.first_fit(jnp.asarray(areas), jnp.exp(jnp.asarray(logs)), height, width)
    np.testing.assert_array_equal(ours, [bottom - top, right - left])
