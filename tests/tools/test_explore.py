# SPDX-License-Identifier: Apache-2.0
"""The explorer's page, driven in a browser, states the attention weights of the network."""

import base64
import json
import re
import shutil

import numpy as np
import pytest

from tests.helpers import small_network
from tnt_flax.__main__ import main
from tnt_flax.inference.preprocess import Preprocessor
from tnt_flax.models.network import BlockLayout
from tnt_flax.tools import attention, explore
from tnt_flax.weights.read import read_checkpoint

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
NETWORKS = {
    "tnt": dict(vanilla_blocks=(1,)),
    "ptnt": dict(name="ptnt_s_patch16_256", size=80, depths=(2, 1, 1, 1)),
}
POINTED = "the sentence that I point at"


def full_size_trace(rows=14, blocks=12):
    """Returns a trace of the size of TNT-S with random attention."""
    random, tokens = np.random.default_rng(0), rows**2 + 1
    outer = [random.dirichlet(np.ones(tokens), (6, tokens)) for _ in range(blocks)]
    inner = {i: random.dirichlet(np.ones(16), (rows**2, 4, 16)) for i in range(blocks)}
    layouts = [BlockLayout((rows, rows), 1, 1)] * blocks
    return attention.Trace(None, layouts, True, outer, inner, [], {}, None)


def test_weights_are_stored_within_the_stated_error():
    trace = full_size_trace(rows=3, blocks=2)
    codes, scales, _ = explore.encode_attention(trace, light=False)
    outer = trace.outer_attention[0]
    decoded = codes[: outer.size].reshape(outer.shape) * scales[:60].reshape(6, 10, 1)
    largest = outer.max(axis=-1, keepdims=True)
    assert (np.abs(decoded - outer) <= 0.002 * largest).all()
    assert np.abs(decoded - outer).max() <= scales.max() / 2 + 1e-7


@pytest.mark.slow
def test_a_page_of_tnt_s_has_at_most_8_megabytes():
    sizes = {}
    for light in (False, True):
        codes, scales, _ = explore.encode_attention(full_size_trace(), light)
        sizes[light] = len(base64.b64encode(codes)) + len(base64.b64encode(scales))
    assert sizes[False] <= 7.5e6  # the image and the program have some 0.1 MB
    assert sizes[True] <= 2e6


def test_names_cannot_end_the_script(tmp_path):
    path = small_network.save(tmp_path, class_names=["</script><b>"] * 10, depth=1)
    found = read_checkpoint(path)
    (trace,) = attention.trace_attention(found, np.zeros((1, 48, 48, 3), np.uint8))
    data, _ = explore.page_data(found, [trace], ["</script>.png"])
    page = explore.render(data)
    assert page.count("</script>") == 2


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module", params=NETWORKS)
def made(request, tmp_path_factory):
    """(path of a page with two images, traces of both)."""
    folder = tmp_path_factory.mktemp(request.param)
    path = small_network.save(folder, **NETWORKS[request.param])
    image = small_network.photo(folder)
    assert main(["explore", str(path), str(image), str(image), f"--out={folder}/page.html"]) == 0
    found = read_checkpoint(path)
    pixels = Preprocessor(found).read(image)
    return folder / "page.html", *attention.trace_attention(found, pixels[None])


@pytest.fixture
def opened(browser, made):
    """(page of the browser, trace). The page must not log errors or send requests."""
    context = browser.new_context(viewport=dict(width=1200, height=900), has_touch=True)
    page = context.new_page()
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url[:50]))
    page.goto(made[0].as_uri())
    page.wait_for_selector("html[data-ready]")
    yield page, made[1]
    assert problems == []
    assert all(re.match("file:|data:image", url) for url in requests)
    context.close()


def point(page, selector, row, column, grid, click=False):
    """Points into a cell of a canvas, which shows `grid` cells, the last ones perhaps in part."""
    page.evaluate("scrollTo(0, 0)")
    box = page.locator(selector).first.bounding_box()
    x = box["x"] + min((column + 0.5) / grid[1], 0.99) * box["width"]
    y = box["y"] + min((row + 0.5) / grid[0], 0.99) * box["height"]
    page.mouse.click(x, y) if click else page.mouse.move(x, y)


def weight(page, selector=".reading"):
    return float(page.locator(selector).first.get_attribute("data-weight"))


def choose(page, block, **options):
    page.locator(".strip").first.get_by_label(f"block {block + 1}", exact=True).click()
    for control, value in options.items():
        page.select_option(f"#{control.replace('_', '-')}", label=value)


