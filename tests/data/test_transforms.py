# SPDX-License-Identifier: Apache-2.0
"""Pixels of training and evaluation: reproducible, and equal to timm's.

The hashes in goldens/data/eval_pixels.json are from timm 1.0.31, torchvision 0.29.1 and Pillow 13.0
(tests/goldens/scripts/transforms.py). Tests marked `oracle` compare with timm itself.
"""

import collections
import hashlib
import io
import json
import math
import pathlib

import numpy as np
import pytest
from PIL import Image

from tests.helpers.photos import all_photos, encoded, jpeg, png
from tnt_flax.data import randaugment, transforms
from tnt_flax.data.images import CorruptImageError, decode
from tnt_flax.data.randaugment import RESAMPLE
from tnt_flax.data.transforms import eval_transform

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens/data"
GOLDEN = json.loads((GOLDENS / "eval_pixels.json").read_text())
GOLDEN_TRAIN = {  # SHA-256 of training pixels with each RandAugment
    "": "e0d03d4282e2c5f18de7935884f3d66ef4307533b43e50e134b292240d1edcdd",
    "rand-m9-mstd0.5-inc1": "830427472f76f3300b034145db8c1a3b2cc2c260247b13a794e2408d9d643958",
}
PHOTOS = all_photos()
SCALE, RATIO, HALF = (0.08, 1.0), (3 / 4, 4 / 3), (0.5, 0.5, 0.5)


def train_transform(image, generator, **options):
    """Returns one sample."""
    defaults = dict(size=64, scale=SCALE, ratio=RATIO, flip=0.5)
    (sample,) = transforms.train_transform(image, [generator], **defaults | options)
    return sample


def generator(seed):
    return np.random.Generator(np.random.Philox(seed))


# ------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_decode_repeats_grey_and_drops_alpha(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = pixels.reshape(5, 7, -1)[..., :3] * np.ones(3, np.uint8)
    for image in (decode(pixels), decode(png(pixels.squeeze()))):
        assert (image.mode, image.size) == ("RGB", (7, 5))
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_decoded_images_are_returned_unchanged():
    image = decode(PHOTOS["china"])
    assert image.mode == "RGB" and decode(image) is image


def test_decode_converts_cmyk():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    red = np.asarray(decode(encoded(image, "JPEG", quality=100)))[8, 8].astype(int)
    assert red[0] > 240 and red[1:].max() < 15


@pytest.mark.filterwarnings("ignore:Palette images:UserWarning")  # ignored by `transforms`
def test_decode_reads_a_palette_with_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    file = encoded(image, transparency=bytes([0, 128]))
    assert isinstance(Image.open(io.BytesIO(file)).info["transparency"], bytes)
    assert np.asarray(decode(file)).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_decode_clips_16_bits_as_in_timm():
    deep = np.array([[0, 7, 255, 256, 65535]], np.uint16)
    assert np.asarray(decode(png(deep)))[0, :, 0].tolist() == [0, 7, 255, 255, 255]


