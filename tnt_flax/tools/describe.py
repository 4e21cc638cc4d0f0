# SPDX-License-Identifier: Apache-2.0
"""Lists the layers of a network: parameters, multiply-adds, bytes moved.

    python -m tnt_flax.tools.describe tnt_s_patch16_224
    python -m tnt_flax.tools.describe tnt_b_patch16_224 --image-size=384 --batch-size=128 \\
        --set dtype=bfloat16 vanilla_blocks=1,2,3

The tables describe the whole published network. Logits need only the class token of the last block,
so fewer multiply-adds are computed: `computed_macs` in the JSON object.

Multiply-adds (MACs) are those of matmuls and convolutions, which the paper calls FLOPs; one MAC is
two FLOPs. Norms, softmax and biases, 0.2 %, are not counted.

The second table gives FLOPs and bytes of each part. Bytes are the operands and results of matmuls,
each read or written once; elementwise operations between them count as fused. A part with few FLOPs
per byte is limited by memory unless its matmuls are fused into one kernel. A training step is the
forward pass, the backward pass, and rematerialization.

The last line on stdout is one JSON object. Exit code 2 means that the input was wrong.
"""

import functools
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import named_leaves
from tnt_flax.models import Network, create_model
from tnt_flax.models.tnt_blocks import WORD_KERNEL, TNTBlock
from tnt_flax.tools.command_line import Parser, parse_settings, run

# The part of a layer is the first one whose pattern matches the beginning of its path.
PARTS = {
    "inner attention": "block/inner/(attention|norm1)",
    "inner MLP": "block/inner/",
    "words to sentences": "block/proj/",
    "outer attention": r"block/outer/(attention|norm1|reduce)|stages_\d+$",
    "outer MLP": "block/outer/",
    "merging": "(word|sentence)_merges",
    "head": "norm|head",
    "stem": "",
}
# The reference implementations, on every platform.
PLAIN = {"inner_impl": "reference", "outer_impl": "reference"}
# Collections to capture, which makes the network compute all tokens of the last block.
WHOLE = ["intermediates"]


BLOCKS = r"^(stages_\d+/)?blocks_\d+\b"  # prefix of the path of a block or a stack of blocks


class Layer(NamedTuple):
    """A row of the first table."""

    path: str
    shape: tuple[int, ...] | None  # of the output for one image; None for an array
    parameters: int
    macs: int  # for one image
    weight_bytes: int
    activation_bytes: int  # read and written by its matmuls, whole batch


class Group(NamedTuple):
    """Layers outside of blocks, or equal blocks; `layers` are those of one block."""

    blocks: tuple[int, ...]  # block numbers; empty outside of blocks
    layers: tuple[Layer, ...]

    def sum(self, field: str) -> int:
        return max(1, len(self.blocks)) * sum(getattr(layer, field) for layer in self.layers)


class Contraction(NamedTuple):
    """A matmul or convolution, over all iterations of the loops around it."""

    scope: tuple[str, ...]  # of `jax.named_scope`, outermost first
    macs: int  # multiply-adds, including zero padding of convolutions
    weight_bytes: int  # of operands that depend on parameters only
    activation_bytes: int  # of other operands and the result


def make_parser() -> Parser:
    parser = Parser("python -m tnt_flax.tools.describe", __doc__)
    add = parser.add_argument
    add("model", help="one of tnt_flax.list_models()")
    add("--image-size", type=int, help="pixels per side; default: from the name")
    add("--batch-size", type=int, default=1, help="images, for activation bytes")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of the network")
    return parser


def main(argv: list[str] | None = None) -> int:
    def command(args):
        return describe(args.model, args.image_size, args.batch_size, parse_fields(args.set))

    return run(make_parser(), command, argv)


def parse_fields(settings: list[str]) -> dict[str, Any]:
    """Parses FIELD=VALUE into fields of a network."""
    fields = parse_settings(settings)
    if isinstance(blocks := fields.get("vanilla_blocks"), int):
        fields["vanilla_blocks"] = (blocks,)
    return fields


def describe(
    name: str, image_size: int | None, batch_size: int, fields: dict[str, Any]
) -> dict[str, Any]:
    """Prints both tables; returns the JSON object of the last line.

    Raises:
        InputError: unknown model or field, or image size not divisible by the patch size.
    """
    model = create_model(name, **PLAIN | fields)
    size = int(name.rpartition("_")[2]) if image_size is None else image_size
    if batch_size < 1 or size < 1:
        raise InputError(f"--batch-size={batch_size} --image-size={size}: both must be at least 1")
    images = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    forward, step = traced_products(model, variables, images)
    shapes = output_shapes(model, variables, images)
    groups = group_layers(
        model, list_layers(model, variables["params"], shapes, forward, batch_size)
    )
    print_layers(groups, f"{batch_size} images, {jnp.dtype(model.dtype).name}")
    parts = sum_parts(groups)
    add_products(parts, "forward", forward, shapes)
    add_products(parts, "step", step, shapes)
    print_parts(parts)
    parameters = sum(group.sum("parameters") for group in groups)
    macs = sum(group.sum("macs") for group in groups)
    print(f"{name} at {size} pixels: {parameters:,} parameters, {macs / 1e9:.4f} GMACs an image")
    computed = count_macs(model.apply, variables, images) // batch_size
    return dict(parameters=parameters, macs=macs, computed_macs=computed, parts=parts)


