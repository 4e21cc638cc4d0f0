# SPDX-License-Identifier: Apache-2.0
"""`describe` gives the published numbers, which a formula independent of the code confirms."""

import json

import jax
import jax.numpy as jnp
import pytest

from tests.models.test_models import COUNTS, TNTS
from tnt_flax.__main__ import main
from tnt_flax.models import create_model
from tnt_flax.tools import describe


def run(capsys, *arguments):
    assert main(["describe", *arguments]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    return table, json.loads(last)


def formula(name, size, channels=3):
    """MACs of an image: paper Eq. 14-18, with the 7x7 stem and the head of the official code."""
    model = create_model(name)
    n, c, d, m = (size // 16) ** 2, model.inner_dim, model.outer_dim, 16
    inner = n * (m * 4 * c * c + 2 * m * m * c + m * 8 * c * c)
    outer = (n + 1) * 4 * d * d + 2 * (n + 1) ** 2 * d + (n + 1) * 8 * d * d
    stem = n * m * 49 * channels * c
    return stem + n * m * c * d + 12 * (inner + n * m * c * d + outer) + d * model.num_classes


def check_sums(result, name):
    parts = result["parts"].values()
    assert result["parameters"] == sum(part["parameters"] for part in parts) == COUNTS[name]
    assert sum(part["flops"] for part in parts) == 2 * result["macs"]


@pytest.mark.parametrize("name", TNTS)
def test_tnt_parameters_and_macs(name, capsys):
    table, result = run(capsys, name)
    check_sums(result, name)
    assert result["macs"] == formula(name, int(name[-3:]))
    assert 0.93 < result["computed_macs"] / result["macs"] < 0.96  # one block without most tokens
    assert f"{COUNTS[name]:,} parameters" in table[-1]
    assert max(map(len, table)) <= 110


# Counted from the official code's shapes by hand; its readme states 0.6, 3.3, 8.2 and 16.0 G.
@pytest.mark.parametrize(
    "name, gmacs",
    [
        ("ptnt_ti_patch16_192", 0.5864),
        pytest.param("ptnt_s_patch16_256", 3.2833, marks=pytest.mark.slow),
        pytest.param("ptnt_m_patch16_256", 8.2046, marks=pytest.mark.slow),
        pytest.param("ptnt_b_patch16_256", 15.9666, marks=pytest.mark.slow),
    ],
)
def test_pyramid_parameters_and_macs(name, gmacs, capsys):
    _, result = run(capsys, name)
    check_sums(result, name)
    assert result["macs"] / 1e9 == pytest.approx(gmacs, abs=5e-5)
    assert result["computed_macs"] == result["macs"]  # the head reads every sentence
    assert {"stem", "merging", "head", "stage 4, outer MLP"} < set(result["parts"])


@pytest.mark.parametrize("name, paper", [("tnt_ti_patch16_224", 1.4), ("tnt_s_patch16_224", 5.2)])
def test_macs_of_the_paper(name, paper):
    assert round(formula(name, 224) / 1e9, 1) == paper


# The paper's 14.1 includes norms, 0.07 %; without them it would be 14.05.
def test_macs_of_the_paper_for_tnt_b():
    assert formula("tnt_b_patch16_224", 224) == pytest.approx(14.1e9, rel=0.004)


def test_image_size_and_batch_size(capsys):
    name = "tnt_s_patch16_224"
    _, large = run(capsys, name, "--image-size=384", "--batch-size=2")
    assert (large["parameters"], large["macs"]) == (23_914_504, formula(name, 384))
    assert large["parts"]["head"]["flops"] == 2 * 2 * 384 * 1000


@pytest.mark.slow
def test_blocks_without_words(capsys):
    """Three of nine blocks have words; in them, the inner MLP has 4,776 parameters."""
    settings = ["vanilla_blocks=1,2,3,5,6,7", "depth=9", "se=True"]
    _, result = run(capsys, "tnt_s_patch16_224", "--set", *settings)
    assert result["parts"]["inner MLP"]["parameters"] == 3 * 4_776


def test_dtype_changes_bytes_only(capsys):
    full, half = (
        run(capsys, "tnt_ti_patch16_224", "--set", "depth=1", f"dtype={dtype}")[1]["parts"]
        for dtype in ("float32", "bfloat16")
    )
    for name, part in full.items():
        assert part["flops"] == half[name]["flops"]
        assert part["bytes"] == 2 * half[name]["bytes"]


def test_matmuls_in_nested_loops():
    def function(weights, x):
        def body(x, _):
            return jax.lax.scan(lambda x, _: (x @ weights, None), x, None, 2)[0], None

        return jax.lax.scan(body, x, None, 3)[0].sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 8), (4, 8))]
    (product,) = describe.contractions(function, *shapes)
    assert product.macs == 6 * 4 * 8 * 8
    assert product.bytes == 6 * 2 * (8 * 8 + 2 * 4 * 8)
