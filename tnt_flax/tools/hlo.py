# SPDX-License-Identifier: Apache-2.0
"""What a compiled program would do, read off its optimized HLO: what runs, how often, at what cost.

The text is `jax.stages.Compiled.as_text()`. An instruction in the body of a loop counts as often as
the loop turns; where the text does not say how often that is, once. All branches of a conditional
count.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
# Computations that an instruction runs; `to_apply` is left out: of an element, not of an array.
CALLED = re.compile(r"\b(?:calls=(%?[\w.\-]+)|branch_computations=\{([^}]*)\})")


class Instruction(NamedTuple):
    name: str
    shape: str  # "f32[8,128]{1,0}", or several of them in parentheses
    opcode: str
    text: str  # the whole line
    times: int  # that it runs
    fused: bool  # inside another instruction, whose cost includes its own

    @property
    def is_kernel(self) -> bool:
        """Is it one written in Pallas?"""
        return 'custom_call_target="tpu_custom_call"' in self.text


class Collectives(NamedTuple):
    """All the exchanges of one kind and type between devices, as one device sees them."""

    kind: str
    dtype: str
    instructions: int
    in_loops: int  # how many of these are in the body of a loop
    executed: int
    bytes: int  # of the results, over all executions


def instructions(text: str) -> Iterator[Instruction]:
    """All that `text` runs, from its entry on."""
    computations, entry = {}, None
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif INSTRUCTION.match(line):
            lines.append(line)
    return _run(computations, entry, 1, False)


def _run(computations, name, times, fused):
    for line in computations[name]:
        called_as, shape, opcode = INSTRUCTION.match(line).groups()
        yield Instruction(called_as, shape, opcode, line, times, fused)
        if opcode == "while":
            body = re.search(r"body=%?([\w.\-]+)", line)[1]
            yield from _run(computations, body, times * _turns(computations, line), fused)
        elif called := CALLED.search(line):
            inside = fused or opcode not in ("call", "conditional")
            for each in (called[1] or called[2]).split(", "):
                yield from _run(computations, each.lstrip("%"), times, inside)


def _turns(computations, line):
    """Of the loop `line`: what its annotation says, or the constant that it counts up to."""
    if known := re.search(r'known_trip_count[^\d}]*"?(\d+)', line):
        return int(known[1])
    condition = computations[re.search(r"condition=%?([\w.\-]+)", line)[1]]
    root = next(text for text in condition if text.lstrip().startswith("ROOT"))
    if bound := re.search(r" compare\(.*, %?([\w.\-]+)\), direction=LT", root):
        for text in condition:
            if found := re.match(rf"\s+%?{re.escape(bound[1])} = .* constant\((\d+)\)", text):
                return int(found[1])
    return 1


def estimated_cycles(text: str) -> int:
    """The sum of the TPU compiler's own estimates. It has none for kernels written in Pallas."""
    found = (
        (run.times, re.search(r'"estimated_cycles":"(\d+)"', run.text))
        for run in instructions(text)
        if not run.fused
    )
    return sum(times * int(cycles[1]) for times, cycles in found if cycles)


def kernel_calls(text: str) -> int:
    """How often the program starts a kernel written in Pallas."""
    return sum(run.times for run in instructions(text) if run.is_kernel)


def collectives(text: str) -> list[Collectives]:
    """Exchanges between devices, by kind and type of the elements."""
    found = {}
    for run in instructions(text):
        kind = run.opcode.removesuffix("-done")  # whose shape is the result's, unlike "-start"
        if kind not in COLLECTIVES:
            continue
        sizes = {}
        for dtype, dimensions in SHAPE.findall(run.shape):
            sizes[dtype] = sizes.get(dtype, 0) + array_bytes(dtype, dimensions)
        for dtype, size in sizes.items():
            had = found.get((kind, dtype), Collectives(kind, dtype, 0, 0, 0, 0))
            found[kind, dtype] = Collectives(
                kind,
                dtype,
                had.instructions + 1,
                had.in_loops + (run.times > 1),
                had.executed + run.times,
                had.bytes + run.times * size,
            )
    return [found[key] for key in sorted(found)]


def array_bytes(dtype: str, dimensions: str) -> int:
    """Of "bf16" and "8,128", for instance."""
    size = BYTES.get(dtype) or int(re.search(r"\d+", dtype)[0]) / 8
    return math.ceil(size * math.prod(int(n) for n in dimensions.split(",") if n))