@pytest.mark.parametrize(
    "image, reason",
    [
        (b"", "the file is empty"),
        (b"<html>404</html>", "not an image format"),
        (jpeg("china")[:20000], "truncated"),
        (jpeg("china")[:100], "Truncated File Read"),
        (PHOTOS["grey"][:5000], "truncated"),
        (PHOTOS["grey"][:100] + bytes(500) + PHOTOS["grey"][600:], "broken data"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4, 4, 4), np.uint8), "Cannot handle"),
        (np.zeros((4, 4, 5), np.uint8), "Cannot handle"),
        (encoded(Image.new("1", (10000, 10000))), "100,000,000 pixels are more than the limit"),
        (encoded(Image.new("1", (14000, 14000))), "196,000,000 pixels are more .*data.max_pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_corrupt_images_raise_one_line(image, reason):
    with pytest.raises(CorruptImageError, match=reason) as caught:
        decode(image)
    assert str(caught.value) and "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)  # no memory address: messages are reproducible


def test_damaged_files_raise_no_other_error():
    rng = np.random.default_rng(0)
    small = Image.open(io.BytesIO(PHOTOS["small"]))
    for format in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM"):
        file = np.frombuffer(encoded(small, format), np.uint8)
        for _ in range(40):
            damaged = file.copy()
            at = rng.integers(0, min(len(file), 400), 8)
            damaged[at] = rng.integers(0, 256, 8)
            try:
                assert decode(damaged.tobytes()).mode == "RGB"
            except CorruptImageError as error:
                assert "\n" not in str(error)


# ------------------------------------------------------------------------------------- training


def test_the_seed_decides_the_pixels():
    first = train_transform(PHOTOS["china"], generator(1))
    assert (first.dtype, first.shape) == (np.uint8, (64, 64, 3))
    np.testing.assert_array_equal(first, train_transform(PHOTOS["china"], generator(1)))
    assert (first != train_transform(PHOTOS["china"], generator(2))).any()


@pytest.mark.parametrize("config", GOLDEN_TRAIN)
def test_training_pixels_are_the_golden_ones(config):
    # Literals of our own, because the random numbers are not timm's.
    augment = randaugment.parse(config, HALF) if config else None
    pixels = [
        train_transform(PHOTOS[name], generator(0), randaugment=augment).tobytes()
        for name in ("portrait", "small")
    ]
    assert hashlib.sha256(b"".join(pixels)).hexdigest() == GOLDEN_TRAIN[config]


def crop_boxes(count, width, height, scale):
    """Returns the left, top, right and bottom edges of random boxes."""
    numbers = generator(0)
    boxes = [transforms.random_crop_box(width, height, numbers, scale, RATIO) for _ in range(count)]
    return np.array(boxes).T


def test_crop_boxes_stay_inside_and_within_their_bounds():
    left, top, right, bottom = crop_boxes(4000, 500, 375, SCALE)
    assert (left.min(), top.min(), right.max(), bottom.max()) == (0, 0, 500, 375)
    area = (right - left) * (bottom - top) / (500 * 375)
    ratio = (right - left) / (bottom - top)
    assert area.min() > 0.08 * 0.97 and area.max() <= 1
    assert ratio.min() > 3 / 4 * 0.98 and ratio.max() < 4 / 3 * 1.02


def test_crop_boxes_have_uniform_area_and_position_and_log_uniform_ratio():
    # Up to half the area always fits: no rejections.
    left, top, right, bottom = crop_boxes(4000, 1000, 1000, (0.1, 0.5))
    area = (right - left) * (bottom - top) / 1e6
    log_ratio = np.log((right - left) / (bottom - top))
    x, y = left / (1000 - (right - left)), top / (1000 - (bottom - top))
    limits = ((0.1, 0.5), np.log(RATIO), (0, 1), (0, 1))
    for values, limit in zip((area, log_ratio, x, y), limits, strict=True):
        assert np.histogram(values, 4, limit)[0] == pytest.approx(1000, abs=4 * math.sqrt(750))


@pytest.mark.parametrize(
    "width, height, box",
    [
        (1000, 10, (493, 0, 506, 10)),  # height 10, width round(10 * 4 / 3)
        (10, 1000, (0, 493, 10, 506)),
        (1000, 1, (499, 0, 500, 1)),
        (1, 1, (0, 0, 1, 1)),
    ],
)
def test_a_box_that_never_fits_becomes_the_central_crop(width, height, box):
    assert transforms.random_crop_box(width, height, generator(0), (0.9, 1.0), RATIO) == box


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_tiny_image_never_gives_an_empty_box(size):
    left, top, right, bottom = crop_boxes(200, size, size, SCALE)
    for low, high in ((left, right), (top, bottom)):
        assert (0 <= low).all() and (low < high).all() and (high <= size).all()


def test_both_filters_are_equally_likely():
    image, chosen = decode(PHOTOS["small"]), collections.Counter()
    for seed in range(400):
        crop = image.crop(transforms.random_crop_box(*image.size, generator(seed), SCALE, RATIO))
        ours = Image.fromarray(train_transform(image, generator(seed), size=16, flip=0.0))
        chosen[next(f for f in RESAMPLE if ours == crop.resize((16, 16), f))] += 1
    assert abs(chosen[RESAMPLE[0]] - 200) < 4 * 10  # four standard deviations


def test_flip_mirrors_left_and_right_with_its_probability():
    image, flips = decode(PHOTOS["small"]), 0
    for seed in range(400):
        plain, mirrored, some = (
            train_transform(image, generator(seed), size=16, flip=flip) for flip in (0.0, 1.0, 0.25)
        )
        np.testing.assert_array_equal(mirrored, plain[:, ::-1])
        flips += (some == mirrored).all()
        assert (some == mirrored).all() or (some == plain).all()
    assert abs(flips - 100) < 4 * math.sqrt(75)


# ------------------------------------------------------------------------------------- evaluation


def whole_then_center(image, resized, size):
    """Resizes the whole image before cropping, as timm does."""
    left, top = (round((side - size) / 2) for side in resized)
    whole = image.resize(resized, Image.Resampling.BICUBIC)
    return whole.crop((left, top, left + size, top + size))


def assert_nearly_the_same(ours, reference):
    """Allows one level for few values, and two where a value is clipped between the passes."""
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(reference))
    assert difference.max() <= 2 and np.mean(difference > 0) < 0.005


@pytest.mark.parametrize("name", PHOTOS)
def test_eval_pixels_are_close_to_timms(name):
    golden = GOLDEN["sha256"][name]
    image = decode(PHOTOS[name])
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    assert digest == golden["decoded"], "the decoder differs"
    for size in (192, 224, 256, 384):
        resized = transforms.resized_size(image.size, [math.floor(size / 0.9)] * 2)
        reference = whole_then_center(image, resized, size)
        assert hashlib.sha256(reference.tobytes()).hexdigest() == golden[str(size)], size
        pixels = eval_transform(PHOTOS[name], size=size, crop_fraction=0.9)
        assert_nearly_the_same(pixels, reference)


