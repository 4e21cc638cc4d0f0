# SPDX-License-Identifier: Apache-2.0
"""Writes docs/explore_digit.json, the data of the explorer in docs/look.md.

python main.py --config=configs/digits.py --workdir=runs/digits
python docs/explore_digit.py runs/digits

The page around the data is made when the documentation is built, by docs/generate.py.
"""

import json
import pathlib
import sys

from tnt_flax.data.sources import Digits
from tnt_flax.inference.preprocess import Preprocessor
from tnt_flax.tools.attention import trace_attention
from tnt_flax.tools.command_line import Parser, exit_on_error
from tnt_flax.tools.explore import page_data
from tnt_flax.weights.read import read_checkpoint

DIGIT = 8  # of the test split
OUT = pathlib.Path(__file__).with_suffix(".json")


def main(argv: list[str]) -> None:
    parser = Parser("python docs/explore_digit.py", __doc__)
    parser.add_argument("checkpoint", help="workdir of a run on the digits")
    with exit_on_error("nothing was written"):
        found = read_checkpoint(parser.parse_args(argv).checkpoint)
        pixels, label = Digits("test")[DIGIT]
        traces = trace_attention(found, Preprocessor(found).read(pixels)[None])
        data, _ = page_data(found, traces, [f"a handwritten {label}, of the test split"])
        OUT.write_text(json.dumps(data) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
