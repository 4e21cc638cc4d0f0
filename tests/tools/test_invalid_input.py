# SPDX-License-Identifier: Apache-2.0
"""Invalid input of a command is one line on stderr and exit code 2, and nothing on stdout."""

import json

import pytest

from tests.helpers import small_network
from tnt_flax.__main__ import main
from tnt_flax.runtime.workdir import config_to_json

CASES = {
    "check-data": [
        ("CONFIG --split=test", "argument --split: invalid choice: 'test'"),
        ("--split=eval", "--config=FILE is missing"),
        ("CONFIG --config.data.source=folder", "needs the folder of the data: set data.root"),
    ],
    "describe": [
        ("tnt_s", "unknown model 'tnt_s'"),
        ("tnt_s_patch16_224 --image-size=100", "image size 100x100 is not divisible by"),
        ("tnt_s_patch16_224 --batch-size=0", "argument --batch-size: '0' is not a positive"),
        ("tnt_s_patch16_224 --set depht=3", "TNT has no field 'depht' (did you mean"),
        ("tnt_s_patch16_224 --set depth", "--set depth: write NAME=VALUE"),
        ("tnt_s_patch16_224 --set dtype=int99", "dtype='int99' is not a valid type"),
        ("", "the following arguments are required: MODEL"),
    ],
    "export": [
        ("WEIGHTS x.tflite", "x.tflite: give FILE.stablehlo, FILE.onnx, or a folder"),
        ("WEIGHTS WEIGHTS", "give FILE.stablehlo"),
        ("WEIGHTS no/x.onnx", "there is no folder"),
        ("WEIGHTS .", "exists already"),
        ("no.pth x", "no.pth"),
        ("WEIGHTS", "give OUT: FILE.stablehlo, FILE.onnx or a folder, or --push=OWNER/NAME"),
        ("WEIGHTS x.onnx --opset=15", "'15' is outside 16 to 26"),
        ("WEIGHTS x.onnx --outputs=logit", "'logit' is none of logits, features, outer_attention"),
        ("WEIGHTS x.onnx --dtype=bfloat16", "does not run it on CPUs"),
        ("WEIGHTS x.onnx --int8 --dtype=float16", "--int8 and --dtype cannot be combined"),
        ("WEIGHTS x.stablehlo --int8", "--int8 is for FILE.onnx, not for x.stablehlo"),
        ("WEIGHTS x --layout=nchw", "--layout is for FILE.stablehlo and FILE.onnx, not for x"),
        ("WEIGHTS x.onnx --push=a/b", "--push is for folders"),
        ("WEIGHTS x --push=b", "--push=b: write OWNER/NAME"),
        ("WEIGHTS x --private", "--private is for --push"),
        ("WEIGHTS x --license=MIT!", "is not an identifier of a license"),
        ("WEIGHTS x --config.epochs=1", "--config=FILE is missing"),
    ],
    "preview": [
        ("CONFIG", "--out= is not a PNG file: use --out=FILE.png"),
        ("CONFIG --out=a.pdf", "--out=a.pdf is not a PNG file"),
        ("CONFIG --out=/nowhere/a.png", "there is no folder /nowhere for --out=/nowhere/a.png"),
    ],
    "report": [
        ("no/such", "no/such is not a workdir: it has no config.json"),
        ("run --out=x.txt", "--out=x.txt: give a file that ends in .html"),
        ("run --out=no/x.html", "in a folder that exists"),
        ("run", "checkpoint"),
        ("", "the following arguments are required: WORKDIR"),
    ],
    "selftest": [
        ("--model=tnt_x", "tnt_x"),
        ("--dtype=float16", "argument --dtype: invalid choice"),
        ("--rounds=0", "argument --rounds: '0' is not a positive integer"),
    ],
    "visualize": [
        ("WEIGHTS no.jpg --out=x", "no.jpg cannot be read: No such file"),
        ("WEIGHTS WEIGHTS --out=x", "is not a usable image: not an image format"),
        ("no.safetensors PHOTO --out=x", "no.safetensors"),
        ("WEIGHTS PHOTO --out=x --patches 3,0", "--patches 3,0: write ROW,COLUMN, from 0,0"),
        ("WEIGHTS PHOTO --out=x --patches 1", "--patches 1: write ROW,COLUMN"),
        ("WEIGHTS PHOTO --out=PHOTO/x", "cannot make the folder"),
        ("WEIGHTS --out=x", "the following arguments are required: IMAGE"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has weights, a photograph, and a workdir without checkpoints."""
    from configs import digits

    folder = tmp_path_factory.mktemp("run")
    small_network.save(folder, depth=1)
    small_network.photo(folder)
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps(config_to_json(digits.get_config())))
    return folder


@pytest.mark.parametrize(
    "command, arguments, message",
    [(command, *case) for command, cases in CASES.items() for case in cases],
)
def test_one_line_and_exit_code_2(command, arguments, message, folder, root, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = {
        "CONFIG": f"--config={root}/configs/digits.py",
        "WEIGHTS": "small.safetensors",
        "PHOTO": "china.jpg",
    }
    for word, value in words.items():
        arguments = arguments.replace(word, value)
    assert main([command, *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert err.startswith("error: ") and message in err
