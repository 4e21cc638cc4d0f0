# SPDX-License-Identifier: Apache-2.0
"""Resampling by OpenCV: the same random numbers as with Pillow, and pixels within bounds of it.

The bounds, in levels of 255, are a few tenths above the differences of OpenCV 5.0 and Pillow 13.0.
"""

import functools
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers.photos import all_photos, encoded, jpeg
from tests.helpers.randaugment_cases import FILL, cases, photographs
from tnt_flax.core.errors import InputError
from tnt_flax.data import opencv, randaugment, transforms
from tnt_flax.data.images import ORIENTATION, TIMM, CorruptImageError, Policy, decode
from tnt_flax.data.plan import sample_generator
from tnt_flax.data.randaugment import GEOMETRIC, PLAIN, RESAMPLE, SIGNED
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.train import train_and_evaluate

BILINEAR, BICUBIC = RESAMPLE
OPENCV_TRANSFORM = functools.partial(
    transforms.train_transform, resampler=transforms.resampler("opencv")
)
PHOTOS = {name: decode(encoded) for name, encoded in all_photos().items()}
RECIPE = dict(size=224, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5)
PUBLISHED = randaugment.parse("rand-m9-mstd0.5-inc1", mean=(0.5, 0.5, 0.5))


def differences(ours, theirs):
    return np.abs(np.asarray(ours).astype(int) - np.asarray(theirs))


def both(image, key, **options):
    """Returns a sample by OpenCV and by Pillow; both must consume the same random numbers."""
    generators = [sample_generator(key) for _ in range(2)]
    (pixels,) = OPENCV_TRANSFORM(image, generators[:1], **RECIPE, **options)
    (theirs,) = transforms.train_transform(image, generators[1:], **RECIPE, **options)
    assert generators[0].random() == generators[1].random()
    assert (pixels.dtype, pixels.shape) == (np.uint8, (224, 224, 3))
    return pixels, theirs


@pytest.mark.parametrize("resample, mean, inside", [(BILINEAR, 0.9, 1), (BICUBIC, 1.6, 20)])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_are_close_to_pillow(name, resample, mean, inside):
    levels = [level for level, filter in cases(name) if filter == resample and abs(level) <= 10]
    for image in photographs().values():
        for level in levels:
            ours = opencv.apply_op(image, name, level, resample, FILL)
            theirs = randaugment.apply_op(image, name, level, resample, FILL)
            difference = differences(ours, theirs)
            assert difference.mean() < mean
            # Larger differences only at the outline of the moved image.
            outline = 2 * sum(image.size) / (image.width * image.height)
            assert (difference.max(-1) > inside).mean() < outline


@pytest.mark.parametrize("name", [*PLAIN, *SIGNED])
def test_color_operations_are_those_of_pillow(name):
    blends = {"Color": (4, 0.7), "Sharpness": (1, 0.4), "Contrast": (1, 0.01)}
    worst, mean = blends.get(name.removesuffix("Increasing"), (0, 0))
    flat = Image.new("RGB", (16, 16), (9, 200, 90))
    for image in (photographs()["flower"], flat):
        for level, _ in cases(name):
            ours = opencv.apply_op(image, name, level, BILINEAR, FILL)
            difference = differences(ours, randaugment.apply_op(image, name, level, BILINEAR, FILL))
            assert ours.dtype == np.uint8 and difference.max() <= worst
            assert difference.mean() <= mean


@pytest.mark.parametrize("resample", RESAMPLE)
@pytest.mark.parametrize("name", ["TranslateXRel", "TranslateYRel"])
def test_translations_are_those_of_pillow(name, resample):
    """Up to one level, at the edge of the image and for any fraction of a pixel."""
    image = photographs()["flower"].crop((0, 0, 40, 30))
    for level in (-30.0, -9.7, -1.0, -0.02, 0.0, 0.01, 0.3, 5.55, 10.0, 22.0, 23.0):
        ours = opencv.apply_op(image, name, level, resample, (1, 2, 3))
        theirs = randaugment.apply_op(image, name, level, resample, (1, 2, 3))
        assert differences(ours, theirs).max() <= 1, level


# ------------------------------------------------------------------------------------ decoding


def opened(encoded, policy=TIMM):
    return opencv.Opened(encoded, policy)


def large(factor):
    """Returns a JPEG of `factor` times 300 x 200 pixels."""
    return encoded(PHOTOS["china"].resize((300 * factor, 200 * factor)), "JPEG", quality=92)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_large_crops_are_decoded_at_a_fraction_of_their_size(factor, monkeypatch):
    flags, decode_ = [], opencv.cv2.imdecode
    monkeypatch.setattr(
        opencv.cv2, "imdecode", lambda data, flag: flags.append(flag) or decode_(data, flag)
    )
    image = opened(large(factor))
    assert image.size == (300 * factor, 200 * factor)
    box = (factor * 20, factor * 10, factor * 220, factor * 190)
    ours = image.crop(box, (96, 96), BILINEAR)
    theirs = decode(large(factor)).crop(box).resize((96, 96), BILINEAR)
    assert differences(ours, theirs).mean() < 2.6
    assert flags == [opencv.REDUCED[factor]]
    small = image.crop((5, 5, 90, 90), (96, 96), BILINEAR)  # from all pixels
    assert flags == [opencv.REDUCED[factor], opencv.REDUCED[1]]
    np.testing.assert_array_equal(
        small, opened(large(factor)).crop((5, 5, 90, 90), (96, 96), BILINEAR)
    )


