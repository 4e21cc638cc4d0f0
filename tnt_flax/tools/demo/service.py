# SPDX-License-Identifier: Apache-2.0
"""What the demo answers with: predictions of uploaded images, and their explorers."""

import asyncio
import collections
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np

from tnt_flax.core.errors import InputError, listed
from tnt_flax.data.images import (
    CorruptImageError,
    EmptyFileError,
    HugeImageError,
    UnknownFormatError,
)
from tnt_flax.data.transforms import height_width
from tnt_flax.inference.classifier import Classifier, Outcome
from tnt_flax.tools import explore
from tnt_flax.tools.attention import Tracer
from tnt_flax.weights.read import LoadedWeights

DECODERS = 2  # images decoded at a time: each may need memory for all of its pixels
KEPT_IMAGES, KEPT_PAGES = 64, 4  # for explorers; a page of TNT-S has 7 MB
MAX_TOP = 100
MAX_SCANS = 100  # of a JPEG: a small file with thousands of scans takes hours to decode
JPEG, SCAN = b"\xff\xd8", b"\xff\xda"
STATUS = {EmptyFileError: 400, HugeImageError: 413, UnknownFormatError: 415}  # others: 422

Key, Value = TypeVar("Key"), TypeVar("Value")


class Refused(Exception):
    """A request or an image that is not accepted, with the status code of the answer."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Recent(collections.OrderedDict, Generic[Key, Value]):
    """A dictionary that forgets the items set least recently, beyond `size`."""

    def __init__(self, size: int):
        super().__init__()
        self._size = size

    def __setitem__(self, key: Key, value: Value) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > self._size:
            self.popitem(last=False)


class Batcher:
    """Evaluates what concurrent requests submit in batches of at most `size`.

    While one batch is evaluated, the next one collects: an image on an idle machine does not wait.

    Args:
        evaluate: maps a list of items to the list of their results, in a thread.
        size: of the largest batch.
    """

    def __init__(self, evaluate: Callable[[list[Any]], Sequence[Any]], size: int):
        self._evaluate, self._size = evaluate, size
        self._thread = ThreadPoolExecutor(1)
        self._waiting: collections.deque[tuple[Any, asyncio.Future]] = collections.deque()
        self._task: asyncio.Task | None = None

    async def submit(self, item: Any) -> Any:
        """Returns the result of an item. Raises what `evaluate` raised for its batch."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.append((item, future))
        if self._task is None:
            self._task = loop.create_task(self._evaluate_all())
        return await future

    def close(self) -> None:
        """Forgets the items that are not being evaluated."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _evaluate_all(self):
        loop = asyncio.get_running_loop()
        while self._waiting:
            count = min(self._size, len(self._waiting))
            items, futures = zip(*(self._waiting.popleft() for _ in range(count)), strict=True)
            try:
                results = await loop.run_in_executor(self._thread, self._evaluate, list(items))
                for future, result in zip(futures, results, strict=True):
                    if not future.done():  # its request was cancelled
                        future.set_result(result)
            except Exception as error:
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
        self._task = None


class Service:
    """One model for all requests. Methods are called from one event loop.

    Attributes:
        network: name of the network.
        classes: number and names of the classes, such as "10 classes: 0, 1, 2, 3, 4 and 5 more".
        image_size: (height, width) in pixels that the network reads.
        images: number of images classified.

    Args:
        found: the weights.
        classifier: of the weights.
        batch_size: images evaluated at a time, at most.
        light: explorers have the mean of the heads only.
    """

    def __init__(
        self, found: LoadedWeights, classifier: Classifier, *, batch_size: int = 8, light=False
    ):
        self.network = found.name or type(found.network.model).__name__
        names = classifier.class_names
        self.classes = f"{len(names)} classes: {listed(names)}"
        self.image_size = height_width(classifier.image_size)
        self.images = 0
        self._found, self._classifier, self._light = found, classifier, light
        self._sizes = [1 << i for i in range((batch_size - 1).bit_length() + 1)]
        self._batcher = Batcher(self._classify, batch_size)
        self._tracer = Tracer(found, classifier.variables)
        self._decoders = ThreadPoolExecutor(DECODERS)
        self._kept: Recent[str, tuple[str, np.ndarray]] = Recent(KEPT_IMAGES)
        self._pages: Recent[str, bytes] = Recent(KEPT_PAGES)
        self._exploring = asyncio.Lock()

    def compile(self) -> None:
        """Compiles the program of each batch size."""
        blank = np.zeros_like(self._classifier.preprocess(np.zeros((8, 8, 3), np.uint8)))
        for size in self._sizes:
            self._classifier.classify([blank] * size)

    def close(self) -> None:
        """Forgets the work that has not begun; the process does not end before its threads do."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._batcher.close()

    async def predict(self, name: str, encoded: bytes, top: int, keep: bool) -> dict[str, Any]:
        """Returns the predictions of an encoded image, as JSON.

        Args:
            name: of the image, for its explorer.
            encoded: a file of any format that Pillow decodes.
            top: number of predictions.
            keep: whether to add the address of an explorer.

        Raises:
            Refused: the image cannot be used.
        """
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(self._decoders, self._decode, encoded)
        outcome: Outcome = await self._batcher.submit((pixels, top))
        if outcome.error:
            raise Refused(422, outcome.error)
        self.images += 1
        answer: dict[str, Any] = {"predictions": [p._asdict() for p in outcome.predictions[:top]]}
        if keep:
            key = secrets.token_urlsafe(16)
            self._kept[key] = name, pixels
            answer["explorer"] = f"/explore/{key}"
        return answer

    async def explorer(self, key: str) -> bytes:
        """Returns the page of an image, made on demand. Raises Refused if it is not kept."""
        async with self._exploring:
            if key not in self._pages:
                if key not in self._kept:
                    raise Refused(
                        404, f"only the last {KEPT_IMAGES} images are kept: upload it again"
                    )
                page = await asyncio.to_thread(self._make_page, *self._kept[key])
                self._pages[key] = page
            return self._pages[key]

    def _decode(self, encoded):
        try:
            if encoded.startswith(JPEG) and encoded.count(SCAN) > MAX_SCANS:
                raise Refused(422, f"a JPEG of more than {MAX_SCANS} scans")
            return self._classifier.preprocess(encoded)
        except InputError as error:
            reason = error.__cause__
            if not isinstance(reason, CorruptImageError):
                raise
            raise Refused(STATUS.get(type(reason), 422), str(reason)) from None
        except MemoryError:
            raise Refused(413, "the image needs more memory than there is") from None

    def _classify(self, items):
        pixels, tops = zip(*items, strict=True)
        return self._classifier.classify(pixels, max(tops))

    def _make_page(self, name, pixels):
        data, _ = explore.page_data(
            self._found,
            self._tracer(pixels[None]),
            [name],
            light=self._light,
            labels=self._classifier.class_names,
        )
        return explore.render(data).encode()
