# SPDX-License-Identifier: Apache-2.0
"""RandAugment: arguments and pixels of timm, with the random numbers of the sample.

The hashes in goldens/data/randaugment.json are from timm 1.0.31, see the script of that name in
tests/goldens/scripts, and the same with Pillow 10.1, 11.3, 12.0 and 13.0. Tests marked `oracle`
compare with timm itself.
"""

import collections
import functools
import hashlib
import io
import json
import math
import pathlib
import random
import types

import numpy as np
import pytest
from PIL import Image

from tests.helpers.photos import all_photos
from tests.helpers.randaugment_cases import FILL, NAMES, cases, digest, photographs
from tnt_flax.core.errors import InputError
from tnt_flax.data import randaugment
from tnt_flax.data.randaugment import GEOMETRIC, PLAIN, RESAMPLE, apply_op
from tnt_flax.data.transforms import train_transform

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens/data"
GOLDEN = json.loads((GOLDENS / "randaugment.json").read_text())
GOLDEN_CALLS = [
    ("TranslateXRel", -10, "BICUBIC"),
    ("TranslateYRel", -8.795101, "BILINEAR"),
    ("SolarizeAdd", 9.087362, "BILINEAR"),
    ("SolarizeIncreasing", 9.096882, "BILINEAR"),
    ("Rotate", 8.669587, "BILINEAR"),
]
GOLDEN_PIXELS = "175e6f5ea67de0ed"
PUBLISHED = "rand-m9-mstd0.5-inc1"
HALF = (0.5, 0.5, 0.5)
BILINEAR, BICUBIC = RESAMPLE
PHOTOGRAPHS = photographs()
CROP = dict(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))

parse = functools.partial(randaugment.parse, mean=HALF)


def generator(seed):
    return np.random.Generator(np.random.Philox(seed))


def samples(config, count, seed=0):
    """Returns the operations sampled for `count` images, one list each."""
    augment, numbers = parse(config), generator(seed)
    return [augment.sample(numbers) for _ in range(count)]


def magnitudes(config, count):
    """Returns the absolute levels of all operations sampled for `count` images."""
    return np.abs([call.level for calls in samples(config, count) for call in calls])


# --------------------------------------------------------------------------------- the operations


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("photo", PHOTOGRAPHS)
def test_pixels_equal_timm(photo, name):
    original = PHOTOGRAPHS[photo].tobytes()
    golden = GOLDEN["sha256"][photo][name].split()
    for case, expected in zip(cases(name), golden, strict=True):
        image = apply_op(PHOTOGRAPHS[photo], name, *case, FILL)
        assert (image.mode, image.size) == ("RGB", PHOTOGRAPHS[photo].size)
        assert digest(image) == expected, case
    assert PHOTOGRAPHS[photo].tobytes() == original  # the argument is not modified


# --------------------------------------------------------------------------------------- sampling


def test_samples_are_the_golden_ones():
    # Literals of our own, because the random numbers are not timm's.
    calls = [call for calls in samples(PUBLISHED, 4, seed=21) for call in calls]
    assert [(c.name, round(c.level, 6), c.resample.name) for c in calls] == GOLDEN_CALLS
    hashed = hashlib.sha256()
    for seed in range(20):
        hashed.update(parse(PUBLISHED)(PHOTOGRAPHS["small"], generator(seed)).tobytes())
    assert hashed.hexdigest()[:16] == GOLDEN_PIXELS


def test_global_random_numbers_are_neither_used_nor_changed():
    augment = parse(PUBLISHED)
    run = lambda: [augment(PHOTOGRAPHS["small"], generator(seed)) for seed in range(20)]
    state = lambda: (random.getstate(), np.random.get_state()[1].tolist())
    expected = run()
    random.seed(5)
    np.random.seed(5)
    before = state()
    assert run() == expected and state() == before


def near(count, total, probability):
    """True within 4.5 standard deviations of a binomial distribution."""
    deviation = math.sqrt(total * probability * (1 - probability))
    return abs(count - total * probability) < 4.5 * deviation


