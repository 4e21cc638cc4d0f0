# SPDX-License-Identifier: Apache-2.0
"""Every key is known, every key is read, every config builds."""

import ast
import dataclasses
import importlib
import math
import types

import jax
import pytest

from configs import default, digits, transfer
from tnt_flax import TNT, PyramidTNT
from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import split
from tnt_flax.data import randaugment
from tnt_flax.data.plan import TrainPlan
from tnt_flax.data.sources import Digits
from tnt_flax.training import config_check, experiment, mixup

PUBLISHED = "rand-m9-mstd0.5-inc1"
NAMES = [
    "default",
    "digits",
    "finetune",
    "imagenet_variants",
    "pets_mindspore",
    "ptnt_b",
    "ptnt_m",
    "ptnt_s",
    "ptnt_ti",
    "tnt_b",
    "tnt_s",
    "tnt_ti",
    "transfer",
]
PARAMETERS = {
    "tnt_ti": 6_076_408,
    "tnt_s": 23_768_584,
    "tnt_b": 65_428_680,
    "default": 23_768_584,
    "transfer": 23_914_504,  # more positions, at 384 pixels
    "ptnt_ti": 10_578_529,
    "ptnt_s": 31_953_200,
    "ptnt_m": 84_943_572,
    "ptnt_b": 156_990_072,
}


