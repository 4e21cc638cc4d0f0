# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/: Python runs, commands parse; files, tests, links and anchors exist."""

import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import main
import tnt_flax
from benchmarks import __main__ as benchmarks
from tnt_flax import __main__ as command
from tnt_flax.weights import names
from tnt_flax.weights.formats import torch

ROOT = pathlib.Path(__file__).parents[1]
FILES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *ROOT.glob("docs/**/*.md"),
]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
EVERYTHING = "\n".join(PAGES.values())
COMMAND = re.compile(
    r"^(?:.*\| )?(?:\.venv/bin/)?(tnt-flax|python main\.py|python -m benchmarks)\b(.*)$",
    re.MULTILINE,
)
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", EVERYTHING, re.DOTALL))
INLINE = "\n".join(re.findall(r"`((?:tnt-flax|python -m benchmarks) [a-z-]+ [^`]+)`", EVERYTHING))
COMMANDS = sorted({match.groups() for match in COMMAND.finditer(BLOCKS + INLINE)})
SHAPE = re.compile(r"^((?:\w+ = )?(\S.*?))  # \[([\d, ]+)\]$", re.MULTILINE)


def load_generator():
    """Returns docs/generate.py, which fills the generated parts of pages, as a module."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = load_generator()


def headings(path: pathlib.Path) -> set[str]:
    """Returns the anchors of the headings of a page."""
    text = re.sub(r"```.*?```", "", GENERATE.on_page_markdown(path.read_text()), flags=re.DOTALL)
    lines = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", line).strip().lower() for line in lines]
    return {re.sub(r"[-\s]+", "-", line) for line in words}


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
    arguments = shlex.split(options, comments=True)
    if program == "python -m benchmarks":
        benchmarks.make_parser(arguments[0]).parse_args(arguments)
    else:
        name, *rest = main.to_command(arguments) if program == "python main.py" else arguments
        command.load_command(name)[1].parse_args(rest)


def test_every_command_has_an_example():
    shown = {options.split()[0] for program, options in COMMANDS if program == "tnt-flax"}
    assert shown == set(command.COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["what_tnt_sees", "few_textures"])
def test_scripts_of_the_figures_start(script):
    run = [sys.executable, ROOT / f"docs/{script}.py", "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert (
        script
        in subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stdout
    )


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


@pytest.mark.parametrize("page", PAGES)
def test_links_and_their_anchors_exist(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "../../actions/")):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in headings(path), link


def test_selected_tests_exist():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"-k (\w+)", EVERYTHING):
        assert re.search(rf"def test_\w*{name}", tests), name


def test_configuration_lists_every_key():
    from configs import default

    page = GENERATE.on_page_markdown(PAGES["docs/configuration.md"])
    keys = set(re.findall(r"^\| `([\w.]+)` \| `", page, re.MULTILINE))
    config = default.get_config()
    assert keys == {
        f"{name}.{key}" if hasattr(value, "keys") else name
        for name, value in config.items()
        for key in (value if hasattr(value, "keys") else [""])
    }


def test_every_generated_part_is_filled():
    for page, text in PAGES.items():
        assert "{{" not in GENERATE.on_page_markdown(text), page


def test_reference_lists_every_public_name():
    documented = re.findall(r"^::: (\S+)$", EVERYTHING, re.MULTILINE)
    assert set(tnt_flax.__all__) <= {name.rpartition(".")[2] for name in documented}


@pytest.mark.slow
def test_table_of_models():
    text = PAGES["docs/models.md"]
    rows = dict(re.findall(r"^\| `(p?tnt_\w+)` \| ([\d,]+) \|", text, re.MULTILINE))
    assert sorted(rows) == tnt_flax.list_models()
    for name, count in rows.items():
        size = int(name[-3:])
        images = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
        shapes = jax.eval_shape(tnt_flax.create_model(name).init, jax.random.key(0), images)
        assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == int(count.replace(",", ""))
