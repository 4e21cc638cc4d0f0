# SPDX-License-Identifier: Apache-2.0
"""Load on `tnt-flax demo`: many clients on this machine send photographs to POST /predict.

    python -m benchmarks demo
    python -m benchmarks demo --weights=runs/digits --clients=8 --requests=500

The server is a process of its own. Each client keeps one connection and sends its next request when
it has the answer to the last one. Clients and server share the cores. Photographs are synthetic, of
about 110 kB, and the weights are random unless given. A request is lost if it gets no answer, or
another one than 200 with predictions. `latency_ms` counts from the first byte sent to the last byte
received; `server_mib` is the server's largest resident memory.
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from tnt_flax.core.errors import RunError
from tnt_flax.models import create_model
from tnt_flax.tools.command_line import positive
from tnt_flax.weights import write

PHOTOS = 64


class Server(NamedTuple):
    """A running `tnt-flax demo`."""

    address: str  # host:port
    pid: int

    def peak_mib(self) -> float:
        """Returns the largest resident memory so far."""
        status = pathlib.Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--weights", help="weights; by default random ones of --model")
    add("--model", default="tnt_ti_patch16_224", help="one of tnt_flax.list_models()")
    add("--clients", type=positive, default=64, help="concurrent clients")
    add("--requests", type=positive, default=2000, help="requests of all clients")


def measure_demo(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the JSON result."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        harness.generate_photos(folder, PHOTOS)
        photos = [path.read_bytes() for path in sorted(folder.iterdir())]
        weights = args.weights or _random_weights(args.model, folder / "random.safetensors")
        with serve(weights) as server:
            start = time.perf_counter()
            latencies = _send_all(server.address, photos, args.clients, args.requests)
            seconds, peak = time.perf_counter() - start, server.peak_mib()
    answered = [latency for latency in latencies if latency is not None]
    percentiles = np.percentile(answered or [np.nan], [50, 95, 99, 100])
    return {
        "requests": len(latencies),
        "lost": len(latencies) - len(answered),
        "clients": args.clients,
        "images_per_second": round(len(answered) / seconds, 1),
        "latency_ms": {
            name: round(1e3 * value, 1)
            for name, value in zip(("p50", "p95", "p99", "max"), percentiles.tolist(), strict=True)
        },
        "server_mib": round(peak),
        "weights": args.weights or args.model,
        "cores": len(os.sched_getaffinity(0)),
        "versions": harness.versions("jax", "starlette", "uvicorn"),
    }


@contextlib.contextmanager
def serve(weights: str | pathlib.Path, *options: str) -> Iterator[Server]:
    """Runs `tnt-flax demo` on a free port. Raises RunError if it does not start."""
    command = [sys.executable, "-m", "tnt_flax", "demo", str(weights), "--port=0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            lines = []
            for line in map(bytes.decode, process.stderr):
                lines.append(line)
                if found := re.match(r"open (http://\S+)", line):
                    # An unread pipe fills up and blocks the server's next message.
                    drain = threading.Thread(target=process.stderr.read, daemon=True)
                    drain.start()
                    yield Server(urlsplit(found[1]).netloc, process.pid)
                    break
            else:
                raise RunError(f"tnt-flax demo did not start: {' '.join(lines[-1:])}")
        finally:
            process.send_signal(signal.SIGINT)


def _send_all(address, photos, clients, requests):
    """Returns the latency of each request in seconds; None for lost ones."""
    numbers = iter(range(requests))  # `next` of a range's iterator is atomic

    def client(_):
        connection, latencies = http.client.HTTPConnection(address, timeout=600), []
        for number in numbers:
            start = time.perf_counter()
            try:
                connection.request("POST", "/predict", photos[number % len(photos)])
                answer = connection.getresponse()
                body = json.loads(answer.read())
                answered = answer.status == 200 and body["images"][0]["predictions"]
            except (OSError, http.client.HTTPException, ValueError):
                connection.close()
                answered = False
            latencies.append(time.perf_counter() - start if answered else None)
        connection.close()
        return latencies

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return [latency for own in pool.map(client, range(clients)) for latency in own]


def _random_weights(name, path):
    """Writes initial weights of a network."""
    size = int(name[-3:])
    model = create_model(name)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_fraction": 0.9}
    info = {"config": {"model": {"name": name}, "data": {"image_size": size} | preprocessing}}
    write.save_weights(path, variables["params"], info)
    return path
