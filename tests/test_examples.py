# SPDX-License-Identifier: Apache-2.0
"""The data set of textures: sizes, disjoint splits, the same files on every run, bad input."""

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import distance_transform_cdt

from tests.helpers.photos import jpeg


@pytest.fixture
def textures(root):
    """The module `examples/textures.py`."""
    spec = importlib.util.spec_from_file_location("textures", root / "examples/textures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_textures_are_balanced_patches_and_the_same_on_every_run(textures, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for name in ("china", "flower"):
        (tmp_path / f"photos/{name}.jpg").write_bytes(jpeg(name))
    (tmp_path / "photos/notes.txt").write_text("not a photograph")
    for out in ("first", "second"):
        textures.main([f"--out={tmp_path / out}", f"--photos={tmp_path / 'photos'}"])
    assert '"china": {"train": 159, "test": 28}' in capsys.readouterr().out
    written = files(tmp_path / "first")
    assert written == files(tmp_path / "second")
    assert {path.parts[:2] for path in written} == {
        (split, name) for split in ("train", "test") for name in ("china", "flower")
    }
    patches = np.stack([np.asarray(Image.open(io.BytesIO(x))) for x in written.values()])
    assert patches.shape[1:] == (32, 32) and patches.dtype == np.uint8
    assert np.median(patches.mean((1, 2))) == pytest.approx(128, abs=1)
    assert np.median(patches.std((1, 2))) == pytest.approx(48, abs=2)  # before values are clipped


def test_training_and_test_patches_are_eight_pixels_apart(textures):
    """Every pixel has its own value, which the patches show without their normalization."""
    pixels = np.arange(300 * 400, dtype=np.float32).reshape(300, 400)
    textures.normalize = lambda patch: patch
    seen = {}
    for split in ("train", "test"):
        patches = np.stack(list(textures.cut(pixels, split)))
        seen[split] = np.isin(pixels, patches)
    steps = distance_transform_cdt(~seen["train"], "chessboard")[seen["test"]]
    assert steps.min() == 9  # 8 pixels between them


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--out=."], ". exists: choose another folder"),
        (["--out=new", "--photos=absent"], "absent is not a folder"),
        (["--out=new", "--photos=one"], "one has fewer than two photographs"),
        (["--out=new", "--photos=broken"], "broken/b.jpg: cannot identify image file"),
        (["--out=new", "--photos=flat"], "flat/a.png is too small or flat"),
        (["--out=new"], "no photographs: pip install scikit-image scikit-learn, or set --photos"),
    ],
)
def test_bad_input_is_one_line(textures, flags, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "broken", "flat"):
        (tmp_path / folder).mkdir()
        Image.new("L", (100, 100)).save(tmp_path / folder / "a.png")
    (tmp_path / "broken/b.jpg").write_bytes(b"no image")
    (tmp_path / "broken/a.png").write_bytes(jpeg("china"))
    Image.new("L", (100, 100)).save(tmp_path / "flat/b.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit:
        textures.main(flags)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
