# SPDX-License-Identifier: Apache-2.0
"""Configs: all files build, all keys are read, bad values are errors of one line."""

import dataclasses
import importlib
import math
import pathlib

import jax
import pytest
from ml_collections import ConfigDict

from configs import default, digits, ptnt, tnt, tnt_s_deit3, transfer
from tnt_flax import TNT, PyramidTNT
from tnt_flax.core.errors import InputError
from tnt_flax.data import randaugment
from tnt_flax.data.plan import TrainPlan
from tnt_flax.tools.command_line import read_config
from tnt_flax.training import experiment, mixup
from tnt_flax.training.config import check_config, steps_of
from tnt_flax.training.evaluate import evaluate_checkpoint
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.train import train_and_evaluate

PUBLISHED = "rand-m9-mstd0.5-inc1"
NAMES = sorted(path.stem for path in pathlib.Path(__file__).parents[1].glob("configs/*.py"))
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


@pytest.mark.parametrize("name", NAMES)
def test_config_builds_its_network(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert set(flat(config)) == set(flat(default.get_config()))
    if not config.model.name:  # the network of the weights
        with pytest.raises(InputError, match="model.name is empty.*: set init_from=FILE"):
            Experiment(config).make_model(10)
        config.model.name = "tnt_s_patch16_224"
    classes = 10 if name == "digits" else 1000
    experiment = Experiment(config, num_classes=classes, steps_per_epoch=10)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(experiment.state_shapes.params))
    assert count == PARAMETERS.get(name, count)
    for group in ("eval", "checkpoint", "log"):
        assert experiment.interval(group) >= 1


def test_transfer_configs_of_all_data_sets():
    for name in transfer.DATA:
        config = transfer.get_config(name)
        check_config(config)
        assert config.data.image_size == 384 and config.batch_size % config.augment.mix_groups == 0
        assert (config.data.source == "tfds") == bool(config.data.name)
    with pytest.raises(InputError, match="transfer.py:mnist: the argument after the colon"):
        transfer.get_config("mnist")


@pytest.mark.parametrize("family, sizes", [("tnt", tnt.SIZES), ("ptnt", ptnt.IMAGE_SIZES)])
def test_each_size_has_its_own_file(family, sizes):
    config_of = importlib.import_module(f"configs.{family}").get_config
    for size in sizes:
        thin = importlib.import_module(f"configs.{family}_{size}").get_config()
        assert thin.to_dict() == config_of(size).to_dict()
        assert f"{family}_{size}_patch16_" in thin.model.name
    with pytest.raises(InputError, match=f"{family}.py:xl: the argument after the colon"):
        config_of("xl")


def test_recipes_of_other_papers_have_their_lengths_and_no_warnings():
    assert tnt_s_deit3.get_config().epochs == 800 and tnt_s_deit3.get_config("400").epochs == 400
    with pytest.raises(InputError, match="tnt_s_deit3.py:300: the argument after the colon"):
        tnt_s_deit3.get_config("300")
    steps = {"tnt_s_deit3": 625, "tnt_s_deit3_384": 2502, "tnt_s_a2": 625, "tnt_s_90ep": 1251}
    for name, count in steps.items():
        config = importlib.import_module(f"configs.{name}").get_config()
        experiment = Experiment(config, num_classes=1000, steps_per_epoch=count)
        assert not experiment.training_warnings(), name
        assert 1_281_167 // config.batch_size == count


def test_pyramid_tnt_has_the_published_image_sizes_and_warm_up():
    for name in ("ti", "s", "m", "b"):
        config = importlib.import_module(f"configs.ptnt_{name}").get_config()
        assert config.model.name == f"ptnt_{name}_patch16_{config.data.image_size}"
        schedule = Experiment(config, steps_per_epoch=1).optimizer.schedule
        rates = [float(schedule(epoch)) for epoch in (0, 1, 19, 20)]
        assert rates == pytest.approx([1e-6, 5.095e-5, 9.5005e-4, 9.891831e-4], rel=1e-6)


def test_a_misspelled_key_in_a_config_file_is_an_error():
    with pytest.raises(AttributeError, match='Did you mean "batch_size"'):
        default.get_config().batch_sise = 3


class RecordingConfig:
    """A ConfigDict that adds each key that is read to `reads`, dotted."""

    def __init__(self, config, reads, prefix=""):
        self._config, self._reads, self._prefix = config, reads, prefix

    def __getattr__(self, name):
        value = getattr(self._config, name)
        if name not in self._config:  # a method
            return value
        if isinstance(value, ConfigDict):
            return RecordingConfig(value, self._reads, f"{self._prefix}{name}.")
        self._reads.add(self._prefix + name)
        return value

    def __getitem__(self, name):
        return getattr(self, name)

    def items(self):
        return [(name, self[name]) for name in self._config]


@pytest.mark.slow
def test_every_key_is_read(smoke_config, tmp_path, monkeypatch):
    """A run and an evaluation read every key of the schema; checking a value does not count."""
    monkeypatch.setattr(experiment, "check_config", lambda config: None)
    reads = set()
    config = RecordingConfig(smoke_config(log__every="29 steps"), reads)
    train_and_evaluate(config, tmp_path)
    evaluate_checkpoint(config, tmp_path, "last")
    student = smoke_config(distill__teacher=str(tmp_path))
    assert Experiment(RecordingConfig(student, reads)).train_step  # not compiled
    assert set(flat(default.get_config())) - reads == set()


def test_every_model_key_is_a_field_of_a_network():
    fields = {field.name for network in (TNT, PyramidTNT) for field in dataclasses.fields(network)}
    assert set(default.get_config().model) <= fields


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
def test_durations_in_epochs_or_steps(duration, steps):
    assert steps_of("eval.every", duration, 7) == steps


