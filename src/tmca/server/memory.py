"""The images that the server was asked about last, decoded and encoded: a further sentence costs little."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from tmca.imaging.frames import Frame
from tmca.inference import EncodedImage


@dataclass(frozen=True, eq=False)
class Seen:
    """An image that may be asked again."""

    frame: Frame
    encoded: EncodedImage

    @property
    def nbytes(self) -> int:
        """Size of its pixels and features."""
        return self.frame.pixels.nbytes + self.encoded.nbytes


class Memory:
    """The images that were asked last, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: OrderedDict[tuple[Any, ...], Seen] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def get(self, key: tuple[Any, ...]) -> Seen | None:
        """Return what is known of an image."""
        with self._lock:
            if key in self._seen:
                self._seen.move_to_end(key)
            return self._seen.get(key)

    def put(self, key: tuple[Any, ...], seen: Seen) -> None:
        """Remember an image, and forget those that were not asked for longest."""
        with self._lock:
            if key in self._seen:
                self.nbytes -= self._seen.pop(key).nbytes
            self._seen[key] = seen
            self.nbytes += seen.nbytes
            while self.nbytes > self._limit and self._seen:
                _, forgotten = self._seen.popitem(last=False)
                self.nbytes -= forgotten.nbytes
