# SPDX-License-Identifier: Apache-2.0
"""Fills the generated parts of pages: a hook of mkdocs (mkdocs.yml), also used by the tests.

{{ config FILE }}         tables of the keys of a config file
{{ notebook FILE }}       the cells of a notebook, with the outputs of docs/run_notebooks.py
{{ versions FILE FILE }}  table of the main versions that constraint files pin
{{ commands }}            what `tnt-flax COMMAND --help` prints

Also makes explore_digit.html, the explorer in look.md, from docs/explore_digit.json.
"""

import json
import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
GENERATED = re.compile(r"^\{\{ (config|notebook|versions|commands)((?: \S+)*) \}\}$", re.MULTILINE)
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "grain",
    "safetensors",
    "pillow",
)
KEY = re.compile(r"config\.([\w.]+) = (.*?)(?:  # (.*))?$")


def on_page_markdown(markdown: str, **_) -> str:
    """Returns a page with its generated parts; mkdocs calls it for every page."""
    generators = {
        "config": config_tables,
        "notebook": notebook_cells,
        "versions": versions,
        "commands": command_help,
    }

    def generate(match: re.Match) -> str:
        return generators[match[1]](*(ROOT / path for path in match[2].split()))

    return GENERATED.sub(generate, markdown)


def on_files(files, config, **_):
    """Adds the explorer to the files of the site; mkdocs calls it once."""
    from mkdocs.structure.files import File

    page = File.generated(config, "explore_digit.html", content=explorer_page())
    files.append(page)
    return files


def explorer_page() -> str:
    """Returns the explorer of docs/explore_digit.json."""
    sys.path.insert(0, str(ROOT))
    from tnt_flax.tools import explore

    return explore.render(json.loads((ROOT / "docs/explore_digit.json").read_text()))


def config_tables(path: pathlib.Path) -> str:
    """Returns one table per section of a config file: key, default and meaning of each line."""
    lines, comments, table_open = [], [], False
    body = path.read_text().partition("def get_config")[2].partition("return")[0]
    for line in body.splitlines()[1:]:
        line = line.strip()
        key = KEY.fullmatch(line)
        if line.startswith("# "):
            comments.append(line[2:])
        elif key and key[2] == "ConfigDict()":
            lines += ["", f"## {key[1]}", "", *comments, *([key[3]] if key[3] else []), ""]
            comments, table_open = [], False
        elif key:
            meaning = key[3]
            if not meaning:
                meaning, comments = " ".join(comments), []
            if comments:
                lines += ["", *comments, ""]
                comments, table_open = [], False
            if not table_open:
                lines += ["| key | default | meaning |", "|---|---|---|"]
                table_open = True
            default = re.sub(r"config_dict\.placeholder\((\w+)\)", r"\1", key[2])
            lines.append(f"| `{key[1]}` | `{default}` | {meaning} |")
    return "\n".join(lines)


def notebook_cells(path: pathlib.Path) -> str:
    """Returns the cells of a notebook as Markdown, with the text and figures that they print."""
    outputs = json.loads((ROOT / "docs/notebooks/outputs.json").read_text()).get(path.stem, {})
    parts = []
    for index, cell in enumerate(json.loads(path.read_text())["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"<!--.*?-->\n|^# .*\n", "", source, flags=re.MULTILINE))
        else:
            parts.append(f"```python\n{source}\n```")
        if text := outputs.get(str(index)):
            parts.append(f"```text\n{text.rstrip()}\n```")
        if (ROOT / f"docs/notebooks/{path.stem}_{index}.png").exists():
            parts.append(f"![Output of the cell above]({path.stem}_{index}.png)")
    return "\n\n".join(parts)


def versions(*paths: pathlib.Path) -> str:
    """Returns a table of the versions that constraint files pin, one column per file."""
    pins = [dict(re.findall(r"^([\w-]+)==(\S+)$", p.read_text(), re.MULTILINE)) for p in paths]
    lines = [
        "| package | " + " | ".join(f"`{path.name}`" for path in paths) + " |",
        "|---" * (len(paths) + 1) + "|",
    ]
    for name in PACKAGES:
        lines.append(f"| {name} | " + " | ".join(pin.get(name, "-") for pin in pins) + " |")
    return "\n".join(lines)


def command_help() -> str:
    """Returns the help of every command of `tnt-flax`."""
    sys.path.insert(0, str(ROOT))
    os.environ["COLUMNS"] = "80"
    from tnt_flax import __main__ as command

    parts = []
    for name in command.COMMANDS:
        _, parser = command.load_command(name)
        parts.append(f"## tnt-flax {name}\n\n```text\n{parser.format_help().rstrip()}\n```")
    return "\n\n".join(parts)
