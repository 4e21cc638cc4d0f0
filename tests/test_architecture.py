# SPDX-License-Identifier: Apache-2.0
"""The dependency rule of the README: a file imports only from the rows above its own."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "tnt_flax"
ROWS = """
    errors models.platform
    --
    models.draws
    --
    models.layers models.checks models.batch_norm models.word_embedding models.inner_kernels
    models.outer_attention models.cpu
    data.plan data.storage data.transforms data.randaugment
    losses augment sharding workdir figures metrics command host manifest tools.findings
    tables tools.contractions tools.hlo tools.rounds convert.tables convert.inert
    convert.mindspore_files convert.hub data.imagenet_classes exported tools.page
    --
    distributed state
    --
    agreement guard models.inner_pallas models.lanes models.pyramid_layers data.outage data.index
    data.names data.opencv weights checkpoint convert.mapping convert.pickles tools.short_run
    fine_tuning environment
    --
    models.implementations models.block convert.torch_files data.tar data.tfds_records
    optimizer
    --
    models.tnt models.pyramid_tnt
    --
    models.folded models.backbone
    --
    models steps
    --
    convert.files convert.networks data.imagenet data.webdataset
    --
    convert.checkpoints data.sources
    --
    convert.load convert.targets convert.described data.pipeline
    data.class_maps tools.weights_options tools.look
    --
    build classifier convert.hub_folder tools.pictures
    --
    config_check
    --
    evaluate convert.against tools.predict tools.check_data tools.preview tools.describe
    tools.tpu_compiler tools.answers tools.visualize tools.export
    --
    train convert.__main__ tools.compile_check tools.benchmark_compile tools.benchmark_input
    tools.benchmark_model tools.report
    --
    tools.benchmark_inference tools.benchmark_loop tools.benchmark_start
    --
    tools.benchmark
"""
ROW = {name: i for i, row in enumerate(ROWS.split("--")) for name in row.split()}
BANNED = {  # third-party packages that a folder must not import; "" is every other file
    "models": {"optax", "orbax", "ml_collections", "grain", "PIL"},
    "data": {"jax", "flax", "optax", "orbax", "ml_collections"},
    "": set(),
}
BANNED_EVERYWHERE = {"tensorflow", "torch", "timm"}
# These run timm beside ours; inside a function.
ORACLES = {"convert.against", "tools.benchmark_inference", "tools.benchmark_input"}
ORACLES |= {"tools.benchmark_model"}
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.read_text()]


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: module_name(p) or "tnt_flax")
def test_imports_point_up(path):
    name = module_name(path)
    if not name:
        assert not any(t.startswith("tnt_flax") for t in imports(ast.parse(path.read_text())))
        return
    banned = BANNED.get(name.split(".")[0], BANNED[""]) | BANNED_EVERYWHERE
    tree = ast.parse(path.read_text())
    if name in ORACLES:
        tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    for target in imports(tree):
        if not target.startswith("tnt_flax"):
            assert target.split(".")[0] not in banned, f"{name} must not import {target}"
            continue
        target = target.removeprefix("tnt_flax").lstrip(".")
        while target and target not in ROW:  # from an imported symbol back to its module
            target = target.rpartition(".")[0]
        assert target and ROW[target] < ROW[name], f"{name} must not import {target}"


def test_every_file_has_a_row():
    assert {module_name(p) for p in FILES} - {""} == set(ROW)


def test_no_file_is_a_drawer():
    nouns = {path.stem for path in FILES}
    assert not nouns & {"utils", "util", "common", "misc", "helpers"}
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 330, f"{path} is missing a noun"


def test_training_does_not_import_tensorflow_or_torch(root):
    code = "import sys, tnt_flax.train; print(sorted({'tensorflow', 'torch'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr
