# SPDX-License-Identifier: Apache-2.0
"""The demo's web application: routes, limits of uploads, who is answered; and its server.

Idle connections end, and logging never waits: clients cannot stall the server.
"""

import asyncio
import contextlib
import html
import ipaddress
import logging
import os
import pathlib
import select
import string
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from python_multipart.exceptions import FormParserError
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tnt_flax.tools import explore
from tnt_flax.tools.demo.service import KEPT_IMAGES, MAX_TOP, Refused, Service

FOLDER = pathlib.Path(__file__).parent
MAX_FILES, MAX_BYTES = 32, 32 << 20  # of one request
MAX_BUFFERED = 256 << 20  # bytes of all requests being received or answered
UPLOAD_SECONDS = 30
CONNECTIONS = 512
IDLE_SECONDS = 30
LAST_ANSWERS = 5  # seconds for requests that run when Ctrl-C is pressed
PIPE_BUFFER = 4096  # a pipe that is ready takes at least as many bytes
HOW = "curl --form image=@cat.jpg, or curl --data-binary @cat.jpg"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def make_app(service: Service, local: bool) -> ASGIApp:
    """Returns the ASGI application of the demo.

    Args:
        service: answers the requests.
        local: answer only requests that name this machine as their host, which stops web pages
            that point a name of their own at it (DNS rebinding).
    """
    uploads = Uploads(service)

    async def explorer(request: Request) -> Response:
        page = await service.explorer(request.path_params["key"])
        policy = f"{explore.content_policy()}; frame-ancestors 'none'"
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": policy})

    routes = [
        Route("/", _static(_page(service), "text/html")),
        Route("/script.js", _static(_read(FOLDER / "script.js"), "text/javascript")),
        Route("/predictions.js", _static(_read(explore.PREDICTIONS), "text/javascript")),
        Route("/style.css", _static(_read(FOLDER / "style.css"), "text/css")),
        Route("/explorer.css", _static(_read(explore.STYLE), "text/css")),
        Route("/predict", uploads.predict, methods=["POST"]),
        Route("/explore/{key}", explorer),
    ]
    handlers = {Refused: _refuse, HTTPException: _http_error, Exception: _internal_error}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), local)


def _read(path):
    return path.read_text("utf-8")


def _static(text, media_type):
    async def answer(request: Request) -> Response:
        return Response(text, media_type=media_type)

    return answer


def _page(service):
    height, width = service.image_size
    values = {
        "network": service.network,
        "classes": service.classes,
        "size": f"{width}x{height}",
        "kept": KEPT_IMAGES,
        "megabytes": MAX_BYTES >> 20,
    }
    escaped = {key: html.escape(str(value)) for key, value in values.items()}
    return string.Template(_read(FOLDER / "page.html")).substitute(escaped)


class Uploads:
    """POST /predict, with limits on the size, the number and the duration of uploads."""

    def __init__(self, service: Service):
        self._service = service
        self._buffered = 0  # bytes of all requests

    async def predict(self, request: Request) -> Response:
        """Answers with predictions per image, as JSON.

        The status is 200 if an image was classified, else that of the first one. Raises Refused if
        the request itself is wrong.
        """
        top = _parse_top(request.query_params.get("top", "5"))
        keep = request.query_params.get("explorer") == "1"
        received = [0]  # bytes of this request
        try:
            files = await self._receive(request, received)
            images = await asyncio.gather(
                *(self._answer(name, encoded, top, keep) for name, encoded in files)
            )
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        finally:
            self._buffered -= received[0]
        statuses = [image.pop("status") for image in images]
        answer: dict[str, Any] = {"network": self._service.network, "images": images}
        if 200 in statuses:
            return JSONResponse(answer)
        answer["error"] = f"{images[0]['name']}: {images[0]['error']}"
        return JSONResponse(answer, statuses[0])

    async def _answer(self, name, encoded, top, keep):
        try:
            found = await self._service.predict(name, encoded, top, keep)
            return {"name": name, "status": 200} | found
        except Refused as error:
            return {"name": name, "status": error.status, "error": _printable(str(error))}

    async def _receive(self, request, received):
        """Returns [(name, encoded image)]."""
        try:
            async with asyncio.timeout(UPLOAD_SECONDS):
                try:
                    return await self._parse(request, self._limited(request, received))
                except Refused:
                    # A client that is still sending would see a broken connection, no answer.
                    with contextlib.suppress(RuntimeError, ClientDisconnect):
                        async for _ in request.stream():
                            pass
                    raise
        except TimeoutError:
            raise Refused(408, f"the upload took more than {UPLOAD_SECONDS} s") from None

    async def _limited(self, request: Request, received: list[int]) -> AsyncIterator[bytes]:
        async for chunk in request.stream():
            if received[0] + len(chunk) > MAX_BYTES:
                raise Refused(413, f"more than {MAX_BYTES >> 20} MiB in one request")
            if self._buffered + len(chunk) > MAX_BUFFERED:
                raise Refused(503, "too many uploads at a time: try again")
            received[0] += len(chunk)
            self._buffered += len(chunk)
            yield chunk

    async def _parse(self, request, stream):
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            encoded = b"".join([chunk async for chunk in stream])
            if not encoded:
                raise Refused(400, f"the request has no image: {HOW}")
            return [("image", encoded)]
        try:
            form = await _InMemoryParser(
                request.headers, stream, max_files=MAX_FILES, max_fields=MAX_FILES
            ).parse()
        except (MultiPartException, FormParserError) as error:
            problem = getattr(error, "message", str(error))
            raise Refused(400, f"the form cannot be read: {_printable(problem)}") from None
        try:
            files = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
            if not files:
                raise Refused(400, f"the form has no file: {HOW}")
            return [(_printable(f.filename or "image"), f.file.read()) for f in files]
        finally:
            await form.close()


