# SPDX-License-Identifier: Apache-2.0
"""What the README prints, works: its Python runs, its commands parse, its tables are true."""

import importlib
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import pytest

import main
import tnt_flax
from tnt_flax.tools import predict
from tnt_flax.tools.convert import make_parser
from tnt_flax.weights import names as mapping
from tnt_flax.weights.formats import torch

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
CONVERSIONS = re.findall(r"^python -m tnt_flax.tools.convert (.*)$", README, re.MULTILINE)
PREDICTIONS = re.findall(r"^.*python -m tnt_flax.tools.predict (.*)$", README, re.MULTILINE)
PARSED = re.findall(
    r"^python -m (tnt_flax\.tools\.(?:visualize|report|export|check_data|preview)) (.*)$",
    README,
    re.MULTILINE,
)
COMMANDS = re.findall(r"^(?:\.venv/bin/)?python (main\.py .*)$", README, re.MULTILINE)


@pytest.mark.slow
def test_the_python_runs_and_gives_the_shapes_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tnt_flax.create_model("tnt_s_patch16_224", depth=1)  # as good as twelve blocks here
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    torch.write(tmp_path / "tnt_s_81.5.pth.tar", dict(mapping.export("huawei", params)))
    blocks, said = re.findall(r"```python\n(.*?)```", README, re.DOTALL), 0
    names = {"shaped": shaped}
    for code in blocks:
        lines = [line for line in code.splitlines() if line and not line.startswith("import ")]
        assert len(lines) <= 12, code
        # Every line with a shape behind it is evaluated where it stands.
        shown = re.compile(r"^((?:\w+ = )?(\S.*?))  # \[([\d, ]+)\]$", re.MULTILINE)
        said += len(shown.findall(code))
        exec(shown.sub(r"\1; shaped(\2, [\3])", code), names)
    assert len(blocks) >= 6 and said >= 10


def shaped(value, shape):
    assert list(value.shape) == shape


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, root, monkeypatch):
    monkeypatch.chdir(root)
    args = main.make_parser().parse_args(command.split()[1:])
    assert args.config.batch_size > 0


def test_there_are_commands():
    assert len(COMMANDS) >= 6 and len(CONVERSIONS) >= 5
    assert len(PREDICTIONS) >= 3
    assert {tool.rpartition(".")[2] for tool, _ in PARSED} == {
        "check_data",
        "export",
        "preview",
        "report",
        "visualize",
    }


@pytest.mark.parametrize("tool, options", PARSED)
def test_tools_parse(tool, options, root, monkeypatch):
    monkeypatch.chdir(root)
    importlib.import_module(tool).make_parser().parse_args(options.split())


@pytest.mark.parametrize("command", CONVERSIONS)
def test_conversions_parse(command):
    make_parser().parse_args(command.split())


@pytest.mark.parametrize("command", PREDICTIONS)
def test_predictions_parse(command):
    predict.make_parser().parse_args(shlex.split(command))


def test_make_targets_exist(root):
    targets = set(re.findall(r"^(\w+):", (root / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make (train|test|soak|oracle|eval|docs)\b", README)) <= targets


def test_the_reference_has_every_public_name_and_command(root):
    api, tools = ((root / f"docs/{name}.md").read_text() for name in ("api", "tools"))
    documented = re.findall(r"^::: tnt_flax\.(.+)$", api + tools, re.MULTILINE)
    assert set(tnt_flax.__all__) <= {name.rpartition(".")[2] for name in documented}
    files = (root / "tnt_flax/tools").glob("*.py")
    commands = {f"tools.{file.stem}" for file in files if "__main__" in file.read_text()}
    assert commands - {"tools.benchmark_start"} <= set(documented)  # of which benchmark starts one


def test_the_table_of_models():
    rows = dict(re.findall(r"^\| `(p?tnt_\w+)` \| ([\d,]+) \|", README, re.MULTILINE))
    assert sorted(rows) == tnt_flax.list_models()
    for name, count in rows.items():
        size = int(name[-3:])
        images = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
        shapes = jax.eval_shape(tnt_flax.create_model(name).init, jax.random.key(0), images)
        assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == int(count.replace(",", ""))
