# SPDX-License-Identifier: Apache-2.0
"""`tnt-flax demo`: predictions over HTTP, refusals, and the page, driven in a browser."""

import asyncio
import contextlib
import http.client
import json
import random
import shutil
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import uvicorn

from benchmarks.demo import serve
from tests.helpers import small_network
from tests.helpers.fuzzing import mutated
from tests.helpers.photos import jpeg, png
from tnt_flax.__main__ import main
from tnt_flax.inference.classifier import Classifier
from tnt_flax.tools import demo
from tnt_flax.tools.demo import app, service
from tnt_flax.weights.read import read_checkpoint

CHROMIUM = shutil.which("chromium")
PHOTO = jpeg("china")
FORM = {"Content-Type": "multipart/form-data; boundary=edge"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small_network.save(tmp_path_factory.mktemp("demo"), depth=1)


@pytest.fixture(scope="module")
def classifier(weights):
    return Classifier(read_checkpoint(weights), max_pixels=300_000)


@pytest.fixture(scope="module")
def address(weights, classifier):
    """Host and port of the application, served by a thread."""
    served = service.Service(read_checkpoint(weights), classifier, batch_size=4)
    with demo.listen("127.0.0.1", 0) as listener:
        config = uvicorn.Config(app.make_app(served, True), lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        host, port = listener.getsockname()
        yield f"{host}:{port}"
        server.should_exit = True
        thread.join()


def request(address, path="/predict", body=None, method="POST", headers=None):
    """Returns (status, headers, JSON or text) of an answer."""
    with contextlib.closing(http.client.HTTPConnection(address, timeout=60)) as connection:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        text = answer.read().decode()
    is_json = answer.headers["Content-Type"] == "application/json"
    return answer.status, answer.headers, json.loads(text) if is_json else text


def form(*files, field="image"):
    """Returns a form of (name, content) files."""
    head = '--edge\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n'
    parts = [(head % (field, name)).encode() + content + b"\r\n" for name, content in files]
    return b"".join(parts) + b"--edge--\r\n"


def png_of_size(width, height):
    """Returns a PNG file with a valid header and few pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(bytes(10_000_000), 9)), (b"IEND", b"")]
    lines = (
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(lines)


def test_predictions_are_those_of_the_classifier(address, classifier):
    flower = jpeg("flower")
    expected = classifier.predict([PHOTO, flower], top=3)
    status, _, answer = request(
        address, "/predict?top=3", form(("a.jpg", PHOTO), ("b.jpg", flower)), headers=FORM
    )
    assert status == 200 and [image["name"] for image in answer["images"]] == ["a.jpg", "b.jpg"]
    for image, predictions in zip(answer["images"], expected, strict=True):
        assert [p["label"] for p in image["predictions"]] == [p.label for p in predictions]
        shown = [p["probability"] for p in image["predictions"]]
        assert shown == pytest.approx([p.probability for p in predictions], rel=1e-5)
    assert request(address, "/predict?top=3", PHOTO)[2]["images"][0] == (
        answer["images"][0] | {"name": "image"}
    )


REFUSED = {  # (status, what the answer contains, body, headers)
    "no image": (400, "the request has no image: curl", b"", {}),
    "text": (415, "not an image format", b"hello", {}),
    "truncated": (422, "image file is truncated", PHOTO[:9000], {}),
    "pixels": (413, "pixels are more than the limit of 300,000", png_of_size(9000, 9000), {}),
    "bytes": (413, "more than 32 MiB in one request", bytes(app.MAX_BYTES + 1), {}),
    "scans": (422, "a JPEG of more than 100 scans", PHOTO + 101 * b"\xff\xda", {}),
    "empty file": (400, "x.png: the file is empty", form(("x.png", b"")), FORM),
    "no file": (400, "the form has no file: curl", b"--edge--\r\n", FORM),
    "no boundary": (400, "Missing boundary", b"x", {"Content-Type": "multipart/form-data"}),
    "no form": (400, "the form cannot be read", b"x", FORM),
    "files": (400, "Maximum number of files is 32", form(*[("a", b"b")] * 33), FORM),
    "other site": (403, "pages of other sites", PHOTO, {"Origin": "http://evil.example"}),
    "sandbox": (403, "pages of other sites", PHOTO, {"Origin": "null"}),
    "fetch": (403, "pages of other sites", PHOTO, {"Sec-Fetch-Site": "cross-site"}),
    "rebinding": (403, "the Host header", PHOTO, {"Host": "evil.example:80"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line_with_their_status(address, case):
    status, text, body, headers = REFUSED[case]
    found, got, answer = request(address, body=body, headers=headers)
    assert (found, text in answer["error"]) == (status, True), answer
    assert "\n" not in answer["error"] and got["X-Content-Type-Options"] == "nosniff"


def test_good_files_beside_bad_ones_are_answered(address):
    body = form(("bad\x1b.jpg", b"hello"), ("good.jpg", PHOTO))
    status, _, answer = request(address, body=body, headers=FORM)
    bad, good = answer["images"]
    assert status == 200 and bad == {
        "name": "bad?.jpg",
        "error": "not an image format that PIL reads",
    }
    assert good["predictions"] and "error" not in answer


@pytest.mark.parametrize("path", ["/nowhere", "/predict?top=0", "/predict?top=x", "/explore/x"])
def test_wrong_addresses_are_one_line(address, path):
    method = "POST" if path.startswith("/predict") else "GET"
    status, _, answer = request(address, path, PHOTO, method)
    assert status in (400, 404) and "\n" not in answer["error"]


@pytest.mark.slow
def test_explorers_are_made_on_demand_and_run_no_other_script(address):
    _, _, answer = request(address, "/predict?explorer=1", form(("<a>.jpg", PHOTO)), headers=FORM)
    status, headers, page = request(address, answer["images"][0]["explorer"], method="GET")
    assert status == 200 and '"name": "\\u003ca>.jpg"' in page
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


def test_a_failure_is_one_line_without_its_reason(address, classifier, monkeypatch):
    def fail(*args):
        raise RuntimeError("/home/me/secret")

    monkeypatch.setattr(classifier, "classify", fail)
    status, headers, answer = request(address, body=PHOTO)
    assert (status, answer) == (500, {"error": "the server failed; its terminal has the reason"})
    assert headers["X-Content-Type-Options"] == "nosniff"
    monkeypatch.undo()
    assert request(address, body=PHOTO)[0] == 200


def test_concurrent_items_share_batches_and_errors_stay_in_theirs():
    batches = []

    def evaluate(items):
        batches.append(items)
        time.sleep(0.02)
        if 7 in items:
            raise ValueError("seven")
        return [-item for item in items]

    async def submit_all():
        batcher = service.Batcher(evaluate, size=4)
        return await asyncio.gather(*map(batcher.submit, range(10)), return_exceptions=True)

    results = asyncio.run(submit_all())
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert results[:4] + results[8:] == [0, -1, -2, -3, -8, -9]
    assert {str(error) for error in results[4:8]} == {"seven"}


def test_the_oldest_items_are_forgotten():
    recent = service.Recent(2)
    for i in range(3):
        recent[i] = i
    assert list(recent) == [1, 2]


def test_a_port_in_use_is_one_line(weights, capsys):
    with demo.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert main(["demo", str(weights), f"--port={port}"]) == 1
    assert f"error: cannot listen on 127.0.0.1, port {port}: Address" in capsys.readouterr().err
    assert main(["demo", str(weights), "--port=70000"]) == 2


# ---------------------------------------------------------------------------------------- browser


def drop_file(page, path):
    """Drops a file on the page."""
    content = list(path.read_bytes())
    page.evaluate(
        """([name, content]) => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([new Uint8Array(content)], name));
            document.body.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true}));
        }""",
        [path.name, content],
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["choose", "drop"])
def test_page_shows_predictions_and_opens_explorers(address, classifier, tmp_path, way):
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    photo = small_network.photo(tmp_path)
    (tmp_path / "notes.png").write_text("no image")
    with playwright.sync_playwright() as driver, contextlib.ExitStack() as stack:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        stack.callback(browser.close)
        page, problems = browser.new_page(viewport=dict(width=360, height=800)), []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"http://{address}/")
        if way == "choose":
            page.set_input_files("#files", [photo, tmp_path / "notes.png"])
            message = page.locator(".failed .message")
            playwright.expect(message).to_contain_text("not an image format that PIL reads")
        else:
            drop_file(page, photo)
        link = page.locator("a.explore:visible")
        link.wait_for()
        (expected,) = classifier.predict(photo)
        rows = page.locator(".predictions:visible tr").all_text_contents()
        assert rows == [f"{p.label}{100 * p.probability:.2f} %" for p in expected]
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        with page.expect_popup() as opened:
            link.click()
        opened.value.wait_for_selector("html[data-ready]")
        playwright.expect(opened.value.locator(".reading")).to_contain_text("The class token gives")
        assert problems == []


# ------------------------------------------------------------------------------------------- fuzz


def bad_upload(rng):
    """Returns (body, headers) of a damaged upload."""
    kind, flower = rng.randrange(8), jpeg("flower")
    if kind == 0:
        return rng.randbytes(rng.randrange(1, 5000)), {}
    if kind == 1:
        return flower[: rng.randrange(1, len(flower))], {}
    if kind == 2:
        return png_of_size(
            rng.choice((7_000, 30_000, 2**31 - 1)), rng.choice((7_000, 2**31 - 1))
        ), {}
    if kind == 3:
        return mutated(png(np.zeros((40, 40, 3), np.uint8)), rng, b"IHDRIDATIEND"), {}
    if kind == 4:
        return PHOTO, {f"X-{i}": "x" * 9000 for i in range(rng.choice((1, 20)))}
    if kind == 5:
        content = mutated(form(("a.jpg", b"hello")), rng, b'-\r\n:;"edge')
        return content, FORM
    if kind == 6:
        names = b"Content-Disposition: " + rng.randbytes(rng.randrange(100_000))
        return b"--edge\r\n" + names, FORM
    kinds = (
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "a" * 5000,
        "image/jpeg; \xff",
    )
    return rng.randbytes(100), {"Content-Type": rng.choice(kinds)}


@pytest.mark.slow
def test_1000_bad_uploads_are_answered_and_memory_is_bounded(weights, record_property):
    rng, statuses = random.Random(0), {}
    with serve(weights) as server:
        host_and_port = server.address
        for _ in range(8):
            assert request(host_and_port, body=PHOTO)[0] == 200
        before = server.peak_mib()
        for i in range(1000):
            body, headers = bad_upload(rng)
            with contextlib.suppress(ConnectionError):  # huge headers: the answer may be cut off
                status, _, answer = request(host_and_port, body=body, headers=headers)
                statuses[status] = statuses.get(status, 0) + 1
                text = answer.get("error", "") if isinstance(answer, dict) else answer
                assert "\n" not in text and "Traceback" not in text and "site-packages" not in text
                assert status != 500, (i, answer)
        assert request(host_and_port, body=PHOTO)[0] == 200
        grown = server.peak_mib() - before
    record_property("statuses", statuses)
    record_property("grown_mib", round(grown))
    print(statuses, f"{grown:.0f} MiB")
    assert grown < 1000
