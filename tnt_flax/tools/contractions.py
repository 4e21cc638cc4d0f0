# SPDX-License-Identifier: Apache-2.0
"""The matrix products and convolutions of a traced function: how many multiply-adds, of what bytes.

Read off the jaxpr, through scans, remats and calls, so that no formula has to know the network.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


class Contraction(NamedTuple):
    """One product, or all turns of a loop of it."""

    scope: tuple[str, ...]  # of `jax.named_scope`, outermost first
    macs: int  # multiply-adds; the zeros of a convolution's padding count
    weight_bytes: int  # of the operands that depend on parameters alone
    activation_bytes: int  # of the other operands and of the result


def contractions(jaxpr: ClosedJaxpr, data: Sequence[bool]) -> Iterator[Contraction]:
    """All of `jaxpr`; `data` says which of its arguments are no parameters.

    The body of a scan counts as often as it turns, that of a `while_loop` once.
    """
    yield from _walk(jaxpr.jaxpr, data, (), 1)


def count_macs(function: Callable[..., Any], *args: Any) -> int:
    """All multiply-adds of `function`, whose arguments may be shapes alone."""
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
                # Where arguments do not match one to one, all may come from data.
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
