# SPDX-License-Identifier: Apache-2.0
"""Reads optimized HLO: kernels, the bytes they move, their FLOPs, and collectives.

The text is that of `jax.stages.Compiled.as_text()`. An instruction in the body of a loop is
executed once per iteration, or once if the trip count is unknown.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}  # of other dtypes, the number in the name
COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
}
# Instructions that neither read nor write arrays.
NO_KERNEL = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
WORKSPACE = re.compile(r"(?:, )?\b[su]8\[\d+\]\{0\}(?=\)$)")  # the last result of a library call
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")  # first line of a computation
INSTRUCTION = re.compile(
    r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?=, [a-z_]+=|$)(.*)$"
)
SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    shape: str  # of the result, such as "bf16[8,128]{1,0}" or "(f32[], s32[4]{0})"
    opcode: str
    operands: tuple[str, ...]  # names of instructions of the same computation
    literal: str  # the text between the parentheses
    attributes: str  # the text after them
    is_root: bool

    def called(self, attribute: str) -> str | None:
        """Returns the computation that an attribute such as `body` names, or None."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


class Kernel(NamedTuple):
    """One instruction that runs on the device."""

    name: str
    op_name: str  # the JAX operation that it is part of, or ""
    kind: str  # "fusion", "library call" or the opcode
    executions: int  # per call of the program
    bytes: int  # read and written by one execution
    flops: int  # of the matrix products of one execution


class Collectives(NamedTuple):
    """All collectives of one kind and dtype, as one device executes them."""

    kind: str
    dtype: str
    instructions: int
    in_loops: int  # how many of the instructions are in the body of a loop
    executed: int  # executions per call of the program
    bytes: int  # size of the results of all executions


def array_bytes(shape: str) -> dict[str, int]:
    """Returns the bytes of the arrays of a shape by dtype: "(f32[2], f32[])" is {"f32": 12}."""
    sizes = {}
    for dtype, dimensions in SHAPE.findall(shape):
        size = BYTES.get(dtype) or int(re.search(r"\d+", dtype)[0]) / 8
        size = math.ceil(size * math.prod(_integers(dimensions)))
        sizes[dtype] = sizes.get(dtype, 0) + size
    return sizes


def total_bytes(shape: str) -> int:
    return sum(array_bytes(shape).values())


def dimensions(shape: str) -> tuple[int, ...]:
    """Returns the dimensions of the first array of a shape."""
    return tuple(_integers(SHAPE.search(shape)[2]))


