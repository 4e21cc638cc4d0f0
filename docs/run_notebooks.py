# SPDX-License-Identifier: Apache-2.0
"""Runs the notebooks and stores what their pages show: docs/notebooks/outputs.json and figures.

make train
python docs/run_notebooks.py
"""

import ast
import contextlib
import io
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
OUT = ROOT / "docs/notebooks"


def run_cell(source: str, names: dict) -> str:
    """Returns what a cell prints, then the value of its last expression, as Jupyter shows it."""
    *statements, last = ast.parse(source).body
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if not isinstance(last, ast.Expr):
            statements.append(last)
        exec(compile(ast.Module(statements, []), "cell", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            if value is not None and "matplotlib" not in type(value).__module__:
                print(repr(value))
    return printed.getvalue()


def run(path: pathlib.Path) -> dict[str, str]:
    """Returns the text of each cell that has one; writes the figure that a cell leaves open."""
    import matplotlib.pyplot as plt

    outputs, names = {}, {}
    for index, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            if text := run_cell("".join(cell["source"]), names):
                outputs[str(index)] = text
            if plt.get_fignums():
                plt.savefig(OUT / f"{path.stem}_{index}.png", dpi=100, bbox_inches="tight")
                plt.close("all")
    return outputs


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    outputs = {path.stem: run(path) for path in sorted(ROOT.glob("notebooks/*.ipynb"))}
    (OUT / "outputs.json").write_text(json.dumps(outputs, indent=1) + "\n")
