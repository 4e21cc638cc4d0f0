# SPDX-License-Identifier: Apache-2.0
"""Lists the parts of a network: parameters, FLOPs, bytes moved.

    tnt-flax describe tnt_s_patch16_224
    tnt-flax describe tnt_b_patch16_224 --image-size=384 --batch-size=128 \\
        --set dtype=bfloat16 vanilla_blocks=1,2,3

FLOPs are those of the matmuls and convolutions of a forward pass: two for each multiply-add (MAC).
The paper counts MACs and calls them FLOPs. Norms, softmax and biases, 0.2 %, are not counted. A
training step has about three times as many, and rematerialization adds up to one forward pass.

Bytes are the operands and results of matmuls, each read or written once; elementwise operations
between them count as fused. A part with few FLOPs per byte is limited by memory unless its matmuls
are fused into one kernel.

The table describes the whole published network. Logits need only the class token of the last block,
so fewer multiply-adds are computed: `computed_macs` in the JSON object.

The last line on stdout is one JSON object. Exit code 2 means that the input was wrong.
"""

import argparse
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr

from tnt_flax.core.trees import named_leaves
from tnt_flax.models import Network, create_model
from tnt_flax.models.tnt_blocks import WORD_KERNEL
from tnt_flax.tools.command_line import Parser, parse_settings, positive

# A parameter or matmul belongs to the first part whose pattern is found in its path.
PARTS = {
    "inner attention": "/inner/(attention|norm1)/",
    "inner MLP": "/inner/",
    "words to sentences": r"/blocks_\d+/proj/",
    "outer attention": r"/outer/(attention|norm1|reduce)/|/relative_pos",
    "outer MLP": "/outer/",
    "merging": "/(word|sentence)_merges_",
    "head": "/(norm|head)/",
    "stem": "",
}
# The reference implementations, on every platform.
PLAIN = {"inner_impl": "reference", "outer_impl": "reference"}
# Collections to capture, which makes the network compute all tokens of the last block.
WHOLE = ["intermediates"]


class Contraction(NamedTuple):
    """A matmul or convolution, over all iterations of the loops around it."""

    path: str  # names of `jax.named_scope`, outermost first
    macs: int  # multiply-adds, including zero padding of convolutions
    bytes: int  # of operands and result


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="one of tnt_flax.list_models()")
    add("--image-size", type=positive, help="pixels per side; default: from the name")
    add("--batch-size", type=positive, default=1, help="images, for activation bytes")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of the network")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the table; returns the JSON object of the last line.

    Raises:
        InputError: unknown model or field, or image size not divisible by the patch size.
    """
    model = create_model(args.model, **PLAIN | parse_fields(args.set))
    size = args.image_size or int(args.model.rpartition("_")[2])
    images = jax.ShapeDtypeStruct((args.batch_size, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    parts = sum_parts(model, variables, images)
    print(f"{args.batch_size} images, {jnp.dtype(model.dtype).name}")
    print(f"{'part':<29}{'parameters':>13}{'GFLOP':>12}{'share':>8}{'GB':>9}{'FLOP/B':>9}")
    flops = sum(part["flops"] for part in parts.values())
    for name, part in parts.items():
        print(
            f"{name:<29}{part['parameters']:>13,}{part['flops'] / 1e9:>12.3f}"
            f"{part['flops'] / flops:>8.1%}{part['bytes'] / 1e9:>9.3f}"
            f"{part['flops'] / max(1, part['bytes']):>9.1f}"
        )
    parameters = sum(part["parameters"] for part in parts.values())
    macs = flops // (2 * args.batch_size)
    computed = count_macs(model.apply, variables, images) // args.batch_size
    totals = f"{parameters:,} parameters, {macs / 1e9:.4f} GMACs an image"
    print(f"\n{args.model} at {size} pixels: {totals}")
    return dict(parameters=parameters, macs=macs, computed_macs=computed, parts=parts)


def parse_fields(settings: list[str]) -> dict[str, Any]:
    """Parses FIELD=VALUE into fields of a network."""
    fields = parse_settings(settings)
    if isinstance(blocks := fields.get("vanilla_blocks"), int):
        fields["vanilla_blocks"] = (blocks,)
    return fields


def sum_parts(model: Network, variables, images) -> dict[str, dict[str, int]]:
    """Returns the "parameters", "flops" and "bytes" of every part of the network."""
    parts = {}
    for path, x in named_leaves(variables["params"]).items():
        part = parts.setdefault(part_of(f"/{path}"), {"parameters": 0, "flops": 0, "bytes": 0})
        part["parameters"] += x.size
    whole = functools.partial(model.apply, mutable=WHOLE)
    for product in contractions(whole, variables, images):
        macs = product.macs
        if "word_embed" in product.path and not model.conv_first:
            # Published as a 7 x 7 convolution; as a matmul of patches it multiplies zeros.
            macs = macs * math.prod(WORD_KERNEL) // model.patch_size**2
        part = parts[part_of(product.path)]
        part["flops"] += 2 * macs
        part["bytes"] += product.bytes
    return parts


def part_of(path: str) -> str:
    """Returns the part of a parameter or matmul, such as "head" or "stage 1, inner MLP"."""
    name = next(name for name, pattern in PARTS.items() if re.search(pattern, path))
    stage = re.search(r"/stages_(\d+)", path)
    return f"stage {int(stage[1]) + 1}, {name}" if stage else name


# ------------------------------------------------------------------------------------ contractions


def count_macs(function: Callable[..., Any], *args: Any) -> int:
    """Returns the multiply-adds of `function`; arguments may be ShapeDtypeStructs."""
    return sum(found.macs for found in contractions(function, *args))


def contractions(function: Callable[..., Any], *args: Any) -> Iterator[Contraction]:
    """Yields the matmuls and convolutions of `function`, through scans, remats and calls.

    The body of a scan counts once per iteration, that of a `while_loop` once. Arguments may be
    ShapeDtypeStructs.
    """
    yield from _walk(jax.make_jaxpr(function)(*args).jaxpr, "", 1)


def _walk(jaxpr: Jaxpr, path: str, times: int) -> Iterator[Contraction]:
    for equation in jaxpr.eqns:
        inside = f"{path}/{equation.source_info.name_stack}/"
        if macs := _macs(equation):
            arrays = [x.aval for x in (*equation.invars, *equation.outvars)]
            size = sum(x.size * x.dtype.itemsize for x in arrays)
            yield Contraction(inside, times * macs, times * size)
        iterations = equation.params.get("length", 1)
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, Jaxpr):
                yield from _walk(inner, inside, times * iterations)


def _macs(equation) -> int:
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        per_result = (equation.invars[0].aval.shape[axis] for axis in contracted)
    elif equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_features = equation.params["dimension_numbers"].rhs_spec[0]
        per_result = (size for axis, size in enumerate(kernel) if axis != out_features)
    else:
        return 0
    return math.prod(equation.outvars[0].aval.shape) * math.prod(per_result)