def _integers(text: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", text)]


class Program:
    """An optimized program.

    Args:
        text: `jax.stages.Compiled.as_text()`.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current = None
        for line in text.splitlines():
            if header := HEADER.match(line):
                current = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
            elif current is not None and (found := INSTRUCTION.match(line)):
                root, name, shape, opcode, literal, attributes = found.groups()
                operands = tuple(re.findall(r"%([\w.\-]+)", literal))
                current[name] = Instruction(
                    name, shape, opcode, operands, literal, attributes, bool(root)
                )

    def executed(self) -> Iterator[tuple[str, Instruction, int, bool]]:
        """Yields (computation, instruction, executions, in a loop) of what the program runs.

        The bodies of loops, all branches of conditionals and called computations are included.
        Fusions and library calls are single instructions.
        """
        yield from self._executed(self.entry, 1, False)

    def _executed(self, computation: str, times: int, in_loop: bool):
        for each in self.computations.get(computation, {}).values():
            if each.opcode == "while":
                trips = self.trip_count(computation, each)
                yield from self._executed(each.called("body"), times * trips, True)
            elif each.opcode == "call":
                yield from self._executed(each.called("to_apply"), times, in_loop)
            elif each.opcode == "async-start":
                yield from self._executed(each.called("calls"), times, in_loop)
            elif each.opcode == "conditional":
                branches = re.search(r"branch_computations=\{(.*?)\}", each.attributes)
                names = (
                    branches[1]
                    if branches
                    else " ".join(
                        re.findall(r"(?:true|false)_computation=(%?[\w.\-]+)", each.attributes)
                    )
                )
                for name in re.findall(r"%?([\w.\-]+)", names):
                    yield from self._executed(name, times, in_loop)
            else:
                yield computation, each, times, in_loop

    def trip_count(self, computation: str, loop: Instruction) -> int:
        """Returns the annotated trip count of a loop, or the bound in its condition, or 1."""
        if known := re.search(r'known_trip_count[^\d}]*"?(\d+)', loop.attributes):
            return int(known[1])
        condition = self.computations[loop.called("condition")]
        root = next(each for each in condition.values() if each.is_root)
        if root.opcode == "compare" and root.called("direction") == "LT":
            bound = condition[root.operands[1]]
            if bound.opcode == "constant" and bound.literal.isdecimal():
                return int(bound.literal)
        return 1

    def kernels(self) -> list[Kernel]:
        """Lists the kernels in the order of the text."""
        found = []
        for computation, each, times, _ in self.executed():
            if each.opcode in NO_KERNEL or each.opcode.endswith(("-done", "-update")):
                continue
            op_name = re.search(r'op_name="(.*?)"', each.attributes)
            kind = {"custom-call": "library call"}.get(each.opcode, each.opcode)
            found.append(
                Kernel(
                    name=each.name,
                    op_name=op_name[1] if op_name else "",
                    kind=kind.removesuffix("-start"),
                    executions=times,
                    bytes=self._bytes(computation, each),
                    flops=self._flops(computation, each),
                )
            )
        return found

    def _bytes(self, computation: str, kernel: Instruction) -> int:
        scope = self.computations[computation]
        if kernel.opcode == "fusion":
            return self._fusion_bytes(scope, kernel)
        if kernel.opcode == "dynamic-update-slice":  # in place: the update is read and written
            return 2 * total_bytes(scope[kernel.operands[1]].shape)
        if kernel.opcode in ("dynamic-slice", "gather"):
            return 2 * total_bytes(kernel.shape)
        operands = sum(total_bytes(scope[name].shape) for name in kernel.operands)
        if kernel.opcode.endswith("-start"):  # its result contains its operand
            return 2 * operands
        shape = kernel.shape
        if kernel.opcode == "custom-call":
            shape = WORKSPACE.sub("", shape)
        return operands + total_bytes(shape)

    def _fusion_bytes(self, scope: dict[str, Instruction], fusion: Instruction) -> int:
        """Bytes of a fusion: slices of its operands that it reads, updates that it writes."""
        body = self.computations[fusion.called("calls")]
        users: dict[str, list[Instruction]] = {name: [] for name in body}
        for each in body.values():
            for operand in each.operands:
                users[operand].append(each)
        read: dict[str, int] = {}  # by operand: a fusion may have one array as several operands
        for each in body.values():
            if each.opcode == "parameter":
                operand = _source(scope, fusion.operands[int(each.literal)])
                size = read.get(operand, 0) + _bytes_read(each, users)
                read[operand] = min(size, total_bytes(each.shape))
        root = next(each for each in body.values() if each.is_root)
        results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return sum(read.values()) + sum(_bytes_written(body, result) for result in results)

    def _flops(self, computation: str, kernel: Instruction) -> int:
        if kernel.opcode == "fusion":
            body = kernel.called("calls")
            return sum(self._flops(body, each) for each in self.computations[body].values())
        scope = self.computations[computation]
        if kernel.opcode in ("dot", "custom-call"):
            contracted = re.search(
                r'lhs_contracting_dim(?:s=|ensions":)[\[{]([\d,"]*)[\]}]', kernel.attributes
            )
            if contracted:
                left = dimensions(scope[kernel.operands[0]].shape)
                depth = math.prod(left[axis] for axis in _integers(contracted[1]))
                return 2 * math.prod(dimensions(kernel.shape)) * depth
            if "__cudnn$fmha" in kernel.attributes:
                return self._attention_flops(scope, kernel)
        if kernel.opcode == "convolution" or "__cudnn$conv" in kernel.attributes:
            weights = dimensions(scope[kernel.operands[1]].shape)
            labels = re.search(r"dim_labels=\w+_(\w+)->", kernel.attributes)[1]
            per_result = math.prod(weights) // weights[labels.index("o")]
            return 2 * math.prod(dimensions(kernel.shape)) * per_result
        return 0

    def _attention_flops(self, scope: dict[str, Instruction], kernel: Instruction) -> int:
        """FLOPs of cuDNN's attention of [batch, tokens, heads, width] arrays."""
        query, key = (dimensions(scope[name].shape) for name in kernel.operands[:2])
        products = 5 if "Backward" in kernel.attributes else 2
        return 2 * products * math.prod(query) * key[1]

    def collectives(self) -> list[Collectives]:
        """Lists the collectives by kind and dtype."""
        found = {}
        for _, each, times, in_loop in self.executed():
            # The shape of "-done" is that of the result; that of "-start" contains the operand.
            kind = each.opcode.removesuffix("-done")
            if kind not in COLLECTIVES:
                continue
            for dtype, size in array_bytes(each.shape).items():
                before = found.get((kind, dtype), Collectives(kind, dtype, 0, 0, 0, 0))
                found[kind, dtype] = Collectives(
                    kind,
                    dtype,
                    before.instructions + 1,
                    before.in_loops + in_loop,
                    before.executed + times,
                    before.bytes + times * size,
                )
        return [found[key] for key in sorted(found)]


def _source(scope: dict[str, Instruction], name: str) -> str:
    """Follows an operand through bitcasts and tuples to the instruction that makes the array."""
    while True:
        each = scope[name]
        if each.opcode == "bitcast":
            name = each.operands[0]
        elif each.opcode == "get-tuple-element" and scope[each.operands[0]].opcode == "tuple":
            index = int(re.search(r"index=(\d+)", each.attributes)[1])
            name = scope[each.operands[0]].operands[index]
        else:
            return name


def _bytes_read(parameter: Instruction, users: dict[str, list[Instruction]]) -> int:
    """Bytes of a fusion's parameter that the fusion reads."""
    total, pending, seen = 0, [parameter], set()
    while pending:
        source = pending.pop()
        for user in users[source.name]:
            first = user.operands[0] == source.name
            if user.opcode == "bitcast":
                pending.append(user)
            elif user.opcode in ("dynamic-slice", "gather", "slice") and first:
                if user.name not in seen:
                    total += total_bytes(user.shape)
                    seen.add(user.name)
            elif not (user.opcode == "dynamic-update-slice" and first):  # updated in place
                return total_bytes(parameter.shape)
    return min(total, total_bytes(parameter.shape))


def _bytes_written(body: dict[str, Instruction], result: Instruction) -> int:
    """Bytes of a fusion's result that the fusion writes."""
    result = body[_source(body, result.name)]
    if result.opcode == "dynamic-update-slice":
        return total_bytes(body[result.operands[1]].shape)
    return total_bytes(result.shape)
