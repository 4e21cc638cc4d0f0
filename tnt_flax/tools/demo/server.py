# SPDX-License-Identifier: Apache-2.0
"""What keeps the demo's server responsive: idle connections end, and logging never waits."""

import contextlib
import logging
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 512
IDLE_SECONDS = 30
LAST_ANSWERS = 5  # seconds for requests that run when Ctrl-C is pressed
PIPE_BUFFER = 4096  # a pipe that is ready takes at least as many bytes


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
