# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/: the Python runs, commands parse, files and names exist."""

import importlib
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import pytest

import tnt_flax
from tnt_flax.weights import names
from tnt_flax.weights.formats import torch

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
EVERYTHING = "\n".join(PAGES.values())
COMMAND = re.compile(
    r"^(?:.*\| )?(?:\.venv/bin/)?python (?:-m ([\w.]+)|(main)\.py)(.*)$", re.MULTILINE
)
OTHERS = ("venv", "pip", "pytest", "mkdocs")
COMMANDS = sorted(
    {(m[1] or m[2], m[3]) for m in COMMAND.finditer(EVERYTHING) if m[1] not in OTHERS}
)
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


@pytest.mark.parametrize("module, options", COMMANDS)
def test_commands_parse(module, options, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(options)
    if module == "tnt_flax":
        module = f"tnt_flax.tools.{arguments.pop(0)}"
    module = {"benchmarks": "benchmarks.__main__"}.get(module, module)
    importlib.import_module(module).make_parser().parse_args(arguments)


def test_commands_are_found():
    modules = {module for module, _ in COMMANDS}
    assert {"main", "benchmarks", "tnt_flax.tools.convert", "tnt_flax.tools.predict"} <= modules


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
    files = (ROOT / "tnt_flax/tools").glob("*.py")
    commands = {file.stem for file in files if "__main__" in file.read_text()}
    assert {f"tnt_flax.tools.{command}" for command in commands} <= set(documented)


def test_table_of_models():
    rows = dict(re.findall(r"^\| `(p?tnt_\w+)` \| ([\d,]+) \|", PAGES["models.md"], re.MULTILINE))
    assert sorted(rows) == tnt_flax.list_models()
    for name, count in rows.items():
        size = int(name[-3:])
        images = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
        shapes = jax.eval_shape(tnt_flax.create_model(name).init, jax.random.key(0), images)
        assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == int(count.replace(",", ""))