def traced_products(
    model: Network, variables, images
) -> tuple[list[Contraction], list[Contraction]]:
    """Returns the matmuls of a forward pass, and of loss and gradient in training."""
    rngs = {"dropout": jax.random.key(0)}

    def predict(variables, images):
        return model.apply(variables, images, mutable=WHOLE)

    def train(variables, images):
        def loss(params):
            whole = dict(train=True, rngs=rngs, mutable=[*WHOLE, "batch_stats"])
            return model.apply({**variables, "params": params}, images, **whole)[0].sum()

        return jax.value_and_grad(loss)(variables["params"])

    def as_published(product):
        """Counts the stem as a 7 x 7 convolution; as a matmul of patches it multiplies zeros."""
        if "word_embed" not in product.scope or model.conv_first:
            return product
        return product._replace(macs=product.macs * math.prod(WORD_KERNEL) // model.patch_size**2)

    data = [False] * len(jax.tree.leaves(variables)) + [True]
    return tuple(
        list(map(as_published, contractions(jax.make_jaxpr(function)(variables, images), data)))
        for function in (predict, train)
    )


def output_shapes(model: Network, variables, images) -> dict[str, tuple[int, ...] | None]:
    """Returns the output shape of every module for one image, by path, in calling order.

    It is None if the output is not one array. The path of the network itself is "".
    """
    shapes, root, caller = {}, (), ()

    def watch(call, args, kwargs, context):
        nonlocal root, caller
        outside, module = (root, caller), context.module
        if isinstance(module, TNTBlock):  # its submodules' paths do not contain it
            root = (*caller, module.name)
        caller = (*root, *module.path)
        path = "/".join(caller)
        shapes.setdefault(path, None)  # before the modules that it calls
        output = call(*args, **kwargs)
        root, caller = outside
        if context.method_name == "__call__" and not isinstance(output, tuple):
            per_image = output.shape[0] // images.shape[0]  # patches may be on the batch axis
            shapes[path] = (per_image,) * (per_image > 1) + output.shape[1:]
        return output

    with nn.intercept_methods(watch):
        apply = functools.partial(model.apply, mutable=WHOLE)
        jax.eval_shape(apply, variables, images)
    return shapes


def list_layers(
    model: Network, params, shapes, products: list[Contraction], batch_size: int
) -> list[Layer]:
    """Returns every module with own parameters or matmuls; blocks are summed over their stack."""
    arrays = named_leaves(params)
    own = [path for path in arrays if "/" not in path]  # of the network itself
    costs = {path: [0, 0, 0] for path in [*own, *shapes]}
    for path, x in arrays.items():
        costs[path.rpartition("/")[0] or path][0] += x.size
    for product in products:
        row = costs[path_of(product, shapes)]
        row[1] += product.macs // batch_size
        row[2] += product.activation_bytes
    itemsize = jnp.dtype(model.dtype).itemsize
    return [
        Layer(path, shapes.get(path), size, macs, size * itemsize, activations)
        for path, (size, macs, activations) in costs.items()
        if size or macs
    ]


def path_of(product: Contraction, shapes) -> str:
    """Returns the deepest module in the name scope, to which transformations add names."""
    path = ""
    for name in product.scope:
        longer = f"{path}/{name}".lstrip("/")
        path = longer if longer in shapes else path
    return path


def group_layers(model: Network, layers: list[Layer]) -> list[Group]:
    """Groups consecutive layers outside of blocks, and equal blocks."""
    numbers, first = {}, 0
    for path, length in model.stacks():
        numbers["/".join(path)] = tuple(range(first, first + length))
        first += length
    groups = {}
    stack_of = lambda path: (re.match(BLOCKS, path) or [""])[0]
    of_group = lambda layer: numbers.get(stack_of(layer.path), ())
    for blocks, rows in itertools.groupby(layers, of_group):
        each = max(1, len(blocks))
        kind = tuple(
            Layer(within(path), shape, *(n // each for n in counts))
            for path, shape, *counts in rows
        )
        groups[kind] = groups.get(kind, ()) + blocks
    return [Group(blocks, kind) for kind, blocks in groups.items()]


def within(path: str) -> str:
    """Replaces the block number: "blocks_3/outer/fc1" becomes "block/outer/fc1"."""
    return re.sub(BLOCKS, "block", path)


def part_of(path: str) -> str:
    return next(name for name, start in PARTS.items() if re.match(start, within(path)))


def sum_parts(groups: list[Group]) -> dict[str, dict[str, Any]]:
    parts = {name: {"parameters": 0, "macs": 0} for name in PARTS}
    for group in groups:
        for layer in group.layers:
            one = Group(group.blocks, (layer,))
            for field, value in parts[part_of(layer.path)].items():
                parts[part_of(layer.path)][field] = value + one.sum(field)
    return {name: part for name, part in parts.items() if any(part.values())}


def add_products(parts, name: str, products: list[Contraction], shapes) -> None:
    """Adds FLOPs and bytes of `products` for the whole batch to `parts`, under `name`."""
    for part in parts.values():
        part[name] = {"flops": 0, "bytes": 0}
    for product in products:
        cost = parts[part_of(path_of(product, shapes))][name]
        cost["flops"] += 2 * product.macs
        cost["bytes"] += product.weight_bytes + product.activation_bytes


def print_layers(groups: list[Group], what: str) -> None:
    print(f"{'layer':<28}{'output':>16}{'parameters':>13}{'MMACs':>10}{'weights':>10}{'data':>12}")
    print(f"{what:<44}{'':>13}{'an image':>10}{'MB':>10}{'MB':>12}")
    for group in groups:
        indent = ""
        if group.blocks:
            indent = "  "
            print_row(f"{blocks_text(group.blocks)}, each:", None, group)
        for layer in group.layers:
            shape = None if layer.shape is None else "x".join(map(str, layer.shape))
            path = layer.path.removeprefix("block/")
            print_row(indent + path, shape, Group((), (layer,)))
    print()


def print_row(title: str, shape: str | None, group: Group) -> None:
    megabytes = (group.sum(field) / 1e6 for field in ("weight_bytes", "activation_bytes"))
    counts = f"{group.sum('parameters'):>13,}{group.sum('macs') / 1e6:>10.2f}"
    print(f"{title:<28}{shape or '':>16}{counts}" + "{:>10.3f}{:>12.3f}".format(*megabytes))


def blocks_text(blocks: tuple[int, ...]) -> str:
    """Formats block numbers: "x12 block 0-11" or "x2 block 0,4"."""
    ends = (
        sorted(n for n in blocks if n - 1 not in blocks),
        sorted(n for n in blocks if n + 1 not in blocks),
    )
    runs = [f"{a}-{b}" if a < b else f"{a}" for a, b in zip(*ends, strict=True)]
    return f"x{len(blocks)} block {','.join(runs)}"


def print_parts(parts: dict[str, dict[str, Any]]) -> None:
    print(f"{'part':<20}{'forward GFLOP':>15}{'GB':>9}{'FLOP/B':>8}", end="")
    print(f"{'step GFLOP':>14}{'GB':>9}{'FLOP/B':>8}{'of step':>9}")
    total = sum(part["step"]["flops"] for part in parts.values())
    for name, part in parts.items():
        line = f"{name:<20}"
        for kind, widths in (("forward", 15), ("step", 14)):
            flops, size = part[kind]["flops"], part[kind]["bytes"]
            line += f"{flops / 1e9:>{widths}.3f}{size / 1e9:>9.3f}{flops / max(1, size):>8.1f}"
        print(f"{line}{part['step']['flops'] / total:>9.1%}")
    print()


# ------------------------------------------------------------------------------------ contractions


def contractions(jaxpr: ClosedJaxpr, data: Sequence[bool]) -> Iterator[Contraction]:
    """Yields the matmuls and convolutions of a jaxpr, through scans, remats and calls.

    The body of a scan counts once per iteration, that of a `while_loop` once.

    Args:
        jaxpr: a traced function.
        data: for each argument, whether it is data rather than parameters.
    """
    yield from _walk(jaxpr.jaxpr, data, (), 1)


def count_macs(function: Callable[..., Any], *args: Any) -> int:
    """Returns the multiply-adds of `function`; arguments may be ShapeDtypeStructs."""
    jaxpr = jax.make_jaxpr(function)(*args)
    return sum(found.macs for found in contractions(jaxpr, [True] * len(jaxpr.in_avals)))


def _walk(jaxpr: Jaxpr, data, scope, times):
    from_data = {var for var, flag in zip(jaxpr.invars, data, strict=True) if flag}
    for equation in jaxpr.eqns:
        flags = [not isinstance(x, Literal) and x in from_data for x in equation.invars]
        if any(flags):
            from_data.update(equation.outvars)
        inside = (*scope, *str(equation.source_info.name_stack).split("/"))
        macs = _macs(equation)
        if macs:
            sizes = [times * _bytes(x) for x in equation.invars]
            weights = sum(size for size, flag in zip(sizes, flags, strict=True) if not flag)
            results = sum(times * _bytes(x) for x in equation.outvars)
            yield Contraction(inside, times * macs, weights, sum(sizes) - weights + results)
        turns = times * equation.params.get("length", 1)
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, Jaxpr):
                # If arguments do not match one to one, any may come from data.
                same = len(inner.invars) == len(flags)
                inner_data = flags if same else [True] * len(inner.invars)
                yield from _walk(inner, inner_data, inside, turns)


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


def _bytes(x) -> int:
    return x.aval.size * x.aval.dtype.itemsize


if __name__ == "__main__":
    sys.exit(main())
