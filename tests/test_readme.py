# SPDX-License-Identifier: Apache-2.0
"""What the README prints, works: its Python runs, its commands parse, its tables are true."""

import pathlib
import re
import subprocess
import sys

import jax
import pytest
from test_architecture import ROWS

import tnt_flax

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = re.findall(r"^(?:\.venv/bin/)?python (main\.py .*)$", README, re.MULTILINE)


@pytest.mark.slow
def test_the_python_runs_and_gives_the_shapes_it_says():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(code, names)
    said = re.findall(r"^(?:\w+ = )?(\S.*?)  # \[([\d, ]+)\]", code, re.MULTILINE)
    assert len(said) >= 5
    for expression, shape in said:
        value = eval(expression, names)
        assert list(value.shape) == [int(n) for n in shape.split(",")], expression


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, root):
    code = (
        "import sys, main; sys.argv = sys.argv[1:]; main.parse_flags(sys.argv); "
        "print(main.CONFIG.value.model.name)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *command.split()], cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("tnt_")


def test_there_are_commands():
    assert len(COMMANDS) >= 4


def test_make_targets_exist(root):
    targets = set(re.findall(r"^(\w+):", (root / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make (train|test|oracle|eval)\b", README)) <= targets


def test_the_table_of_models():
    rows = dict(re.findall(r"^\| `(tnt_\w+)` \| ([\d,]+) \|", README, re.MULTILINE))
    assert sorted(rows) == tnt_flax.list_models()
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
    for name, count in rows.items():
        shapes = jax.eval_shape(tnt_flax.create_model(name).init, jax.random.key(0), images)
        assert sum(x.size for x in jax.tree.leaves(shapes)) == int(count.replace(",", ""))


def test_the_dependency_table():
    table = README[README.index("| a file imports only") :]
    rows = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    printed = [{name.replace("/", ".") for name in re.findall(r"`(.*?)`", row)} for row in rows]
    assert printed == [set(row.split()) for row in ROWS.split("--")]