def test_distribution_of_the_published_recipe():
    images = 15_000
    sampled = samples(PUBLISHED, images)
    lengths = collections.Counter(map(len, sampled))
    assert all(near(lengths[k], images, p) for k, p in enumerate((0.25, 0.5, 0.25)))
    same = sum(len(calls) == 2 and calls[0].name == calls[1].name for calls in sampled)
    assert near(same, images, 0.25 / 15)  # with replacement
    calls = [call for calls in sampled for call in calls]
    # Magnitudes are normal with mean 9 and deviation 0.5, clipped at 10.
    levels = np.abs([call.level for call in calls])
    assert levels.min() > 6.5 and levels.max() == 10
    for bound in (8.0, 8.5, 9.0, 9.5, 9.999):
        below = (1 + math.erf((bound - 9) / 0.5 / math.sqrt(2))) / 2
        assert near((levels < bound).sum(), len(levels), below), bound
    # Operations, signs and filters are uniform and independent.
    for name in randaugment.INCREASING_OPS:
        here = [(call.level < 0, call.resample == BICUBIC) for call in calls if call.name == name]
        assert near(len(here), 2 * images, 0.5 / 15)
        negative, bicubic = np.array(here).T
        assert not negative.any() if name in PLAIN else near(negative.sum(), len(here), 0.5)
        if name in GEOMETRIC:
            assert near(bicubic.sum(), len(here), 0.5)
            assert near((negative & bicubic).sum(), len(here), 0.25)
        else:
            assert not bicubic.any()


def test_distributions_of_the_options():
    images = 4000
    for p in (0, 0.3, 1):
        levels = magnitudes(f"rand-p{p}-n3", images)
        assert near(len(levels), 3 * images, p) or len(levels) == p * 3 * images
        assert set(levels) <= {10}
    levels = magnitudes("rand-m8-mstd101", images)
    assert 0 < levels.min() and levels.max() < 8  # uniform
    assert abs(levels.mean() - 4) < 4.5 * 8 / math.sqrt(12 * len(levels))
    assert np.histogram(levels, 4, (0, 8))[0] == pytest.approx(len(levels) / 4, rel=0.15)
    levels = magnitudes("rand-m1-mstd2", images)
    assert near((levels == 0).sum(), len(levels), (1 - math.erf(0.5 / math.sqrt(2))) / 2)
    assert magnitudes("rand-m12-mmax14-mstd4", images).max() == 14
    assert set(magnitudes("rand-m12", 50)) == {10}


# ---------------------------------------------------------------------------------- config strings


def test_the_published_recipe():
    arguments = dict(num_ops=2, probability=0.5, fill=FILL)
    arguments |= dict(magnitude=9, magnitude_std=0.5, max_magnitude=10)
    expected = randaugment.RandAugment(tuple(randaugment.INCREASING_OPS), **arguments)
    assert parse(PUBLISHED) == expected
    assert parse("rand-inc1-mstd0.5-m9") == parse(PUBLISHED)


def test_defaults_and_every_section():
    plain = parse("rand")
    assert plain == parse("rand-m10-n2-p0.5-mstd0-mmax10-inc0")  # `inc0` unlike in timm 0.3.2
    assert plain.ops == tuple(GOLDEN["sets"]["inc0"])
    full = parse("rand-m7-n3-p0.25-mstd1.5-mmax30-inc1")
    assert full.ops == tuple(GOLDEN["sets"]["inc1"])
    assert (full.magnitude, full.num_ops, full.probability) == (7, 3, 0.25)
    assert (full.magnitude_std, full.max_magnitude) == (1.5, 30)
    assert parse("rand-mstd100").magnitude_std == 100
    assert parse("rand-mstd101").magnitude_std == math.inf


def test_fill_is_the_mean_color():
    assert randaugment.parse("rand", (0.485, 0.456, 0.406)).fill == (124, 116, 104)
    assert randaugment.parse("rand", (0.0, 1.0, 1.2)).fill == (0, 255, 255)


