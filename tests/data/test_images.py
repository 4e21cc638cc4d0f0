# SPDX-License-Identifier: Apache-2.0
"""The image opener: every format of Pillow, and what the policy changes."""

import io
import logging

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.helpers.photos import encoded, jpeg, png
from tnt_flax.core.errors import InputError
from tnt_flax.data import images, transforms
from tnt_flax.data.images import CorruptImageError, Policy, decode
from tnt_flax.data.sources import image_folder
from tnt_flax.training.experiment import Experiment

RED, BLUE = (255, 0, 0), (0, 0, 255)
SMALL = Image.open(io.BytesIO(jpeg("china"))).resize((40, 24))


def exif(orientation):
    tags = Image.Exif()
    tags[images.ORIENTATION] = orientation
    return tags


def values(image, **policy):
    return np.asarray(decode(image, Policy(**policy)))[0, :, 0].tolist()


# --------------------------------------------------------------------------------------- policy


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_exif_turns_images_upright(orientation, format):
    lossless = {"lossless": True} if format == "WEBP" else {}
    file = encoded(SMALL, format, exif=exif(orientation), **lossless)
    turned = decode(file, Policy(exif=True))
    assert turned.size == ((40, 24) if orientation < 5 else (24, 40))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
    np.testing.assert_array_equal(turned, expected)
    np.testing.assert_array_equal(decode(file), SMALL)


