# SPDX-License-Identifier: Apache-2.0
"""The import rule: a file imports from its own folder and folders in rows above."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "tnt_flax"
ROWS = [{"core"}, {"models", "data"}, {"runtime"}, {"weights"}, {"training"}]
ROWS += [{"inference", "nnx"}, {"tools"}, {"__main__"}]
RANK = {folder: i for i, row in enumerate(ROWS) for folder in row}
BANNED = {  # packages that a folder must not import
    "core": {"flax", "optax", "orbax", "ml_collections", "grain"},
    "models": {"optax", "orbax", "ml_collections", "grain", "PIL"},
    "data": {"jax", "flax", "optax", "orbax", "ml_collections"},
    "weights": {"optax", "orbax"},
}
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(path):
    """Yields the modules, and the names within ours, that the file at `path` imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in names)


def folder(module):
    return module.split(".")[1]


@pytest.mark.parametrize("module", sorted(FILES.keys() - {"tnt_flax"}))
def test_imports_point_up(module):
    for target in imports(FILES[module]):
        if target in FILES and target != "tnt_flax" and folder(target) != folder(module):
            assert RANK[folder(target)] < RANK[folder(module)], f"{module} imports {target}"
        banned = BANNED.get(folder(module), set()) | {"tensorflow"}
        assert target.split(".")[0] not in banned, f"{module} imports {target}"


def test_no_import_cycles():
    graph = {module: set(imports(path)) & FILES.keys() - {module} for module, path in FILES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_catch_all_modules():
    assert not {p.stem for p in FILES.values()} & {"utils", "util", "common", "misc", "helpers"}


def test_size_limits():
    for path in FILES.values():
        text = path.read_text()
        assert len(text.splitlines()) <= 500, f"{path} has more than 500 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                limit = 120 if node.name == "train_and_evaluate" else 60
                length = node.end_lineno - node.lineno + 1
                assert length <= limit, f"{path}: {node.name} has {length} lines"


def test_training_imports_no_tensorflow_or_torch(root):
    code = (
        "import sys, tnt_flax.training.train as t; print({'tensorflow', 'torch'} & {*sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert out.stdout.strip() == "set()", out.stderr
