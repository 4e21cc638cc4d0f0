# SPDX-License-Identifier: Apache-2.0
"""Exports a network with its weights, for use without tnt_flax.

    tnt-flax export tnt_s_81.5.pth.tar tnt_s.stablehlo --dtype=bfloat16
    tnt-flax export runs/digits digits.onnx --layout=nchw --outputs=logits,features
    tnt-flax export runs/digits digits.onnx --int8 --config=digits
    tnt-flax export runs/digits --push=OWNER/NAME --license=apache-2.0

OUT.stablehlo is for JAX (`tnt_flax.load_exported`, for 180 days), OUT.onnx for ONNX Runtime, and
folders for timm and the Hugging Face hub. The outputs are compared with the source's. The last line
on stdout is one JSON object. Exit code 1: not written, not pushed or different; 2: wrong input.
"""

import argparse
import contextlib
import logging
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tnt_flax.core.errors import InputError, RunError, as_run_error, did_you_mean
from tnt_flax.core.files import atomic_path
from tnt_flax.data.transforms import height_width
from tnt_flax.inference.preprocess import check_images
from tnt_flax.inference.stablehlo import load_exported, save_exported, trace
from tnt_flax.models import block_outputs
from tnt_flax.runtime import host
from tnt_flax.tools import export_onnx
from tnt_flax.tools.command_line import Parser, read_weights
from tnt_flax.training.step import cast_kernels
from tnt_flax.weights import publish, write
from tnt_flax.weights.read import LoadedWeights, read_checkpoint

logger = logging.getLogger(__name__)
PLATFORMS = ("cpu", "cuda", "tpu")
# Largest difference to the source, relative to max(1, its largest value).
TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1, "int8": 0.25}
BLOCK_OUTPUTS = ("outer_attention", "inner_attention", "sentences", "words")
OUTPUTS = ("logits", "features", *BLOCK_OUTPUTS)
LAYOUTS = ("nhwc", "nchw")
Program = Callable[[Any], dict[str, jax.Array]]
Run = Callable[[np.ndarray], dict[str, np.ndarray]]  # of images in the layout of the export


def add_arguments(parser: Parser) -> None:
    parser.add_weights()
    parser.add_config(required=False)
    add = parser.add_argument
    text = "FILE.stablehlo, FILE.onnx, or a folder; not needed with --push"
    add("out", metavar="OUT", type=pathlib.Path, nargs="?", help=text)
    names = ",".join(OUTPUTS)
    add("--outputs", metavar="NAMES", type=_outputs, help=f"{names} (default: logits)")
    text = "of the images: nhwc (default), as in JAX, or nchw, as in torch"
    add("--layout", choices=LAYOUTS, help=text)
    text = "of the computation and of most weights; default float32"
    add("--dtype", choices=[*TOLERANCE][:3], help=text)
    first, last = export_onnx.OPSETS[0], export_onnx.OPSETS[-1]
    text = f"of the .onnx file, {first} to {last}; default {export_onnx.OPSET}"
    add("--opset", metavar="N", type=_opset, help=text)
    add("--int8", action="store_true", help="quantize the .onnx file")
    add("--push", metavar="OWNER/NAME", help="upload the folder to the Hugging Face hub")
    add("--private", action="store_true", help="push to a private repository")
    text = "for the model card; default that of the source's card"
    add("--license", metavar="ID", help=text)


