# SPDX-License-Identifier: Apache-2.0
"""Writes one page on which you explore what a network attends to.

    tnt-flax explore tnt_s_81.5.pth.tar cat.jpg dog.jpg --out=page.html
    tnt-flax explore runs/digits three.png --out=page.html --light

Open the page in any browser, from disk. Point at a sentence of an image: the page shows where the
sentence, or the class token, attends in each block and head, and magnifies its words; point at a
word to see where the word attends within its sentence. --light keeps the mean of the heads only,
which makes the page several times smaller. The last line on stdout is one JSON object. Exit code 1
means that the page could not be written, 2 that the input was wrong.
"""

import argparse
import base64
import functools
import hashlib
import json
import logging
import pathlib
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnt_flax.core.files import open_new
from tnt_flax.data.labels import display_names
from tnt_flax.inference.preprocess import Preprocessor
from tnt_flax.runtime import host
from tnt_flax.tools.attention import Trace, trace_attention
from tnt_flax.tools.command_line import Parser, policy_arguments, read_weights
from tnt_flax.tools.page import data_url
from tnt_flax.weights.read import LoadedWeights

logger = logging.getLogger(__name__)
TOP = 5  # predictions per image
FOLDER = pathlib.Path(__file__).parent / "explorer"
STYLE, PREDICTIONS = FOLDER / "style.css", FOLDER / "predictions.js"  # shared with the demo


def add_arguments(parser: Parser) -> None:
    parser.add_weights()
    add = parser.add_argument
    add("images", metavar="IMAGE", nargs="+", help="image files, shown side by side")
    add("--out", type=pathlib.Path, required=True, help="the page, such as page.html")
    add("--light", action="store_true", help="store the mean of the heads only")
    parser.add_policy()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the page; returns the JSON object of the last line.

    Raises:
        InputError: the weights or an image are wrong, or the page cannot be written.
        RunError: the disk is full.
    """
    host.cache_compilations()
    with open_new(args.out) as file:
        found = read_weights(args)
        preprocessor = Preprocessor(found, **policy_arguments(args))
        pixels = np.stack([preprocessor.read(image) for image in args.images])
        logger.info(f"tracing {found.summary()}")
        traces = trace_attention(found, pixels)
        names = [pathlib.Path(image).name for image in args.images]
        data, error = page_data(found, traces, names, light=args.light)
        page = render(data).encode()
        file.write(page)
    return {
        "out": str(args.out),
        "images": len(traces),
        "bytes": len(page),
        "largest_error": round(error, 6),
    }


def page_data(
    found: LoadedWeights,
    traces: Sequence[Trace],
    names: Sequence[str],
    *,
    light: bool = False,
    labels: Sequence[str] | None = None,
) -> tuple[dict[str, Any], float]:
    """Returns the data of a page for `render`, and the largest error of an attention weight.

    Args:
        found: the weights, for the names of network and classes.
        traces: of `trace_attention`, one per image.
        names: titles of the images.
        light: store the mean of the heads only.
        labels: names of the classes, by default those of the weights.
    """
    labels = labels or display_names(found.class_names, found.network.model.num_classes)
    images, error = [], 0.0
    for trace, name in zip(traces, names, strict=True):
        codes, scales, blocks = encode_attention(trace, light)
        error = max(error, float(scales.max()) / 2)
        images.append(
            {
                "name": name,
                "size": trace.pixels.shape[:2],
                "pixels": data_url(trace.pixels),
                "predictions": _predictions(trace, labels),
                "blocks": blocks,
                "codes": base64.b64encode(codes).decode(),
                "scales": base64.b64encode(scales).decode(),
            }
        )
    data = {
        "network": found.name or type(found.network.model).__name__,
        "class_token": traces[0].has_class_token,
        "readout": traces[0].readout_name,
        "mean_of_heads": light,
        "images": images,
    }
    return data, error


def render(data: dict[str, Any]) -> str:
    """Returns the page that shows the data of `page_data`."""
    text, template = _parts()
    # "<" would end the script element inside a string of the data, such as a file name.
    encoded = json.dumps(data).replace("<", "\\u003c")
    return template.substitute(text, policy=content_policy(), data=encoded)


def content_policy() -> str:
    """Returns the Content-Security-Policy of the page: its own style and script, no requests."""
    text, _ = _parts()
    digests = {
        name: base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        for name, part in text.items()
    }
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digests['style']}'; "
        f"script-src 'sha256-{digests['script']}'; base-uri 'none'; form-action 'none'"
    )


@functools.cache
def _parts():
    """Returns {"style": text, "script": text} and the page's template."""
    files = {"style": [STYLE], "script": [PREDICTIONS, FOLDER / "script.js"]}
    text = {k: "".join(file.read_text("utf-8") for file in x) for k, x in files.items()}
    return text, string.Template((FOLDER / "page.html").read_text("utf-8"))


def encode_attention(
    trace: Trace, light: bool
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Returns attention as bytes, their scales, and the shapes of each block.

    An attention weight is code * scale. Outer attention has a scale per head and query, inner
    attention per head and sentence, so that the largest weight of each has the code 255. Both
    arrays hold the blocks in order, in each block first outer [heads, T, K], then inner
    [N, heads, M, M] attention.

    Args:
        trace: of one image.
        light: average over the heads.

    Returns:
        (codes uint8, scales float32 little-endian, a dictionary of shapes per block).
    """
    codes, scales, blocks = [], [], []

    def add(attention, axes):
        scale = attention.max(axis=axes, keepdims=True).astype("<f4") / 255
        codes.append(np.rint(attention / np.maximum(scale, 1e-30)).astype(np.uint8).ravel())
        scales.append(scale.ravel())

    for i, outer in enumerate(trace.outer_attention):
        layout, inner = trace.layouts[i], trace.inner_attention.get(i)
        if light:
            outer = outer.mean(axis=0, keepdims=True)
            inner = None if inner is None else inner.mean(axis=1, keepdims=True)
        add(outer.astype(np.float32), axes=2)
        if inner is not None:
            add(inner.astype(np.float32), axes=(2, 3))
        heads, queries, keys = outer.shape
        blocks.append(
            {
                "grid": layout.grid,
                "side": layout.side,
                "reduction": layout.reduction,
                "heads": heads,
                "queries": queries,
                "keys": keys,
                "inner_heads": 0 if inner is None else inner.shape[1],
                "words": 0 if inner is None else inner.shape[2],
            }
        )
    return np.concatenate(codes), np.concatenate(scales), blocks


def _predictions(trace, labels):
    if trace.probabilities is None:
        return []
    best = np.argsort(-trace.probabilities, kind="stable")[:TOP]
    return [{"label": labels[i], "probability": float(trace.probabilities[i])} for i in best]
