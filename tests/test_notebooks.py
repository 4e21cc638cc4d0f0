# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom, and are stored without output."""

import json
import pathlib
import subprocess
import sys

import looked_at
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
RUN = "import sys, matplotlib; matplotlib.use('Agg'); exec(sys.stdin.read(), {'__name__': 'cells'})"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["load_and_predict", "fine_tune", "look_inside"])
def test_it_runs(name, tmp_path, root):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and len(cells) >= 4
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    weights = tmp_path / "runs" / "digits"
    weights.mkdir(parents=True)
    looked_at.save(weights, size=32, depth=2).rename(weights / "weights.safetensors")
    code = "\n".join("".join(cell["source"]) for cell in cells)
    if name == "fine_tune":
        code += "\nassert after > 0.55, after"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN],
        input=code,
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    said = {"load_and_predict": "taken for", "fine_tune": "after: ", "look_inside": "sentences"}
    assert said[name] in run.stdout


def test_all_are_run():
    assert {p.stem for p in FOLDER.glob("*.ipynb")} == {
        "load_and_predict",
        "fine_tune",
        "look_inside",
    }
