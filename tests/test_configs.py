# SPDX-License-Identifier: Apache-2.0
"""Every key is known, every key is read, every config builds."""

import ast
import dataclasses
import importlib
import math

import jax
import pytest

from configs import default
from tnt_flax import TNT, build

NAMES = ["default", "digits", "tnt_b", "tnt_s", "tnt_ti"]
PARAMETERS = {
    "tnt_ti": 6_076_408,
    "tnt_s": 23_768_584,
    "tnt_b": 65_428_680,
    "default": 23_768_584,
}


def flat(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_file_is_tested(root):
    assert sorted(p.stem for p in (root / "configs").glob("*.py")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_config_builds(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert set(flat(config)) == set(flat(default.get_config()))
    build.check(config)
    classes = 10 if name == "digits" else 1000
    model = build.build_model(config, classes)
    shapes = jax.eval_shape(build.init_params(model, config), jax.random.key(0))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert count == PARAMETERS.get(name, count)
    tx, schedule = build.build_optimizer(config, steps_per_epoch=10)
    jax.eval_shape(tx.init, shapes)
    for group in ("eval", "checkpoint", "log"):
        assert build.in_steps(group, config[group].every, 10) >= 1


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
    fields = {field.name for field in dataclasses.fields(TNT)}
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
    assert build.in_steps("eval.every", duration, 7) == steps


@pytest.mark.parametrize("duration", ["", "5", "0 steps", "-1 epochs", "two epochs", "1 hours"])
def test_bad_durations(duration):
    with pytest.raises(ValueError, match=r'eval\.every=.*is no duration: use "N epochs"'):
        build.in_steps("eval.every", duration, 7)
