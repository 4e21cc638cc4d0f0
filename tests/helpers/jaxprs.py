# SPDX-License-Identifier: Apache-2.0
"""A look inside a traced function."""

import jax


def equations(jaxpr):
    """All equations, those inside scans, remats and calls included."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from equations(value)