def test_all_formats_and_policies_are_decoded_as_by_pillow(monkeypatch):
    whole = lambda image: image.crop((0, 0, *image.size), image.size[::-1], BILINEAR)
    tags = Image.Exif()
    tags[ORIENTATION] = 6
    for kind, mode in (("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA")):
        options = {"exif": tags} if mode == "RGB" else {}
        file = encoded(PHOTOS["small"].convert(mode), kind, **options)
        for policy in (TIMM, Policy(exif=True, background=(1, 2, 3))):
            image, expected = opened(file, policy), decode(file, policy)
            assert image.size == expected.size
            assert differences(whole(image), expected).max() <= 1


@pytest.mark.parametrize("damage", [slice(20000), slice(100), slice(0), slice(-2)])
def test_damaged_jpegs_are_reported_as_by_pillow(damage):
    results = []
    for transform in (OPENCV_TRANSFORM, transforms.train_transform):
        try:
            (sample,) = transform(jpeg("china")[damage], [sample_generator((0, 0, 0))], **RECIPE)
            results.append(sample.shape)
        except CorruptImageError as error:
            results.append(str(error))
    assert results[0] == results[1]


@pytest.mark.parametrize("resample, larger", [(BILINEAR, 0.25), (BICUBIC, 2.6)])
@pytest.mark.parametrize("scale", [0.3, 0.7, 1.0, 1.2, 1.5, 2.0, 2.1, 3.0, 4.5])
@pytest.mark.parametrize("name", ["china", "flower", "portrait"])
def test_resizing_is_close_to_pillow(name, scale, resample, larger):
    """`larger` bounds enlarged images; bilinear differs by rounding only."""
    size = 64
    side = round(scale * size)
    crop = PHOTOS[name].crop((5, 20, 5 + side, 20 + side))
    difference = differences(
        opencv.resize(np.asarray(crop), (size, size), resample), crop.resize((size, size), resample)
    )
    assert difference.mean() < (3.0 if scale > 1 else larger)
    assert difference.max() <= (1 if scale <= 1 and resample == BILINEAR else 40)


def test_each_side_is_smoothed_by_its_own_scale():
    """Stripes one pixel wide become grey if their side shrinks and stay otherwise."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    shrunk = opencv.resize(np.repeat(stripes, 3, 0), (64, 64), BILINEAR)
    np.testing.assert_allclose(shrunk, stripes, atol=1)
    for scale in (2, 3):
        image = np.tile(stripes, (1, scale, 1))
        turned = np.ascontiguousarray(image.swapaxes(0, 1))
        assert differences(opencv.resize(image, (64, 64), BILINEAR)[:, 2:-2], 127).max() < 25
        assert differences(opencv.resize(turned, (64, 64), BILINEAR)[2:-2], 127).max() < 25


@pytest.mark.parametrize("name, mean, worst", [("china", 1.4, 2.4), ("flower", 0.7, 1.2)])
def test_samples_are_close_to_those_of_pillow(name, mean, worst):
    image = PHOTOS[name]
    means = [differences(*both(image, (0, 0, i))).mean() for i in range(40)]
    assert np.mean(means) < mean and max(means) < worst  # crops and flips
    means = [differences(*both(image, (1, 0, i), randaugment=PUBLISHED)).mean() for i in range(60)]
    assert np.mean(means) < 1.2 and np.median(means) < 1.0
    assert differences(*both(image, (2, 0, 0), jitter=0.4)).mean() < worst


@pytest.mark.parametrize("pixels", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_tiny_images(pixels):
    both(Image.new("RGB", pixels, "red"), (3, 0, 0), randaugment=PUBLISHED)


def test_config_selects_the_resampler(smoke_config):
    config = smoke_config()
    (theirs,) = Experiment(config).data.train_batches(start_step=0, num_steps=1)
    config.augment.resampling = "opencv"
    (ours,) = Experiment(config).data.train_batches(start_step=0, num_steps=1)
    assert 0 < differences(ours["image"], theirs["image"]).mean() < 2


def test_a_missing_package_is_reported_before_anything_is_written(
    smoke_config, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.delitem(sys.modules, "tnt_flax.data.opencv")
    monkeypatch.delattr("tnt_flax.data.opencv")
    with pytest.raises(InputError, match=r'pip install "tnt_flax\[opencv\]"$') as caught:
        train_and_evaluate(smoke_config(augment__resampling="opencv"), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="augment.resampling='cv' is none of"):
        train_and_evaluate(smoke_config(augment__resampling="cv"), tmp_path / "run")
