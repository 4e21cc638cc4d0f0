# SPDX-License-Identifier: Apache-2.0
"""Equations of a traced function."""

import jax


def equations(jaxpr):
    """Yields all equations, including those inside scans, remats and calls."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from equations(value)
