# SPDX-License-Identifier: Apache-2.0
"""Exports a network with its weights, for use without tnt_flax.

    tnt-flax export tnt_s_81.5.pth.tar tnt_s.stablehlo
    tnt-flax export runs/digits digits.onnx
    tnt-flax export tnt_s_81.5.pth.tar tnt_s_timm

OUT.stablehlo is for JAX on CPUs, GPUs and TPUs (`tnt_flax.load_exported`; readable for 180 days),
OUT.onnx for ONNX Runtime, a folder for timm and the Hugging Face hub. Both files take normalized
images [B, H, W, 3] with any B. Every export is verified: its outputs on random images are compared
with the source's. The last line on stdout is one JSON object. Exit code 1 means that the export
could not be written or differs from its source, 2 that the input was wrong.
"""

import argparse
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tnt_flax.core.errors import InputError, RunError, one_line
from tnt_flax.core.files import atomic_path
from tnt_flax.data.transforms import height_width
from tnt_flax.inference.preprocess import check_images
from tnt_flax.inference.stablehlo import load_exported, save_exported, trace
from tnt_flax.runtime import host
from tnt_flax.tools.command_line import Parser, add_weights_options, read_weights
from tnt_flax.weights import write
from tnt_flax.weights.read import LoadedWeights, read_checkpoint

logger = logging.getLogger(__name__)
PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4  # relative to max(1, largest logit)
ONNX_PACKAGES = (
    'pip install "tnt_flax[onnx]" and then pip install --no-deps jax2onnx==0.17.1, whose own '
    "requirements pin an Orbax that it does not use and that is too old for this package"
)
Run = Callable[[np.ndarray], np.ndarray]


def add_arguments(parser: Parser) -> None:
    add_weights_options(parser)
    add = parser.add_argument
    add("out", metavar="OUT", type=pathlib.Path, help="FILE.stablehlo, FILE.onnx, or a folder")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes and verifies the export; returns the JSON object of the last line.

    Raises:
        InputError: the weights or OUT are wrong, a package is missing, or timm has no such network.
        RunError: the export cannot be written, or its outputs differ from the source's.
    """
    out = args.out
    file_format = out.suffix.lower().removeprefix(".") or "timm"
    if file_format not in FORMATS:
        raise InputError(f"{out}: give FILE.stablehlo, FILE.onnx, or a folder without an ending")
    if out.exists():
        raise InputError(f"{out} exists already: remove it, or choose another name")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent}")
    host.cache_compilations()
    found = read_weights(args)
    check_images(found)
    logger.info(f"exporting {found.summary()}")
    try:
        with atomic_path(out) as temporary:
            exported = FORMATS[file_format](found, temporary)
            difference = verify(found, exported, str(out))
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}") from error
    return {
        "path": str(out),
        "format": file_format,
        "max_abs_difference": difference,
        "parameters": found.num_params,
    }


# ------------------------------------------------------------------------------------- formats


def to_stablehlo(found: LoadedWeights, path: pathlib.Path) -> Run:
    info = write.facts(found)
    save_exported(path, trace(plain(found), info["image_size"], PLATFORMS), info)
    return load_exported(path)


def to_onnx(found: LoadedWeights, path: pathlib.Path) -> Run:
    size = write.facts(found)["image_size"]
    try:
        import onnx
        import onnxruntime

        previous = logging.root.manager.disable
        logging.disable(logging.ERROR)  # warnings about plugins and shapes
        try:
            import jax2onnx

            model = jax2onnx.to_onnx(
                plain(found),
                inputs=[("batch", *height_width(size), 3)],
                input_names=["images"],
                output_names=["logits" if found.network.model.num_classes else "features"],
                model_name=found.name or "tnt",
            )
        finally:
            logging.disable(previous)
    except ImportError as error:
        raise InputError(f"{one_line(error)}: {ONNX_PACKAGES}") from error
    for key, value in write.facts(found).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": np.asarray(images)})[0]


def to_timm(found: LoadedWeights, path: pathlib.Path) -> Run:
    target = write.to_framework(found, "timm")
    write.write_hub_folder(path, target, found)
    written = read_checkpoint(path)
    return jax.jit(lambda images: written.network.model.apply(written.variables, images))


FORMATS = {"stablehlo": to_stablehlo, "onnx": to_onnx, "timm": to_timm}


def plain(found: LoadedWeights) -> Callable[[Any], Any]:
    """Returns the network as a function of images, with the reference implementations."""
    model = found.network.model.clone(inner_impl="reference", outer_impl="reference", remat="none")
    variables = jax.device_get(found.variables)
    return lambda images: model.apply(variables, images)


# ---------------------------------------------------------------------------- verification


def verify(found: LoadedWeights, run: Run, out: str) -> float:
    """Returns the largest difference to the source's outputs, for several images and for one.

    Raises:
        RunError: the difference is above the tolerance.
    """
    model, variables = found.network.model, found.variables
    shape = (4, *height_width(found.network.image_size), 3)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    with jax.default_matmul_precision("highest"):
        source = np.asarray(jax.jit(model.apply)(variables, images))
    different = [
        float(np.abs(np.asarray(run(images[:n])) - source[:n]).max()) for n in (len(images), 1)
    ]
    most = TOLERANCE * max(1.0, float(np.abs(source).max()))
    if not max(different) <= most:
        raise RunError(
            f"{out} differs from its source by {max(different):.1e}, more than {most:.1e}: it was "
            "not written"
        )
    return max(different)