@pytest.mark.parametrize(
    "config, message",
    [
        ("augmix-m3-w3", "'augmix' is not known: the string must begin with \"rand-\""),
        ("", "'' is not known"),
        ("RAND-m9", "'RAND' is not known"),
        ("rand-mst0.5", "'mst0.5' is not a number after one of m, n, p, mstd, mmax, inc"),
        ("rand-t3a", "'t3a' is not a number after one of"),
        ("rand-m9-", "'' is not a number after"),
        ("rand-9", "'9' is not a number after"),
        ("rand-inc", "'inc' is not a number after"),
        ("rand-mstd0.5x", "'mstd0.5x' is not a number after"),
        ("rand-m9\n", "'m9\\n' is not a number after"),
        ("rand-m9.5", "'m9.5' is out of range: m is a whole number from 0 to inf"),
        ("rand-inc2", "'inc2' is out of range: inc is a whole number from 0 to 1"),
        ("rand-p1.5", "'p1.5' is out of range: p is a number from 0 to 1"),
        ("rand-n0", "'n0' is out of range"),
        ("rand-mmax0", "'mmax0' is out of range"),
        ("rand-m9-inc1-m8", "'m' occurs twice"),
    ],
)
def test_invalid_strings_are_refused_in_one_line(config, message):
    with pytest.raises(InputError) as caught:
        parse(config)
    assert str(caught.value).startswith(f"augment.randaugment={config!r}: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


# ----------------------------------------------------------------------------------------- oracle

CONFIGS = (
    PUBLISHED,
    "rand-m9-mstd0.5",
    "rand-m7-mstd1-inc0",
    "rand-m5-n3-mstd101-p0.9",
    "rand-m17-mmax30-mstd4-inc1-n4-p0.7",
)


@pytest.fixture
def use_generator(monkeypatch):
    """Returns a function that makes timm and torchvision use the random numbers of a generator."""
    auto_augment = pytest.importorskip("timm.data.auto_augment")
    import timm.data.transforms
    import torch
    import torchvision.transforms.transforms

    from tests.goldens.scripts.randaugment import timm_posterize

    for name in ("Posterize", "PosterizeIncreasing"):
        monkeypatch.setitem(auto_augment.NAME_TO_OP, name, timm_posterize)

    def use(numbers):
        python = types.SimpleNamespace(
            random=numbers.random,
            gauss=numbers.normal,
            uniform=numbers.uniform,
            randint=lambda low, high: int(numbers.integers(low, high, endpoint=True)),
            choice=lambda pair: pair[int(numbers.random() < 0.5)],
        )
        choose = lambda ops, n, replace, p: [
            ops[i] for i in numbers.choice(len(ops), n, replace, p)
        ]
        monkeypatch.setattr(auto_augment, "random", python)
        monkeypatch.setattr(timm.data.transforms, "random", python)
        monkeypatch.setattr(auto_augment.np.random, "choice", choose)
        uniform = lambda _: torch.tensor([numbers.random()], dtype=torch.float64)
        monkeypatch.setattr(torchvision.transforms.transforms.torch, "rand", uniform)

    return use


@pytest.mark.oracle
@pytest.mark.parametrize("config", CONFIGS)
def test_randaugment_equals_timm_with_the_same_random_numbers(config, use_generator):
    from timm.data.auto_augment import rand_augment_transform

    reference = rand_augment_transform(config, dict(translate_const=100, img_mean=FILL))
    augment = parse(config)
    changed = 0
    for image in PHOTOGRAPHS.values():
        for seed in range(60):
            use_generator(generator(seed))
            expected = reference(image)
            assert augment(image, generator(seed)) == expected, seed
            changed += expected != image
    assert changed > 100


@pytest.mark.oracle
@pytest.mark.parametrize("photo", ["china", "flower", "portrait", "small", "thin", "grey"])
def test_train_transform_equals_timm_with_the_same_random_numbers(photo, use_generator):
    from timm.data import create_transform

    options = dict(auto_augment=PUBLISHED, interpolation="random", color_jitter=0.4)
    options |= dict(is_training=True, use_prefetcher=True, mean=HALF, std=HALF)
    reference = create_transform(224, **options)
    encoded = all_photos()[photo]
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    options = dict(size=224, flip=0.5, randaugment=parse(PUBLISHED), **CROP)
    ours = functools.partial(train_transform, **options)
    for seed in range(40):
        use_generator(generator(seed))
        expected = np.asarray(reference(image)).transpose(1, 2, 0)
        (sample,) = ours(encoded, [generator(seed)])
        np.testing.assert_array_equal(sample, expected, err_msg=str(seed))