class _InMemoryParser(MultiPartParser):
    spool_max_size = MAX_BYTES + 1  # never write a temporary file


class Guard:
    """Refuses requests that come from other sites, and adds security headers to every answer."""

    def __init__(self, app: ASGIApp, local: bool):
        self._app, self._local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        app = self._app
        if problem := self._problem(Headers(scope=scope), scope["method"]):
            app = JSONResponse({"error": problem}, 403)
        try:
            await app(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # Ctrl-C
            if not started:
                answer = JSONResponse({"error": "the demo ends"}, 503)
                await answer(scope, receive, send_with_headers)

    def _problem(self, headers, method):
        host = headers.get("host", "")
        if self._local and not is_loopback(_split(f"//{host}").hostname or ""):
            return "the Host header does not name this machine: open the address of the demo"
        if method in ("GET", "HEAD"):
            return ""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        foreign = origin is not None and _split(origin).netloc != host
        if foreign or site not in ("same-origin", "none"):
            return "requests from pages of other sites are refused"
        return ""


def is_loopback(address: str) -> bool:
    """True for an address of this machine that other machines cannot reach."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _split(url):
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _parse_top(text):
    if not (text.isascii() and text.isdecimal() and len(text) < 5 and 1 <= int(text) <= MAX_TOP):
        raise Refused(400, f"top is not a number from 1 to {MAX_TOP}")
    return int(text)


def _printable(text):
    """Returns at most 200 characters on one line."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])


async def _refuse(request: Request, error: Refused) -> Response:
    headers = {503: {"Retry-After": "1"}, 408: {"Connection": "close"}}.get(error.status)
    return JSONResponse({"error": str(error)}, error.status, headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{error.detail}: GET / is the page, POST /predict takes images"
    return JSONResponse({"error": message}, error.status_code, error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "the server failed; its terminal has the reason"}, 500)


# ------------------------------------------------------------------------------------- server


def make_server(app: ASGIApp) -> uvicorn.Server:
    """Returns the server of an application. It logs failures, not what clients do."""
    options = dict(access_log=False, log_config=None, log_level="error", server_header=False)
    options |= dict(http=HttpProtocol, ws="none", lifespan="off")
    options |= dict(limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=LAST_ANSWERS)
    return uvicorn.Server(uvicorn.Config(app, **options))


class HttpProtocol(H11Protocol):
    """HTTP that drops a connection without a new request for `IDLE_SECONDS` to twice as long.

    Includes clients that never finish a header and those that do not read a response, for which
    uvicorn has no timeout. h11, unlike httptools, limits the size of headers.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._check_later()

    def _check_later(self):
        idle = self.cycle is None or self.cycle.response_complete
        self.loop.call_later(IDLE_SECONDS, self._drop_if_idle, idle, self.cycle)

    def _drop_if_idle(self, idle, cycle):
        """Gets the state of `IDLE_SECONDS` ago; a cycle is one request and its response."""
        if self not in self.connections:
            return
        if idle and self.cycle is cycle:
            self.transport.abort()
        else:
            self._check_later()


class _NonBlockingHandler(logging.Handler):
    """Writes to stderr. While stderr is a full pipe or a paused terminal, messages are lost."""

    def emit(self, record: logging.LogRecord) -> None:
        data = f"{self.format(record)}\n".encode(errors="backslashreplace")
        with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr is closed, or None
            file = sys.stderr.fileno()
            for start in range(0, len(data), PIPE_BUFFER):
                if not select.select([], [file], [], 0)[1]:
                    return
                os.write(file, data[start : start + PIPE_BUFFER])


@contextlib.contextmanager
def log_without_blocking() -> Iterator[None]:
    """Logs and warns by a handler that never blocks, so that clients cannot stall the server."""
    loggers = [logging.getLogger(), logging.getLogger("tnt_flax")]
    before = [each.handlers for each in loggers]
    handler = _NonBlockingHandler()
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # the client gets the reason
    logging.captureWarnings(True)
    try:
        for each in loggers:
            each.handlers = [handler]
        yield
    finally:
        logging.captureWarnings(False)
        for each, handlers in zip(loggers, before, strict=True):
            each.handlers = handlers