def _outputs(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in OUTPUTS:
            known = ", ".join(OUTPUTS)
            hint = did_you_mean(name, OUTPUTS)
            raise argparse.ArgumentTypeError(f"{name!r} is none of {known}{hint}")
    return names


def _opset(text: str) -> int:
    opsets = export_onnx.OPSETS
    if not text.isdecimal() or int(text) not in opsets:
        raise argparse.ArgumentTypeError(f"{text!r} is outside {opsets[0]} to {opsets[-1]}")
    return int(text)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes and verifies the export; returns the JSON object of the last line.

    Raises:
        InputError: the weights, OUT or an option is wrong, a package is missing, or timm has no
            such network.
        RunError: the export cannot be written or pushed, or its outputs differ from the source's.
    """
    file_format = _check(args)
    host.cache_compilations()
    found = read_weights(args)
    check_images(found)
    logger.info(f"exporting {found.summary()}")
    args.outputs = args.outputs or default_outputs(found)
    with _destination(args) as out:
        with as_run_error(f"cannot write {out}"), atomic_path(out) as temporary:
            exported = FORMATS[file_format].write(found, temporary, args)
            difference = verify(found, exported, str(out), args)
            metrics = evaluate(found, exported, args) if args.config else None
            if file_format == "timm":
                write_card(found, temporary, args, metrics)
        result = {
            "path": str(args.out) if args.out else None,
            "format": file_format,
            "bytes": sum(x.stat().st_size for x in (out, *out.glob("*")) if x.is_file()),
            "max_abs_difference": difference,
            "parameters": found.num_params,
        }
        if args.push:
            commit = publish.upload(out, args.push, private=args.private)
            result["pushed"] = f"hf://{args.push}@{commit}"
    return result | ({"evaluation": metrics} if metrics else {})


def _check(args: argparse.Namespace) -> str:
    """Returns the format; raises InputError for what can be refused before the weights are read."""
    out = args.out
    if out is None and not args.push:
        raise InputError("give OUT: FILE.stablehlo, FILE.onnx or a folder, or --push=OWNER/NAME")
    file_format = (out.suffix.lower().removeprefix(".") if out else "") or "timm"
    if file_format not in FORMATS:
        raise InputError(f"{out}: give FILE.stablehlo, FILE.onnx, or a folder without an ending")
    for option in {name for each in FORMATS.values() for name in each.options}:
        if getattr(args, option) and option not in FORMATS[file_format].options:
            known = [each.what for each in FORMATS.values() if option in each.options]
            raise InputError(f"--{option} is for {' and '.join(known)}, not for {out or '--push'}")
    if file_format == "onnx" and args.dtype == "bfloat16":
        raise InputError(
            "--dtype=bfloat16: ONNX Runtime does not run it on CPUs, so that the export could not "
            "be verified; use float16"
        )
    if args.int8 and args.dtype:
        raise InputError("--int8 and --dtype cannot be combined")
    if args.private and not args.push:
        raise InputError("--private is for --push")
    if args.config and args.outputs and "logits" not in args.outputs:
        raise InputError("--config evaluates the logits, which are not among --outputs")
    if args.license:
        publish.check_license(args.license)
    if args.push:
        publish.check_upload(args.push)
    if out and out.exists():
        raise InputError(f"{out} exists already: remove it, or choose another name")
    if out and not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent}")
    return file_format


@contextlib.contextmanager
def _destination(args: argparse.Namespace) -> Iterator[pathlib.Path]:
    """Yields OUT, or a temporary folder."""
    if args.out is not None:
        yield args.out
        return
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder) / "folder"


# ------------------------------------------------------------------------------------- formats


def to_stablehlo(found: LoadedWeights, path: pathlib.Path, args: argparse.Namespace) -> Run:
    function = make_program(found, args)
    if len(args.outputs) == 1 and args.outputs[0] not in BLOCK_OUTPUTS:
        named = function
        function = lambda images: named(images)[args.outputs[0]]
    info = _info(found, args)
    save_exported(path, trace(function, image_shape(found, args), PLATFORMS), info)
    loaded = load_exported(path)

    def run(images):
        results = loaded(images)
        return results if isinstance(results, dict) else {args.outputs[0]: results}

    return run


def to_onnx(found: LoadedWeights, path: pathlib.Path, args: argparse.Namespace) -> Run:
    export_onnx.write(
        path,
        make_program(found, args, dtype="float32"),  # export_onnx converts to float16
        image_shape(found, args),
        _info(found, args),
        name=found.name or "tnt",
        opset=args.opset or export_onnx.OPSET,
        dtype=args.dtype or "float32",
        int8=args.int8,
    )
    return export_onnx.load(path)


def to_timm(found: LoadedWeights, path: pathlib.Path, args: argparse.Namespace) -> Run:
    publish.write_folder(path, write.to_framework(found, "timm"), found)
    written = read_checkpoint(path)
    return jax.jit(make_program(written, args, portable=False))


class Format(NamedTuple):
    write: Callable[[LoadedWeights, pathlib.Path, argparse.Namespace], Run]
    what: str
    options: Sequence[str]  # that other formats lack


_FILES = ("outputs", "layout", "dtype")
FORMATS = {
    "stablehlo": Format(to_stablehlo, "FILE.stablehlo", _FILES),
    "onnx": Format(to_onnx, "FILE.onnx", (*_FILES, "opset", "int8")),
    "timm": Format(to_timm, "folders", ("push", "private", "license")),
}


def default_outputs(found: LoadedWeights) -> tuple[str, ...]:
    return ("logits",) if found.network.model.num_classes else ("features",)


def make_program(
    found: LoadedWeights,
    args: argparse.Namespace,
    *,
    dtype: str | None = None,
    portable: bool = True,
) -> Program:
    """Returns `program(images) -> {name: array}`, in evaluation mode.

    Args:
        found: the weights.
        args: `outputs` of OUTPUTS. `features` is the head's input [B, D]. An output of the blocks,
            see `models.block_outputs`, is one array per block: `outer_attention_0`, ... `layout` is
            that of the normalized float32 images: [B, H, W, 3] or [B, 3, H, W].
        dtype: of the computation and of the stored kernels, by default that of `args`; norms,
            softmax, positions and the outputs are float32.
        portable: use the reference implementations in a loop; the others, and the layouts of
            unrolled blocks, are for one platform.

    Raises:
        InputError: logits of a network without head.
    """
    outputs, dtype = args.outputs, jnp.dtype(dtype or args.dtype or "float32")
    if "logits" in outputs and not found.network.model.num_classes:
        raise InputError(f"{found.path} has no head: --outputs=logits is not possible")
    reference = dict(inner_impl="reference", outer_impl="reference", remat="none", unroll=False)
    model = found.network.model.clone(dtype=dtype, **(reference if portable else {}))
    # Stored as the network would cast them.
    variables = cast_kernels(jax.device_get(found.variables), dtype)
    of_blocks = [name for name in outputs if name in BLOCK_OUTPUTS]

    def program(images):
        if args.layout == "nchw":
            images = images.transpose(0, 2, 3, 1)
        results: dict[str, Any] = {}

        def keep(call, inputs, kwargs, context):
            out = call(*inputs, **kwargs)
            if context.method_name != "__call__":
                return out
            if context.module.path == ("head",):
                results["features"] = inputs[0].astype(jnp.float32)
            elif not context.module.path:
                results[default_outputs(found)[0]] = out
            return out

        with nn.intercept_methods(keep):
            if of_blocks:
                for i, block in enumerate(block_outputs(model, variables, images)):
                    results |= {f"{name}_{i}": block[name] for name in of_blocks if name in block}
            else:
                model.apply(variables, images)
        return {k: x for k, x in results.items() if k in outputs or k.rpartition("_")[0] in outputs}

    return program


def image_shape(found: LoadedWeights, args: argparse.Namespace) -> tuple[int, int, int]:
    height, width = height_width(found.network.image_size)
    return (3, height, width) if args.layout == "nchw" else (height, width, 3)


def _info(found: LoadedWeights, args: argparse.Namespace) -> dict[str, Any]:
    dtype = "int8" if args.int8 else args.dtype or "float32"
    return write.facts(found) | {"layout": args.layout or "nhwc", "dtype": dtype}


def write_card(
    found: LoadedWeights, folder: pathlib.Path, args: argparse.Namespace, metrics: Any
) -> None:
    """Writes the model card. The evaluation is that of this export, else that of the run."""
    config, ours = found.info.get("config") or {}, args.license
    data = args.config.data if metrics else config.get("data") or {}
    if not metrics and config.get("eval", {}).get("weights") == found.weights:
        from tnt_flax.runtime.checkpoints import read_metrics  # slow: imports Orbax

        metrics = read_metrics(pathlib.Path(found.path))
    stated = publish.Statements(
        license=ours or publish.license_of(found.path),
        licensed_by="whoever exported them" if ours else "the model card of the weights' source",
        data=publish.data_name(data, data["eval_split"]) if metrics else None,
        metrics=metrics or None,
        repo=args.push,
    )
    publish.write_card(folder, write.to_framework(found, "timm"), found, stated)


# -------------------------------------------------------------------- verification, evaluation


def verify(found: LoadedWeights, run: Run, out: str, args: argparse.Namespace) -> float:
    """Returns the largest difference to the source's outputs, for several images and for one.

    Raises:
        RunError: the difference of an output is above the tolerance.
    """
    source = make_program(found, args, dtype="float32", portable=False)
    images = np.random.default_rng(0).standard_normal((4, *image_shape(found, args)), np.float32)
    with jax.default_matmul_precision("highest"):
        expected = jax.device_get(jax.jit(source)(images))
    tolerance = TOLERANCE["int8" if args.int8 else args.dtype or "float32"]
    different = dict.fromkeys(expected, 0.0)
    for count in (len(images), 1):
        outputs = run(images[:count])
        for name, x in expected.items():
            difference = float(np.abs(np.asarray(outputs[name]) - x[:count]).max())
            most = tolerance * max(1.0, float(np.abs(x).max()))
            if not difference <= most:
                raise RunError(
                    f"{out} differs from its source by {difference:.1e} in the {name}, more than "
                    f"{most:.1e}: it was not written"
                )
            different[name] = max(different[name], difference)
    return max(different.values())


class _Exported(NamedTuple):
    """An export in the place of a network, for `training.evaluate`."""

    run: Run
    layout: str | None
    num_classes: int

    def apply(self, variables: Any, images: jax.Array, *, train: bool) -> jax.Array:
        del variables, train
        pixels = np.asarray(images)
        pixels = pixels.transpose(0, 3, 1, 2) if self.layout == "nchw" else pixels
        return jnp.asarray(self.run(pixels)["logits"])


def evaluate(found: LoadedWeights, run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates the export on the evaluation split of --config; returns the metrics.

    Images are prepared as the weights state, not as the config does.

    Raises:
        InputError: the data cannot be read, their classes are not those of the network, or their
            images have several classes.
    """
    from tnt_flax.data.sources import stores_several_labels
    from tnt_flax.training import evaluate as evaluation
    from tnt_flax.training.experiment import Experiment

    config, classes = args.config, found.network.model.num_classes
    with config.ignore_type(), config.unlocked():
        config.data.image_size = found.network.image_size
        config.data.update({k: found.preprocessing[k] for k in ("mean", "std", "crop_fraction")})
    experiment = Experiment(config, weights=found.path)
    source = evaluation.open_labeled_source(experiment)
    if stores_several_labels(source):
        raise InputError("--config has images of several classes: evaluate with `tnt-flax eval`")
    batches, allowed = evaluation.labeled_batches(experiment, source, found)
    network = _Exported(run, args.layout, classes)
    eval_step = experiment.make_eval_step(network, classes=allowed)
    return evaluation.evaluate(eval_step, {}, batches, experiment.mesh)[0]
