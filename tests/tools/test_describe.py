# SPDX-License-Identifier: Apache-2.0
"""The tables add up to the published numbers, by a formula that knows nothing of the code."""

import json

import jax
import jax.numpy as jnp
import pytest

from tests.models.test_models import COUNTS, TNTS
from tnt_flax.models import create_model
from tnt_flax.tools import describe
from tnt_flax.tools.describe import contractions


def run(capsys, *arguments):
    assert describe.main([*arguments]) == 0
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


@pytest.mark.parametrize("name", TNTS)
def test_every_network_adds_up(name, capsys):
    size = int(name[-3:])
    table, result = run(capsys, name)
    assert result["parameters"] == COUNTS[name]
    assert result["macs"] == formula(name, size)
    assert 0.93 < result["computed_macs"] / result["macs"] < 0.96  # most of one block is spared
    for field in ("parameters", "macs"):
        assert sum(part[field] for part in result["parts"].values()) == result[field]
    assert f"{COUNTS[name]:,} parameters" in table[-1]
    assert len(table) <= 50 and max(map(len, table)) <= 100


# Counted from the official code's shapes by hand; its readme says 0.6, 3.3, 8.2 and 16.0 G.
@pytest.mark.parametrize(
    "name, gmacs",
    [
        ("ptnt_ti_patch16_192", 0.5864),
        pytest.param("ptnt_s_patch16_256", 3.2833, marks=pytest.mark.slow),
        pytest.param("ptnt_m_patch16_256", 8.2046, marks=pytest.mark.slow),
        pytest.param("ptnt_b_patch16_256", 15.9666, marks=pytest.mark.slow),
    ],
)
def test_every_pyramid_adds_up(name, gmacs, capsys):
    table, result = run(capsys, name)
    assert result["parameters"] == COUNTS[name]
    assert result["macs"] / 1e9 == pytest.approx(gmacs, abs=5e-5)
    assert result["computed_macs"] == result["macs"]  # the head reads every sentence
    for field in ("parameters", "macs"):
        assert sum(part[field] for part in result["parts"].values()) == result[field]
    assert "merging" in result["parts"]
    depths = create_model(name).depths
    rows = [line for line in table if ", each:" in line]
    assert len(rows) == sum(1 + (depth > 1) for depth in depths)
    assert rows[1].startswith("x1 block 1, each:")
    assert max(map(len, table)) <= 100


@pytest.mark.parametrize("name, paper", [("tnt_ti_patch16_224", 1.4), ("tnt_s_patch16_224", 5.2)])
def test_the_papers_numbers(name, paper):
    assert round(formula(name, 224) / 1e9, 1) == paper


# The paper's 14.1 has the norms in it, which are 0.07 % of the operations: without them 14.05.
def test_the_papers_number_of_tnt_b():
    assert formula("tnt_b_patch16_224", 224) == pytest.approx(14.1e9, rel=0.004)


def test_another_image_size_and_number_of_images(capsys):
    name = "tnt_s_patch16_224"
    _, small = run(capsys, name)
    _, large = run(capsys, name, "--image-size=384", "--batch-size=2")
    assert (large["parameters"], large["macs"]) == (23_914_504, formula(name, 384))
    flops = sum(part["forward"]["flops"] for part in large["parts"].values())
    assert flops == 2 * 2 * large["macs"]
    assert small["parts"]["head"]["macs"] == large["parts"]["head"]["macs"] == 384 * 1000


def test_fields_and_equal_blocks(capsys):
    """Blocks without words are rows of their own, wherever they are; paper Table 5: 4.6 GMACs."""
    table, result = run(
        capsys, "tnt_s_patch16_224", "--set", "vanilla_blocks=1,2,3,5,6,7", "depth=9", "se=True"
    )
    text = "\n".join(table)
    assert "x3 block 0,4,8, each:" in text
    assert "x6 block 1-3,5-7, each:" in text
    assert text.count("outer/se/fc1") == 2 and text.count("inner/fc1") == 1
    assert result["parts"]["inner MLP"]["parameters"] == 3 * 4_776


def test_dtype_halves_the_bytes_and_not_the_operations(capsys):
    runs = [
        run(capsys, "tnt_ti_patch16_224", "--set", "depth=1", f"dtype={dtype}")[1]["parts"]
        for dtype in ("float32", "bfloat16")
    ]
    for part in runs[0]:
        full, half = (parts[part]["forward"] for parts in runs)
        assert full["flops"] == half["flops"] and full["bytes"] == 2 * half["bytes"]


def test_remat_computes_the_forward_pass_of_the_blocks_twice(capsys):
    step, again = (
        run(capsys, "tnt_ti_patch16_224", "--set", "depth=2", f"remat={remat}")[1]["parts"]
        for remat in ("none", "block")
    )
    for name, part in step.items():
        forward = part["forward"]["flops"]
        inputs = 2 * 196 * 16 * 147 * 12 if name == "stem" else 0  # no gradient of the pixels
        assert part["step"]["flops"] == 3 * forward - inputs
        extra = again[name]["step"]["flops"] - part["step"]["flops"]
        # What the last layer of a block would compute is not needed again.
        last = 2 * 2 * 197 * 768 * 192 if name == "outer MLP" else 0
        assert extra == (forward - last if name not in ("stem", "head") else 0)


def test_loops_and_operands():
    """A product in a loop in a loop; the second operand is a parameter, the sum is not counted."""

    def function(weights, x):
        def body(x, _):
            return jax.lax.scan(lambda x, _: (x @ weights, None), x, None, 2)[0], None

        return jax.lax.scan(body, x, None, 3)[0].sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 8), (4, 8))]
    (product,) = contractions(jax.make_jaxpr(function)(*shapes), [False, True])
    assert product.macs == 6 * 4 * 8 * 8
    assert product.weight_bytes == 6 * 8 * 8 * 2
    assert product.activation_bytes == 6 * 2 * 4 * 8 * 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tnt_s"], "unknown model 'tnt_s'"),
        (["tnt_s_patch16_224", "--image-size=100"], "image size 100x100 is not divisible by"),
        (["tnt_s_patch16_224", "--batch-size=0"], "--batch-size=0"),
        (["tnt_s_patch16_224", "--set", "depht=3"], "TNT has no field 'depht' (did you mean"),
        (["tnt_s_patch16_224", "--set", "depth"], "--set depth: write NAME=VALUE"),
        (["tnt_s_patch16_224", "--set", "dtype=int99"], "dtype='int99' is not a valid type"),
        ([], "the following arguments are required: model"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert describe.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and message in err and err.count("\n") == 1