def flat(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_file_is_tested(root):
    assert sorted(p.stem for p in (root / "configs").glob("*.py")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_config_builds(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert set(flat(config)) == set(flat(default.get_config()))
    if not config.model.name:  # that of the weights
        with pytest.raises(InputError, match="model.name is empty.*: set init_from=FILE"):
            experiment.build_model(config, 10)
        config.model.name = "tnt_s_patch16_224"
    config_check.check(config)
    classes = 10 if name == "digits" else 1000
    model = experiment.build_model(config, classes)
    shapes = jax.eval_shape(experiment.init_params(model, config), jax.random.key(0))
    shapes = split(shapes)["params"]
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert count == PARAMETERS.get(name, count)
    tx, schedule = experiment.build_optimizer(config, steps_per_epoch=10)
    jax.eval_shape(tx.init, shapes)
    for group in ("eval", "checkpoint", "log"):
        assert experiment.in_steps(group, config[group].every, 10) >= 1


def test_transfer_to_every_data_set():
    for name in transfer.DATA:
        config = transfer.get_config(name)
        config_check.check(config)
        assert config.data.image_size == 384 and config.batch_size % config.augment.mix_groups == 0
        assert (config.data.source == "tfds") == bool(config.data.name)
    with pytest.raises(InputError, match="transfer.py:mnist: after the colon comes one of"):
        transfer.get_config("mnist")


def test_the_published_recipe_of_pyramids():
    for name in ("ti", "s", "m", "b"):
        config = importlib.import_module(f"configs.ptnt_{name}").get_config()
        assert config.model.name == f"ptnt_{name}_patch16_{config.data.image_size}"
        _, schedule = experiment.build_optimizer(config, steps_per_epoch=1)
        rates = [float(schedule(epoch)) for epoch in (0, 1, 19, 20)]
        assert rates == pytest.approx([1e-6, 5.095e-5, 9.5005e-4, 9.891831e-4], rel=1e-6)


def test_a_misspelt_key_in_a_config_file_is_refused():
    with pytest.raises(AttributeError, match='Did you mean "batch_size"'):
        default.get_config().batch_sise = 3


def test_every_key_is_read(root):
    """Each key of the schema appears as an attribute in the files that read configs."""
    attributes = set()
    for path in [*(root / "tnt_flax").glob("*.py"), root / "main.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                attributes.add(node.attr)
    fields = {field.name for network in (TNT, PyramidTNT) for field in dataclasses.fields(network)}
    for key in flat(default.get_config()):
        group, _, name = key.rpartition(".")
        if group == "model":  # handed over as a whole, and refused there if unknown
            assert name == "name" or name in fields, key
        else:
            assert name in attributes, f"nobody reads {key}"


@pytest.mark.parametrize(
    "duration, steps",
    [
        ("1 epochs", 7),
        ("1 epoch", 7),
        ("3 steps", 3),
        ("1 step", 1),
        ("0.5 epochs", 4),
        ("2epochs", 14),
    ],
)
def test_durations(duration, steps):
    assert experiment.in_steps("eval.every", duration, 7) == steps


@pytest.mark.parametrize("duration", ["", "5", "0 steps", "-1 epochs", "two epochs", "1 hours"])
def test_bad_durations(duration):
    with pytest.raises(ValueError, match=r'eval\.every=.*is no duration: use "N epochs"'):
        experiment.in_steps("eval.every", duration, 7)


def test_randaugment_is_spelled_in_the_config(smoke_config):
    config = default.get_config()
    assert experiment.build_randaugment(config) == randaugment.parse(PUBLISHED, (0.5, 0.5, 0.5))
    config.data.mean = (0.0, 0.5, 1.0)
    assert experiment.build_randaugment(config).fill == (0, 128, 255)
    config.augment.randaugment = "rand-q3"
    with pytest.raises(InputError, match="no section 'q3'"):
        config_check.check(config)

    source, plan = Digits("train"), TrainPlan(1437, 48, seed=0)
    first = {}
    for spelled in ("", PUBLISHED):
        config = smoke_config(augment__randaugment=spelled)
        assert (experiment.build_randaugment(config) is None) == (spelled == "")
        (batch,) = experiment.train_batches(config, source, plan, start_step=2, num_steps=1)
        first[spelled] = batch["image"]
    changed = (first[""] != first[PUBLISHED]).any(axis=(1, 2, 3)).mean()
    assert 0.5 < changed < 0.95  # a quarter of the images draws no operation


def test_the_plan_is_the_published_one(smoke_config):
    plan = experiment.build_plan(default.get_config(), 1_281_167)
    assert plan == TrainPlan(1_281_167, 1024, seed=42, repeats=3, groups=8)
    assert plan.steps_per_epoch == 1251
    config = smoke_config(seed=7, augment__repeats=2, augment__mix_groups=6)
    assert experiment.build_plan(config, 100) == TrainPlan(100, 48, seed=7, repeats=2, groups=6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 40}, "batch_size=40 does not split into augment.mix_groups=8 groups of pa"),
        ({"batch_size": 8}, "use a multiple of 16"),  # groups of one image
        ({"augment.mix_groups": 0}, "augment.mix_groups=0 groups"),
        ({"augment.mix_prob": 1.5}, r"augment.mix_prob=1.5 is outside \[0, 1\]"),
        ({"augment.erase_prob": -0.1}, r"augment.erase_prob=-0.1 is outside \[0, 1\]"),
        ({"augment.cutmix_alpha": -1.0}, "augment.cutmix_alpha=-1.0 is less than 0"),
        ({"augment.erase_area": (0.4, 0.2)}, "augment.erase_area=.* is no range"),
        ({"augment.erase_ratio": (0.0, 2.0)}, "augment.erase_ratio=.* is no range"),
    ],
)
def test_bad_mixing_and_erasing(changes, message):
    config = default.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        config_check.check(config)


def test_without_mixing_any_batch_size_does():
    config = default.get_config()
    config.update_from_flattened_dict(
        {"batch_size": 7, "augment.mixup_alpha": 0.0, "augment.cutmix_alpha": 0.0}
    )
    config_check.check(config)


def test_a_step_mixes_and_erases_as_configured(monkeypatch):
    monkeypatch.setattr(experiment.steps, "make_prepare", lambda num_classes, **options: options)
    monkeypatch.setattr(
        experiment.steps, "make_train_step", lambda *args, **options: args[-1] | options
    )
    model = types.SimpleNamespace(num_classes=1000)
    options = experiment.build_train_step(default.get_config(), model, None, None)
    assert options["mix"].func is mixup.mix
    assert options["mix"].keywords == dict(
        groups=8, mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5
    )
    assert options["erase"].func is mixup.erase
    assert options["erase"].keywords == dict(prob=0.25, area=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))
    assert options["label_smoothing"] == 0.1 and options["ema_decay"] == 0.99996
    assert options["gradient_dtype"] == "float32"
    options = experiment.build_train_step(digits.get_config(), model, None, None)
    assert options["mix"] is None and options["erase"] is None
