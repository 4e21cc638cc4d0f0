# SPDX-License-Identifier: Apache-2.0
"""Writes ONNX models: a program by jax2onnx, in float16 or int8 by ONNX Runtime's own tools."""

import contextlib
import functools
import json
import logging
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tnt_flax.core.errors import InputError, one_line

OPSETS = range(16, 27)  # tested; below 16, jax2onnx writes attributes that those opsets lack
OPSET = 23
PACKAGES = (
    'pip install "tnt_flax[onnx]" and then pip install --no-deps jax2onnx==0.17.1, whose own '
    "requirements pin an Orbax that it does not use and that is too old for this package"
)
# What stays float32 in a float16 model: LayerNorm and softmax, and what ONNX Runtime cannot run.
FLOAT32_OPS = ("AveragePool", "Div", "ReduceSum", "ReduceSumSquare", "ScatterND", "Softmax", "Sqrt")


def write(
    path: pathlib.Path,
    program: Callable[[Any], Mapping[str, jax.Array]],
    image_shape: Sequence[int],
    metadata: Mapping[str, Any],
    *,
    name: str,
    opset: int = OPSET,
    dtype: str = "float32",
    int8: bool = False,
) -> None:
    """Writes a model of normalized float32 images, with outputs named as those of `program`.

    Args:
        path: the file.
        program: a function of images [B, *image_shape].
        image_shape: without the batch size, which is symbolic.
        metadata: JSON values to store.
        name: of the model.
        opset: one of OPSETS.
        dtype: "float32" or "float16", of most computations and of the weights.
        int8: quantize weights to int8, and activations while the model runs (dynamic).

    Raises:
        InputError: a package is missing.
    """
    with _packages():
        import jax2onnx
        import onnx

        shape = ("batch", *image_shape)
        symbolic = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
        names = list(jax.eval_shape(program, symbolic))
        convert = functools.partial(
            jax2onnx.to_onnx,
            lambda images: tuple(map(program(images).get, names)),
            inputs=[shape],
            input_names=["images"],
            output_names=names,
            model_name=name,
            opset=opset,
        )
        model = _unrolled(convert)
        model = _with_constants(model)
        if int8:
            model = _quantized(model)
        elif dtype == "float16":
            model = _half(model)
        for key, value in metadata.items():
            entry = model.metadata_props.add()
            entry.key, entry.value = key, json.dumps(value)
        onnx.checker.check_model(model)
        onnx.save(model, str(path))


def load(path: pathlib.Path) -> Callable[[Any], dict[str, np.ndarray]]:
    """Returns a function from images to the outputs by name, run by ONNX Runtime on the CPU."""
    with _packages():
        session = _session(str(path))
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(
        zip(names, session.run(names, {"images": np.asarray(images)}), strict=True)
    )


@contextlib.contextmanager
def _packages() -> Iterator[None]:
    """Reports missing packages, and silences warnings about plugins and shapes."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    except ImportError as error:
        raise InputError(f"{one_line(error)}: {PACKAGES}") from error
    finally:
        logging.disable(previous)


def _session(model: str, **options: Any) -> Any:
    import onnxruntime

    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 3  # errors
    for key, value in options.items():
        setattr(session_options, key, value)
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model, session_options, providers=providers)


def _unrolled(convert: Callable[[], Any]) -> Any:
    """Converts without loops over blocks.

    A loop would keep the stacked weights twice, and hide them from the tools below.
    """
    try:
        with jax.disable_jit():
            return convert()
    except ValueError as error:  # JAX cannot unroll the empty loop before a single block
        if "zero-length scan" not in str(error):
            raise
        return convert()


def _with_constants(model: Any) -> Any:
    """Evaluates what does not depend on images; products with weights become MatMul nodes."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/source.onnx", f"{folder}/target.onnx"
        onnx.save(model, source)
        level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # standard operators only
        _session(source, optimized_model_filepath=target, graph_optimization_level=level)
        model = onnx.load(target)
    matrices = {x.name for x in model.graph.initializer if len(x.dims) == 2}
    for node in model.graph.node:
        # The network has no other products with a matrix of weights: [..., i] times [i, o].
        if node.op_type == "Einsum" and node.input[1] in matrices:
            node.op_type = "MatMul"
            del node.attribute[:]
    return model


def _quantized(model: Any) -> Any:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/int8.onnx"
        quantize_dynamic(
            model, target, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8
        )
        return onnx.load(target)


def _half(model: Any) -> Any:
    from onnxruntime.transformers import float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    keep = [*float16.DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPS]
    converted = OnnxModel(
        float16.convert_float_to_float16(model, keep_io_types=True, op_block_list=keep)
    )
    converted.topological_sort()
    return converted.model
