# SPDX-License-Identifier: Apache-2.0
"""`tnt-flax demo`: predictions over HTTP, refusals, and the page, driven in a browser."""

import asyncio
import contextlib
import http.client
import json
import logging
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import zlib

import numpy as np
import pytest

from benchmarks.demo import serve
from tests.helpers import small_network
from tests.helpers.fuzzing import mutated
from tests.helpers.photos import jpeg, png
from tnt_flax.__main__ import main
from tnt_flax.core.errors import InputError
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
def application(weights, classifier):
    return app.make_app(service.Service(read_checkpoint(weights), classifier, batch_size=4), True)


@pytest.fixture(scope="module")
def address(application):
    """Host and port of the application, served by a thread."""
    with serve_in_thread(application) as address:
        yield address


@contextlib.contextmanager
def serve_in_thread(application, host="127.0.0.1"):
    """Yields host and port of an application."""
    with demo.listen(host, 0) as listener:
        port = listener.getsockname()[1]
        running = app.make_server(application)
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        try:
            yield f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        finally:
            running.should_exit = True
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


def connect(address, data=b""):
    host, _, port = address.rpartition(":")
    client = socket.create_connection((host.strip("[]"), int(port)), timeout=10)
    client.sendall(data)
    return client


def received(client):
    """Returns what a client gets until the server closes the connection."""
    with client, contextlib.suppress(ConnectionResetError):
        return b"".join(iter(lambda: client.recv(1 << 16), b""))
    return b""


def test_slow_and_abandoned_uploads_end(address, monkeypatch):
    monkeypatch.setattr(app, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(app, "UPLOAD_SECONDS", 0.2)
    head = f"POST /predict HTTP/1.1\r\nHost: {address}\r\nContent-Length: 1000\r\n\r\n".encode()
    connected, header, body, dripping = (
        connect(address, data) for data in (b"", head[:30], head + b"x", head)
    )
    with dripping, contextlib.suppress(ConnectionError):  # until the server closes
        for _ in range(100):
            dripping.sendall(b"x")
            time.sleep(0.02)
        pytest.fail("the connection stays open")
    assert received(connected) == received(header) == b""
    assert b" 408 " in received(body)
    assert request(address, body=PHOTO)[0] == 200


def test_a_connection_stays_open_after_a_long_request():
    checks, aborted = [], []
    protocol = object.__new__(app.HttpProtocol)
    protocol.connections = {protocol}
    protocol.loop = types.SimpleNamespace(call_later=lambda *call: checks.append(call))
    protocol.transport = types.SimpleNamespace(abort=lambda: aborted.append(True))
    protocol.cycle = types.SimpleNamespace(response_complete=False)
    protocol._check_later()
    protocol.cycle.response_complete = True  # just now
    for expected in ([], [True]):
        _, check, *state = checks.pop()
        check(*state)
        assert aborted == expected


def test_cancelled_requests_get_an_answer():
    sent = []

    async def endless(scope, receive, send):
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    async def cancel():
        scope = {"type": "http", "method": "GET", "headers": []}
        task = asyncio.create_task(app.Guard(endless, False)(scope, None, send))
        await asyncio.sleep(0)
        task.cancel()
        await task

    asyncio.run(cancel())
    assert sent[0]["status"] == 503 and sent[1]["body"] == b'{"error":"the demo ends"}'


def test_ipv6_serves_the_page_and_predictions(application):
    with serve_in_thread(application, "::1") as address:
        _, _, page = request(address, "/", method="GET")
        assert "knows 10 classes: class 0, class 1," in " ".join(page.split())
        assert request(address, body=PHOTO, headers={"Origin": f"http://{address}"})[0] == 200
        assert request(address, body=PHOTO, headers={"Host": "[::2]:80"})[0] == 403


def test_logging_never_waits_for_the_reader_of_stderr(monkeypatch):
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(fileno=lambda: writer))

    def log():
        with app.log_without_blocking():
            for name in ("tnt_flax.tools", "uvicorn.error", "py.warnings"):
                logging.getLogger(name).error(f"{name} failed: " + "x" * 100_000)

    thread = threading.Thread(target=log, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert os.read(reader, 23) == b"tnt_flax.tools failed: "
    os.close(reader)
    log()  # to a pipe that is closed
    os.close(writer)


@pytest.mark.parametrize("host", ["", "192.0.2.1", "fe80::1", "not a host"])
def test_a_host_that_is_not_here_is_one_line(host):
    with pytest.raises(InputError, match="--host.*: give an address of this machine"):
        demo.listen(host, 0)


def test_a_port_in_use_is_one_line(weights, capsys):
    with demo.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert main(["demo", str(weights), f"--port={port}"]) == 1
    assert f"error: cannot listen on 127.0.0.1, port {port}: Address" in capsys.readouterr().err
    assert main(["demo", str(weights), "--port=70000"]) == 2


@pytest.mark.slow
def test_a_process_survives_an_unread_stderr_and_ends_by_ctrl_c(weights):
    command = [sys.executable, "-m", "tnt_flax", "demo", str(weights), "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        line = next(line for line in process.stderr if line.startswith(b"open "))
        address = line.split(b"/")[2].decode()
        for _ in range(1400):  # the messages about as many wrong requests would fill the pipe
            assert b" 400 " in received(connect(address, b"wrong\r\n\r\n"))
        assert request(address, body=PHOTO)[0] == 200
        head = f"POST /predict HTTP/1.1\r\nHost: {address}\r\nContent-Length: 9\r\n\r\n"
        upload = connect(address, head.encode())
        for _ in range(2):  # the second does not wait for the upload
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
        assert b" 503 " in received(upload)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and json.loads(output)["images"] == 1
    assert b"Traceback" not in errors


# ---------------------------------------------------------------------------------------- browser


def drop_or_paste(page, path, way):
    content = list(path.read_bytes())
    page.evaluate(
        """([way, name, content]) => {
            const data = new DataTransfer(), bubbles = true;
            data.items.add(new File([new Uint8Array(content)], name));
            document.body.dispatchEvent(way === "drop"
                ? new DragEvent("drop", {dataTransfer: data, bubbles})
                : new ClipboardEvent("paste", {clipboardData: data, bubbles}));
        }""",
        [way, path.name, content],
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["choose", "drop", "paste"])
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
            drop_or_paste(page, photo, way)
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
    with serve(weights) as running:
        host_and_port = running.address
        for _ in range(8):
            assert request(host_and_port, body=PHOTO)[0] == 200
        before = running.peak_mib()
        for i in range(1000):
            body, headers = bad_upload(rng)
            with contextlib.suppress(ConnectionError):  # huge headers: the answer may be cut off
                status, _, answer = request(host_and_port, body=body, headers=headers)
                statuses[status] = statuses.get(status, 0) + 1
                text = answer.get("error", "") if isinstance(answer, dict) else answer
                assert "\n" not in text and "Traceback" not in text and "site-packages" not in text
                assert status != 500, (i, answer)
        assert request(host_and_port, body=PHOTO)[0] == 200
        grown = running.peak_mib() - before
    record_property("statuses", statuses)
    record_property("grown_mib", round(grown))
    print(statuses, f"{grown:.0f} MiB")
    assert grown < 1000