@pytest.mark.parametrize("duration", ["", "5", "0 steps", "-1 epochs", "two epochs", "1 hours"])
def test_bad_durations_are_errors(duration):
    with pytest.raises(ValueError, match=r'eval\.every=.*is not a valid duration: use "N epochs"'):
        steps_of("eval.every", duration, 7)


def test_the_config_selects_randaugment(smoke_config):
    config = default.get_config()
    assert Experiment(config).data.randaugment == randaugment.parse(PUBLISHED, (0.5, 0.5, 0.5))
    config.data.mean = (0.0, 0.5, 1.0)
    assert Experiment(config).data.randaugment.fill == (0, 128, 255)
    config.augment.randaugment = "rand-q3"
    with pytest.raises(InputError, match="'q3' is not a number after one of"):
        check_config(config)

    first = {}
    for spelled in ("", PUBLISHED):
        config = smoke_config(augment__randaugment=spelled)
        assert (Experiment(config).data.randaugment is None) == (spelled == "")
        (batch,) = Experiment(config).data.train_batches(start_step=2, num_steps=1)
        first[spelled] = batch["image"]
    changed = (first[""] != first[PUBLISHED]).any(axis=(1, 2, 3)).mean()
    assert 0.5 < changed < 0.95  # no operation for a quarter of the images


def test_the_plan_is_the_published_one(smoke_config):
    def make_plan(config, num_records):
        experiment = Experiment(config)
        experiment.data.train_source = range(num_records)
        return experiment.data.plan

    plan = make_plan(default.get_config(), 1_281_167)
    assert plan == TrainPlan(1_281_167, 1024, seed=42, repeats=3, groups=8)
    assert plan.steps_per_epoch == 1251
    config = smoke_config(seed=7, augment__repeats=2, augment__mix_groups=6)
    assert make_plan(config, 100) == TrainPlan(100, 48, seed=7, repeats=2, groups=6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 40}, "batch_size=40 does not split into augment.mix_groups=8 groups of pa"),
        ({"batch_size": 8}, "use a multiple of 16"),  # groups of one image
        ({"augment.mix_groups": 0}, "augment.mix_groups=0 groups"),
        ({"accumulate": 3}, "accumulate=3 does not divide batch_size=1024"),
        ({"accumulate": 0}, "accumulate=0 is less than 1"),
        ({"augment.three_augment": True}, 'three_augment is not .* set augment.randaugment=""'),
        ({"augment.mix_prob": 1.5}, r"augment.mix_prob=1.5 is outside \[0, 1\]"),
        ({"augment.erase_prob": -0.1}, r"augment.erase_prob=-0.1 is outside \[0, 1\]"),
        ({"augment.cutmix_alpha": -1.0}, "augment.cutmix_alpha=-1.0 is less than 0"),
        ({"augment.erase_area": (0.4, 0.2)}, "augment.erase_area=.* is not a valid range"),
        ({"augment.erase_ratio": (0.0, 2.0)}, "augment.erase_ratio=.* is not a valid range"),
        (
            {"mesh.gradient_dtype": "bfloat16", "model.dtype": "float32"},
            "mesh.gradient_dtype='bfloat16' needs model.dtype='bfloat16', not 'float32'",
        ),
    ],
)
def test_values_that_do_not_fit_together_or_are_out_of_range_are_errors(changes, message):
    config = default.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        check_config(config)


def test_any_batch_size_is_valid_without_mixing():
    config = default.get_config()
    config.update_from_flattened_dict(
        {"batch_size": 7, "augment.mixup_alpha": 0.0, "augment.cutmix_alpha": 0.0}
    )
    check_config(config)


def test_a_step_mixes_and_erases_as_configured(monkeypatch):
    monkeypatch.setattr(experiment.step, "make_augment", lambda num_classes, **options: options)
    monkeypatch.setattr(
        experiment.step, "make_train_step", lambda *args, **options: args[-1] | options
    )
    sizes = dict(num_classes=1000, steps_per_epoch=10)
    options = Experiment(default.get_config(), **sizes).make_train_step()
    assert options["mix"].func is mixup.mix
    assert options["mix"].keywords == dict(
        groups=8, mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5
    )
    assert options["erase"].func is mixup.erase
    assert options["erase"].keywords == dict(prob=0.25, area=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))
    assert options["label_smoothing"] == 0.1 and options["ema_decay"] == 0.99996
    assert options["gradient_dtype"] == "float32"
    assert options["mix_steps"] is None and not options["ema_warmup"]
    assert options["accumulate"] == 1
    options = Experiment(digits.get_config(), **sizes).make_train_step()
    assert options["mix"] is None and options["erase"] is None
    config = default.get_config()
    config.accumulate, config.ema.warmup, config.augment.mix_off_epochs = 4, True, 20
    options = Experiment(config, **sizes).make_train_step()
    assert options["mix_steps"] == 2900 and options["ema_warmup"] and options["accumulate"] == 4


@pytest.mark.parametrize("argument", ["", ":b"])
def test_configs_by_name_and_by_path_are_the_same(argument, root, tmp_path, monkeypatch):
    by_path = read_config(f"{root}/configs/tnt.py{argument}")
    monkeypatch.chdir(tmp_path)  # a name does not depend on the working directory
    assert read_config(f"tnt{argument}", ["--config.seed=7"]).seed == 7
    assert read_config(f"tnt{argument}").to_dict() == by_path.to_dict()


def test_own_config_files_may_import_ours(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from tnt_flax.configs import digits\n"
        "def get_config():\n"
        "    config = digits.get_config()\n"
        "    config.epochs = 3\n"
        "    return config\n"
    )
    assert read_config(str(tmp_path / "mine.py")).epochs == 3