@pytest.mark.slow
def test_reading_equals_the_attention_of_the_heads_input(opened):
    page, trace = opened
    for block, head in ((0, "mean"), (1, "1"), (len(trace.layouts) - 1, "2")):
        choose(page, block, head=head)
        layout = trace.layouts[block]
        row, column = attention.averaged_grid(layout)[0] - 1, 0
        shown = [n / (layout.side * layout.reduction) for n in trace.grid]
        point(page, ".sentences", row, column, shown)
        maps = trace.attention_maps()[block] / trace.outer_attention[block].shape[-1]
        expected = maps.mean(axis=0) if head == "mean" else maps[int(head) - 1]
        assert weight(page) == pytest.approx(
            expected[row, column], abs=0.002 * float(expected.max())
        )


@pytest.mark.slow
def test_reading_equals_the_attention_of_the_pointed_sentence(opened):
    page, trace = opened
    choose(page, 1, query=POINTED, head="2")
    grid = trace.grid_of(1)
    point(page, ".sentences", 1, 2, grid)
    token = int(trace.has_class_token)
    row = trace.outer_attention[1][1, token + grid[1] + 2]
    assert weight(page) == pytest.approx(row[token:].max(), rel=0.005)
    assert "row 2, column 3 attends most" in page.locator(".reading").first.text_content()


@pytest.mark.slow
def test_rollout_equals_that_of_the_network(opened):
    page, trace = opened
    for block in (0, len(trace.layouts) - 1):
        choose(page, block, head="rollout")
        point(page, ".sentences", 0, 1, trace.grid)
        expected = trace.rollout_maps()[block]
        assert weight(page) == pytest.approx(expected[0, 1], abs=0.003 * float(expected.max()))


@pytest.mark.slow
def test_words_of_a_kept_sentence(opened):
    page, trace = opened
    choose(page, 0, inner_head="1")
    point(page, ".sentences", 2, 0, trace.grid, click=True)
    point(page, ".words", 1, 3, (4, 4))
    sentence = 2 * trace.grid[1]
    row = trace.inner_attention[0][sentence, 0, 7]
    assert weight(page, ".word-reading") == pytest.approx(row.max(), rel=0.005)
    without_words = next(i for i in range(len(trace.layouts)) if i not in trace.inner_attention)
    choose(page, without_words)
    assert "does not read words" in page.locator(".words-caption").first.text_content()


@pytest.mark.slow
def test_keyboard_and_touch_select_sentences(opened):
    page, trace = opened
    choose(page, 0, query=POINTED)
    rows, columns = trace.grid
    canvas = page.locator(".sentences").first
    box = canvas.bounding_box()
    page.touchscreen.tap(box["x"] + 3, box["y"] + 3)
    assert "sentence in row 1, column 1 " in page.locator(".reading").first.text_content()
    canvas.focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    assert "sentence in row 2, column 1 " in page.locator(".reading").first.text_content()
    page.locator(".words").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "row 1, column 2 attends" in page.locator(".word-reading").first.text_content()


@pytest.mark.slow
def test_play_visits_every_block(opened):
    page, trace = opened
    introduction = " ".join(page.locator("#introduction").text_content().split())
    cut = trace.pixels.shape[0] // trace.grid[0]
    assert f"sentences of {cut}x{cut} pixels" in introduction
    assert f"each sentence into words of {cut // 4}x{cut // 4}." in introduction
    assert page.get_by_role("slider", name="Block").get_attribute("max") == str(len(trace.layouts))
    page.evaluate("chooseBlock(controls.block.max - 1)")
    page.get_by_text("Play blocks").click()
    last = len(trace.layouts)
    shown = playwright.expect(page.locator("#block-name"))
    shown.to_have_text(f"{last} of {last}")
    shown.to_have_text(f"1 of {last}")
    page.get_by_text("Stop").click()


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1200, 3840])
def test_nothing_overflows(opened, width):
    page, _ = opened
    page.set_viewport_size(dict(width=width, height=900))
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_light_pages_have_the_mean_of_the_heads(tmp_path, browser, capsys):
    path = small_network.save(tmp_path)
    image = small_network.photo(tmp_path)
    assert main(["explore", str(path), str(image), f"--out={tmp_path}/p.html", "--light"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == (tmp_path / "p.html").stat().st_size
    page = browser.new_page()
    page.goto((tmp_path / "p.html").as_uri())
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#head option").all_text_contents() == ["mean", "rollout"]
    found = read_checkpoint(path)
    (trace,) = attention.trace_attention(found, Preprocessor(found).read(image)[None])
    point(page, ".sentences", 0, 0, trace.grid)
    expected = trace.outer_attention[0].mean(axis=0)[0]
    assert weight(page) == pytest.approx(expected[1], abs=0.002 * float(expected.max()))
    page.close()


def test_a_folder_that_does_not_exist_is_one_line(tmp_path, capsys):
    path, image = small_network.save(tmp_path, depth=1), small_network.photo(tmp_path)
    assert main(["explore", str(path), str(image), "--out=missing/page.html"]) == 2
    assert "error: cannot write missing/page.html" in capsys.readouterr().err
