# SPDX-License-Identifier: Apache-2.0
"""RandAugment on the device: Pillow's pixels within bounds, the distribution of the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import default
from tests.helpers.randaugment_cases import FILL, NAMES, cases, photographs
from tnt_flax.data import randaugment
from tnt_flax.data.randaugment import GEOMETRIC, PLAIN, RESAMPLE
from tnt_flax.runtime.sharding import make_mesh
from tnt_flax.training import device_randaugment, experiment
from tnt_flax.training.device_randaugment import Calls
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.step import make_augment

PUBLISHED = randaugment.parse("rand-m9-mstd0.5-inc1", mean=(0.5, 0.5, 0.5))
EVERY_OP = randaugment.RandAugment(NAMES, 1, 1.0, 9, 0.5, 10, FILL)
BLENDS = ("Color", "Contrast", "Brightness", "Sharpness")


@pytest.fixture(scope="module")
def differences():
    """Function from (operation, filter) to differences from Pillow at all levels, [N, H, W, 3]."""
    photo = np.asarray(photographs()["small"].crop((0, 0, 48, 40)))
    images = photo, np.broadcast_to(np.uint8([9, 200, 90]), photo.shape)
    tested = [(image, name, *case) for image in (0, 1) for name in NAMES for case in cases(name)]
    calls = Calls(
        jnp.array([NAMES.index(name) for _, name, _, _ in tested]),
        jnp.array([level for _, _, level, _ in tested]),
        jnp.array([resample == RESAMPLE[1] for *_, resample in tested]),
    )
    apply = jax.jit(device_randaugment.apply_ops, static_argnums=2)
    ours = apply(np.stack([images[i] for i, *_ in tested]), calls, EVERY_OP)
    theirs = [np.asarray(randaugment.apply_op(images[i], *call, FILL)) for i, *call in tested]
    difference = np.abs(np.asarray(ours, int) - np.stack(theirs))
    return lambda *call: difference[[i for i, (_, *c) in enumerate(tested) if c[::2] == [*call]]]


@pytest.mark.parametrize("name", NAMES)
def test_operations_are_those_of_pillow(name, differences):
    if name in GEOMETRIC:
        for resample in RESAMPLE:
            difference = differences(name, resample)
            # Float32 positions move a few pixels of the outline out of or into the image, or a
            # whole row or column if a translation ends exactly at the center of a pixel.
            outlines = (difference > 1).any(-1).sum((1, 2))
            assert outlines.max() <= (48 if name.startswith("Translate") else 4)
            assert np.median((difference > 0).mean((1, 2, 3))) < 0.01
    else:
        difference = differences(name, RESAMPLE[0])
        blends = name.removesuffix("Increasing") in BLENDS
        assert difference.max() <= blends and (difference > 0).mean() < 0.03


@pytest.mark.parametrize(
    "config",
    [
        "rand-m9-mstd0.5-inc1",
        pytest.param("rand-m8-mstd101-n3-p0.3", marks=pytest.mark.slow),
        pytest.param("rand-m20-mmax12-mstd9-n1", marks=pytest.mark.slow),
    ],
)
def test_distribution_is_that_of_the_host(config):
    augment, count = randaugment.parse(config, (0.5, 0.5, 0.5)), 3000
    sample = jax.jit(device_randaugment.sample, static_argnums=(1, 2))
    op, level, bicubic = map(np.asarray, sample(jax.random.key(0), count, augment))
    assert op.shape == (augment.num_ops, count)
    generator = np.random.default_rng(0)
    host = [call for _ in range(count) for call in augment.sample(generator)]
    for i, name in enumerate(augment.ops):
        theirs = np.sort([call.level for call in host if call.name == name])
        here = op == i
        assert here.sum() == pytest.approx(len(theirs), abs=6 * np.sqrt(len(theirs)))
        ours = np.sort(level[here])
        places = np.linspace(-10.01, 10.01, 201)
        shares = [np.searchsorted(x, places) / len(x) for x in (ours, theirs)]
        assert np.abs(shares[0] - shares[1]).max() < 2.2 * np.sqrt(2 / len(theirs))
        assert (ours.min() < 0) == (name not in PLAIN)
        assert bicubic[here].mean() == pytest.approx(0.5, abs=0.2)
    assert (op == len(augment.ops)).mean() == pytest.approx(1 - augment.probability, abs=0.03)


@pytest.mark.slow
def test_images_do_not_depend_on_the_devices_or_on_other_images():
    images = np.random.default_rng(0).integers(0, 256, (16, 12, 10, 3), np.uint8)
    apply = functools.partial(device_randaugment.randaugment, policy=PUBLISHED)
    expected = jax.jit(apply)(jax.random.key(3), images)
    assert ((expected != images).any((1, 2, 3)).mean()) > 0.5
    np.testing.assert_array_equal(jax.jit(apply)(jax.random.key(3), images[:5]), expected[:5])
    sharding = NamedSharding(make_mesh(), PartitionSpec(("data", "fsdp")))
    compiled = jax.jit(apply).lower(jax.random.key(3), jax.device_put(images, sharding)).compile()
    sharded = compiled(jax.random.key(3), jax.device_put(images, sharding))
    np.testing.assert_array_equal(sharded, expected)
    assert "all-" not in compiled.as_text()  # no communication


def test_the_config_moves_randaugment_to_the_device(smoke_config, monkeypatch):
    assert default.get_config().augment.randaugment_on == "host"
    monkeypatch.setattr(experiment.step, "make_augment", lambda _, **options: options)
    batches, on_device = [], []
    for text, where in (("rand", "host"), ("rand", "device"), ("", "device"), ("", "host")):
        options = dict(augment__randaugment=text, augment__randaugment_on=where)
        run = Experiment(smoke_config(**options, augment__color_jitter=0.4 * (text == "rand")))
        batches.append(next(run.data.train_batches(0, 1))["image"])
        on_device.append(run.make_augment(10)["randaugment"])
    assert on_device[1].keywords == {"policy": randaugment.parse("rand", (0.5, 0.5, 0.5))}
    assert on_device[0] is on_device[2] is on_device[3] is None
    assert (batches[0] != batches[3]).any()
    np.testing.assert_array_equal(batches[1], batches[3])  # no color jitter either
    np.testing.assert_array_equal(batches[2], batches[3])


def test_images_are_augmented_before_mixing_with_a_key_of_their_own():
    keys = []
    see = lambda key: keys.append(jax.random.key_data(key).tobytes())
    augment = make_augment(
        7,
        label_smoothing=0.0,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        randaugment=lambda key, images: see(key) or images + jnp.uint8(1),
        mix=lambda key, images, targets: see(key) or (images * jnp.uint8(2), targets),
    )
    batch = {"image": jnp.full((2, 2, 2, 3), 40, jnp.uint8), "label": jnp.zeros(2, jnp.int32)}
    mix_key = jax.random.key(5)
    images, _ = augment(batch, mix_key, None, 0)
    np.testing.assert_allclose(images, 82 / 127.5 - 1, rtol=1e-6)
    assert keys[1] == jax.random.key_data(mix_key).tobytes() != keys[0]
    used_by_mix = jax.random.key_data(jax.random.split(mix_key, 5))
    assert keys[0] not in [key.tobytes() for key in used_by_mix]