@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning")  # ignored by `images`
def test_damaged_exif_is_upright():
    file = encoded(SMALL, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x40\x01\x12\0\x03garbage")
    assert decode(file, Policy(exif=True)).size == (40, 24)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_background_fills_transparency(mode):
    image = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    options = {"transparency": (255, 255, 255)} if mode == "RGB" else {}
    file = encoded(image.convert(mode), **options)
    assert np.asarray(decode(file, Policy(background=RED)))[0].tolist() == [list(RED), [0] * 3]


def test_half_transparent_pixels_blend_with_the_background():
    image = Image.new("RGBA", (1, 1), (*RED, 51))
    assert np.asarray(decode(image, Policy(background=BLUE)))[0, 0].tolist() == [51, 0, 204]


DEEP = np.array([[0, 1000, 2000, 4000]], np.uint16)


@pytest.mark.parametrize(
    "image",
    [
        png(DEEP),
        encoded(Image.fromarray(DEEP), "TIFF"),
        encoded(Image.frombytes("I;16B", (4, 1), DEEP.astype(">u2").tobytes()), "TIFF"),
        encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
        encoded(Image.fromarray(DEEP.astype(np.float32)), "TIFF"),
        encoded(Image.fromarray(DEEP), "PPM"),
        DEEP,
        DEEP.astype(np.float64)[..., None].repeat(3, 2),
    ],
    ids=["png", "tiff", "big endian", "int32", "float32", "pgm", "array", "rgb array"],
)
def test_deep_pixels_are_scaled(image):
    assert values(image, deep_pixels="minmax") == [0, 64, 128, 255]
    assert values(image, deep_pixels=(1000, 2000)) == [0, 0, 255, 255]
    if isinstance(image, bytes):
        assert values(image) == [0, 255, 255, 255]


def test_floats_that_are_nan_or_constant():
    nan = np.array([[np.nan, 0.5, 1.0]], np.float32)
    assert values(nan, deep_pixels=(0, 1)) == [0, 128, 255]
    assert values(np.full((1, 2), 7.0), deep_pixels="minmax") == [0, 0]


@pytest.mark.parametrize("image", [DEEP, np.array([[0, 0.5, 1]], np.float32)])
def test_clipping_warns_once(image, caplog):
    images._warn_once.cache_clear()
    file = encoded(Image.fromarray(image), "TIFF")
    for _ in range(3):
        decode(file)
    (record,) = caplog.records
    assert "clipped to 0..255" in record.message and '"minmax"' in record.message


def test_grey_of_16_bits_with_small_values_does_not_warn(caplog):
    images._warn_once.cache_clear()
    assert values(png(DEEP // 20)) == [0, 50, 100, 200] and not caplog.records


def test_the_size_limit_can_be_raised_and_lifted(monkeypatch):
    bomb = encoded(Image.new("1", (200, 200)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    for policy in (Policy(), Policy(max_pixels=30_000)):
        with pytest.raises(CorruptImageError, match="40,000 pixels .* data.max_pixels, --max-pix"):
            decode(bomb, policy)
    for limit in (40_000, 0):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
        assert decode(bomb, Policy(max_pixels=limit)).size == (200, 200)


def test_pillows_limit_may_be_none(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    transforms.eval_transform(png(np.zeros((9, 9), np.uint8)), size=8, crop_fraction=1.0)
    with pytest.raises(CorruptImageError, match="81 pixels are more"):
        decode(png(np.zeros((9, 9), np.uint8)), Policy(max_pixels=80))


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(background=(0, 0)), "is not a color: give three numbers from 0 to 255"),
        (dict(background=(0, 0, 256)), "is not a color"),
        (dict(deep_pixels="max"), '\'max\' is neither "clip" nor "minmax" nor .low, high.'),
        (dict(deep_pixels=(5, 5)), "is neither"),
        (dict(max_pixels=-2), "max_pixels=-2 is less than -1"),
    ],
)
def test_invalid_policies(values, message, smoke_config):
    with pytest.raises(InputError, match=message):
        Experiment(smoke_config(**{f"data__{key}": value for key, value in values.items()}))


def test_postscript_is_refused_because_it_is_a_program():
    with pytest.raises(CorruptImageError, match="Ghostscript"):
        decode(encoded(Image.new("RGB", (8, 8)), "EPS"))


# ---------------------------------------------------------------------------------------- names


def test_a_folder_takes_what_pillow_decodes_and_names_the_rest(tmp_path, caplog):
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    formats = {"a.jfif": "JPEG", "b.GIF": "GIF", "c.avif": "AVIF", "d.jp2": "JPEG2000"}
    formats |= {"e.jpe": "JPEG", "f.tga": "TGA", "g.Webp": "WEBP", "h.pbm": "PPM"}
    for name, format in formats.items():
        (folder / name).write_bytes(
            encoded(SMALL.convert("1") if name == "h.pbm" else SMALL, format)
        )
    for name in ("1.heic", "2.heic", "notes.txt", "paper.eps", "features.h5", ".hidden", "README"):
        (folder / name).write_bytes(b"?")
    with caplog.at_level(logging.WARNING, "tnt_flax"):
        source = image_folder(str(tmp_path), "train")
    assert [source.name_of(i).rpartition("/")[2] for i in range(len(source))] == sorted(formats)
    for encoded_image, _ in (source[i] for i in range(len(source))):
        assert decode(encoded_image).size == (40, 24)
    (record,) = caplog.records
    assert (
        f"left out of {tmp_path}/train, not images that Pillow decodes: 2 .heic" in record.message
    )
    assert "pip install pillow-heif" in record.message
    for kind in ("1 .txt", "1 .eps", "1 .h5", "1 without suffix"):
        assert kind in record.message


# ----------------------------------------------------------------------------------- rectangles


@pytest.mark.parametrize("resampling", ["pillow", "opencv"])
def test_rectangles_in_training_and_evaluation(smoke_config, resampling):
    size = (32, 64)
    options = dict(data__image_size=size, augment__resampling=resampling, model__drop_path=0.0)
    experiment = Experiment(smoke_config(**options))
    (batch,) = experiment.data.train_batches(0, 1)
    assert batch["image"].shape == experiment.step_shapes[1]["image"].shape
    assert batch["image"].shape[1:] == next(experiment.data.eval_batches())["image"].shape[1:]
    assert batch["image"].shape[1:] == (*size, 3)
    assert experiment.state_shapes.params["sentence_pos"].shape[1] == 1 + 2 * 4


@pytest.mark.parametrize("size", [(64,), "64", (64, 64, 3), 64.0])
def test_invalid_image_sizes(smoke_config, size):
    with pytest.raises(InputError, match="is neither a number of pixels nor .height, width."):
        Experiment(smoke_config(data__image_size=size))


@pytest.mark.oracle
@pytest.mark.parametrize("size", [(96, 160), (160, 96), (224, 288)])
@pytest.mark.parametrize("photo", ["china", "flower"])
def test_rectangles_are_evaluated_as_in_timm(photo, size):
    from timm.data import create_transform

    options = dict(interpolation="bicubic", crop_pct=0.9, use_prefetcher=True)
    reference = create_transform((3, *size), **options)
    image = Image.open(io.BytesIO(jpeg(photo)))
    ours = transforms.eval_transform(image, size=size, crop_fraction=0.9)
    difference = np.abs(ours.astype(int) - np.asarray(reference(image)).transpose(1, 2, 0))
    assert difference.max() <= 2 and (difference > 0).mean() < 0.005