SHAPES = "500x375 375x500 500x333 640x480 1600x1200 400x300 100x75 31x47 9x300 300x9 248x248 1x1 "
SHAPES += "300x600 300x601 301x600 199x400 600x450 450x600 512x384 1024x768 700x300"


@pytest.mark.parametrize("shape", SHAPES.split())
@pytest.mark.parametrize("size, short", [(224, 248), (224, 224), (32, 36), (97, 211)])
def test_resized_center_is_close_to_the_center_of_the_resized_image(shape, size, short):
    width, height = map(int, shape.split("x"))
    china = Image.open(io.BytesIO(jpeg("china")))
    image = china.resize((width, height), box=(100, 50, 500, 350))
    resized = transforms.resized_size(image.size, (short, short))
    center = transforms.resized_center(image, resized, (size, size))
    assert center.size == (size, size)
    assert_nearly_the_same(center, whole_then_center(image, resized, size))


def test_long_thin_images_are_refused():
    with pytest.raises(CorruptImageError, match="20000 x 1 pixels"):
        eval_transform(np.zeros((1, 20000, 3), np.uint8), size=224, crop_fraction=0.9)


# ------------------------------------------------------------------------------------ color jitter


def test_color_jitter_is_off_with_randaugment():
    run = lambda **more: train_transform(PHOTOS["china"], generator(3), **more)
    plain, jittered = run(), run(jitter=0.4)
    assert (plain != jittered).mean() > 0.5
    np.testing.assert_array_equal(run(jitter=0.4, randaugment=lambda image, *_: image), plain)


def test_three_augment_applies_each_operation_equally_often():
    """By NumPy: grey is repeated, solarization inverts from 128 on, and blurring keeps the mean."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    grey = np.array(Image.fromarray(image).convert("L"))[..., None].repeat(3, axis=2)
    solarized = np.where(image < 128, image, 255 - image)
    counts = np.zeros(3, int)
    for seed in range(300):
        found = np.array(transforms.three_augment(image, generator(seed)))
        known = [np.array_equal(found, x) for x in (grey, solarized)]
        counts[known.index(True) if any(known) else 2] += 1
        if not any(known):
            assert abs(found.mean() - image.mean()) < 2 and found.std() < image.std()
    assert (counts > 70).all()


def test_three_augment_comes_before_the_color_jitter():
    def augment(image, generator, warp):
        return transforms.color_jitter(transforms.three_augment(image, generator), generator, 0.3)

    run = lambda **options: train_transform(PHOTOS["china"], generator(3), **options)
    np.testing.assert_array_equal(run(three_augments=True, jitter=0.3), run(randaugment=augment))


def test_interpolation_is_random_or_fixed():
    def filters(interpolation):
        crop = lambda image, box, size, resample: used.append(resample) or np.zeros(3, np.uint8)
        used, resampler = [], transforms.PILLOW._replace(crop=crop)
        for seed in range(20):
            options = dict(interpolation=interpolation, resampler=resampler, flip=0.0)
            train_transform(PHOTOS["china"], generator(seed), **options)
        return set(used)

    both = set(RESAMPLE)
    assert filters("random") == both
    assert filters("bicubic") | filters("bilinear") == both
    assert filters("bicubic") == {Image.Resampling.BICUBIC}


@pytest.mark.oracle
def test_three_augment_equals_torchvision():
    """Grey and solarization as in DeiT; the blur is Pillow's own."""
    from torchvision.transforms import Grayscale, RandomSolarize

    image, found = Image.open(io.BytesIO(PHOTOS["china"])), {}
    for seed in range(20):
        kind = int(generator(seed).integers(3))
        found[kind] = np.array(transforms.three_augment(image, generator(seed)))
    np.testing.assert_array_equal(found[0], np.array(Grayscale(3)(image)))
    np.testing.assert_array_equal(found[1], np.array(RandomSolarize(128, p=1.0)(image)))


@pytest.mark.oracle
def test_color_jitter_equals_torchvision():
    """With the same order and factors."""
    import torch
    from torchvision.transforms import ColorJitter

    image = Image.open(io.BytesIO(PHOTOS["china"]))
    for seed in range(20):
        ours = transforms.color_jitter(image, generator(seed), 0.4)
        again = generator(seed)
        permutation = again.permutation(3)
        factors = {i: again.uniform(0.6, 1.4) for i in permutation}
        sampled = (torch.tensor([*permutation, 3]), *(factors[i] for i in range(3)), None)
        jitter = ColorJitter(0.4, 0.4, 0.4)
        jitter.get_params = lambda *_, sampled=sampled: sampled
        np.testing.assert_array_equal(np.array(ours), np.array(jitter(image)))
