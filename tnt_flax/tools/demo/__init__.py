# SPDX-License-Identifier: Apache-2.0
"""Serves a page on this machine that classifies images and explores attention.

    tnt-flax demo tnt_s_81.5.pth.tar
    curl --form image=@cat.jpg http://127.0.0.1:8000/predict

Open the address that is printed, and drop, paste or choose images. Other machines are not answered
unless --host is given. Uploads stay in memory. Ctrl-C ends the command: requests that run get 5
seconds, or none after a second Ctrl-C. Exit code 1 means that the port is in use, 2 that the input
was wrong.
"""

import argparse
import contextlib
import errno
import logging
import socket
from typing import Any

from tnt_flax.core.errors import InputError, RunError, require_extras
from tnt_flax.runtime import host
from tnt_flax.tools.command_line import Parser, policy_arguments, positive, read_weights

logger = logging.getLogger(__name__)
LOCALHOST = "127.0.0.1"
BACKLOG = 512  # connections that wait to be accepted
PIXELS = 50_000_000  # of the largest image by default: two of them are decoded at a time


def add_arguments(parser: Parser) -> None:
    parser.add_weights()
    add = parser.add_argument
    add("--port", type=_port, default=8000, help="0 picks a free one")
    add("--host", default=LOCALHOST, metavar="ADDRESS", help="0.0.0.0 or :: answers other machines")
    add("--batch-size", type=positive, default=8, help="images evaluated at a time, at most")
    add("--class-list", help="file with one class name per line")
    add("--light", action="store_true", help="explorers show the mean of the heads only")
    parser.add_policy()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serves until Ctrl-C; returns the JSON object of the last line.

    Raises:
        InputError: the weights are wrong or have no head, or the host is no address here.
        RunError: the port is in use.
    """
    require_extras("tnt-flax demo", "demo")
    from tnt_flax.data.sources.names import read_class_list
    from tnt_flax.inference.classifier import Classifier
    from tnt_flax.tools.demo.app import is_loopback, log_without_blocking, make_app, make_server
    from tnt_flax.tools.demo.service import Service

    host.cache_compilations()
    with listen(args.host, args.port) as listener:
        found = read_weights(args)
        policy = policy_arguments(args)
        if policy["max_pixels"] is None:
            policy["max_pixels"] = PIXELS
        names = read_class_list(args.class_list) if args.class_list else None
        classifier = Classifier(found, names, **policy)
        classifier.check_head()
        logger.info(f"compiling {found.summary()}")
        service = Service(found, classifier, batch_size=args.batch_size, light=args.light)
        service.compile()
        local = is_loopback(listener.getsockname()[0])
        server = make_server(make_app(service, local))
        url = _url(listener)
        if not local:
            logger.warning(
                f"--host={args.host} answers every machine that reaches this one, without a "
                "password or encryption"
            )
        with contextlib.suppress(KeyboardInterrupt), log_without_blocking():
            logger.info(f"open {url} (Ctrl-C ends)")
            server.run([listener])
        service.close()
    return {"url": url, "images": service.images}


def listen(address: str, port: int) -> socket.socket:
    """Returns a socket that listens.

    Raises:
        InputError: the machine does not have the address.
        RunError: the port is in use, or needs other permissions.
    """
    address = address.removeprefix("[").removesuffix("]")
    if not address:  # would be all addresses
        raise InputError("--host is empty: give an address of this machine, such as 127.0.0.1")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror.partition(" (while")[0]
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise InputError(
                f"--host={address}: {reason}: give an address of this machine, such as 127.0.0.1"
            ) from None
        raise RunError(
            f"cannot listen on {address}, port {port}: {reason}: give another --port, "
            "or --port=0 for a free one"
        ) from None


def _url(listener):
    """Returns an address that a browser on this machine can open."""
    address, port = listener.getsockname()[:2]
    address = {"0.0.0.0": LOCALHOST, "::": "::1"}.get(address, address)
    return f"http://[{address}]:{port}/" if ":" in address else f"http://{address}:{port}/"


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: give 0 to 65535")
    return int(text)
