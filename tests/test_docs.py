# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/: the Python runs, commands parse, files and names exist."""

import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import pytest

import main
import tnt_flax
from benchmarks import __main__ as benchmarks
from tnt_flax.__main__ import COMMANDS as COMMAND_TABLE
from tnt_flax.__main__ import load_command
from tnt_flax.weights import names
from tnt_flax.weights.formats import torch

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
EVERYTHING = "\n".join(PAGES.values())
PROGRAMS = ("tnt-flax", "python -m tnt_flax", "python main.py", "python -m benchmarks")
COMMAND = re.compile(rf"^(?:.*\| )?(?:\.venv/bin/)?({'|'.join(PROGRAMS)}) (\S.*)$", re.MULTILINE)
COMMANDS = sorted(set(COMMAND.findall(EVERYTHING.replace("\\\n", " "))))
SHAPE = re.compile(r"^((?:\w+ = )?(\S.*?))  # \[([\d, ]+)\]$", re.MULTILINE)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Changes to a folder with the checkpoint of the examples, reduced to one block."""
    monkeypatch.chdir(tmp_path)
    model = tnt_flax.create_model("tnt_s_patch16_224", depth=1)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    torch.write(tmp_path / "tnt_s_81.5.pth.tar", dict(names.export("huawei", params)))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_python_runs_and_gives_the_shapes_in_its_comments(page, checkpoint):
    def check_shape(value, shape):
        assert list(value.shape) == shape

    variables = {"check_shape": check_shape}
    for code in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
        exec(SHAPE.sub(r"\1; check_shape(\2, [\3])", code), variables)


@pytest.mark.parametrize("program, options", COMMANDS)
def test_commands_parse(program, options, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(options)
    if program == "python -m benchmarks":
        benchmarks.make_parser().parse_args(arguments)
    elif options not in ("--help", "--version"):
        name, *rest = main.to_command(arguments) if program == "python main.py" else arguments
        _, parser = load_command(name)
        parser.parse_args([option for option in rest if option != "--help"])


def test_commands_are_found():
    assert {program for program, _ in COMMANDS} >= set(PROGRAMS) - {"python -m tnt_flax"}


def test_old_commands_are_gone():
    assert not re.findall(r"-m tnt_flax\.tools\.\w+", EVERYTHING)


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"[`^]make ([\w-]+)", EVERYTHING)) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_exist(page):
    folders = "tnt_flax|tests|docs|configs|launch|examples|notebooks|benchmarks|constraints"
    found = re.findall(rf"`((?:{folders})/[\w./]*\w)(?:::(\w+))?`", PAGES[page])
    for path, test in found:
        assert (ROOT / path).exists(), path
        assert f"def {test or ''}" in (ROOT / path).read_text() if test else True, (path, test)


def test_selected_tests_exist():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"-k (\w+)", EVERYTHING):
        assert re.search(rf"def test_\w*{name}", tests), name


def test_reference_lists_every_public_name_and_command():
    documented = re.findall(r"^::: (\S+)$", EVERYTHING, re.MULTILINE)
    assert set(tnt_flax.__all__) <= {name.rpartition(".")[2] for name in documented}
    assert {f"tnt_flax.tools.{command.module}" for command in COMMAND_TABLE.values()} <= set(
        documented
    )


def test_table_of_models():
    rows = dict(re.findall(r"^\| `(p?tnt_\w+)` \| ([\d,]+) \|", PAGES["models.md"], re.MULTILINE))
    assert sorted(rows) == tnt_flax.list_models()
    for name, count in rows.items():
        size = int(name[-3:])
        images = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
        shapes = jax.eval_shape(tnt_flax.create_model(name).init, jax.random.key(0), images)
        assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == int(count.replace(",", ""))
