# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom and are stored without output."""

import json
import pathlib

import pytest

from tests.helpers import small_network
from tnt_flax.training import plots

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["load_and_predict", "fine_tune", "look_inside"])
def test_notebook_runs(name, tmp_path, monkeypatch, capsys):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and len(cells) >= 4
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    folder = tmp_path / "runs" / "digits"
    folder.mkdir(parents=True)
    small_network.save(folder, size=32, depth=1).rename(folder / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    plots.pyplot()  # selects a backend without windows
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    out = capsys.readouterr().out
    expected = {"load_and_predict": "label ", "fine_tune": "after: ", "look_inside": "sentences"}
    assert expected[name] in out
    if name == "fine_tune":
        assert sum(names["losses"][-8:]) < sum(names["losses"][:8])
    elif name == "load_and_predict":
        predictions = names["classifier"].predict(names["images"], top=1)
        assert names["logits"].argmax(axis=1).tolist() == [best.index for (best,) in predictions]
    elif name == "look_inside":
        assert len(names["axes"].flat) == 2 and names["reached"].sum() == pytest.approx(1, abs=1e-5)
        plots.pyplot().close("all")


def test_every_notebook_is_tested():
    assert {p.stem for p in FOLDER.glob("*.ipynb")} == {
        "load_and_predict",
        "fine_tune",
        "look_inside",
    }
