"""Who computes next, in the process that computes: requests first, jobs in between."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from tmca.imaging.given import ImageSource
from tmca.inference import EncodedImage, Predictor, Question
from tmca.prediction import Prediction


class Turns:
    """Who may compute: one at a time, requests before jobs."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._busy = False
        self._urgent = 0

    @contextlib.contextmanager
    def urgent(self) -> Iterator[None]:
        """Compute as soon as whoever computes has finished."""
        with self._condition:
            self._urgent += 1
            self._condition.wait_for(lambda: not self._busy)
            self._urgent -= 1
            self._busy = True
        try:
            yield
        finally:
            self._end()

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Compute when nobody else wants to."""
        with self._condition:
            self._condition.wait_for(lambda: not self._busy and not self._urgent)
            self._busy = True
        try:
            yield
        finally:
            self._end()

    def _end(self) -> None:
        with self._condition:
            self._busy = False
            self._condition.notify_all()


class JobCancelled(BaseException):
    """Ends a batch, which goes on after every other exception."""


class PatientPredictor(Predictor):
    """The same models for a job: computes when no request waits, and ends when the job is cancelled."""

    def __init__(self, predictor: Predictor, turns: Turns, cancelled: threading.Event) -> None:
        self.__dict__.update(predictor.__dict__)
        self.names = tuple(Path(name).name for name in predictor.names)
        self._turns = turns
        self._cancelled = cancelled

    def encode(self, images: Sequence[ImageSource]) -> list[EncodedImage]:
        """Encode in turn."""
        with self._turn():
            return super().encode(images)

    def answer(self, questions: Sequence[Question]) -> list[Prediction]:
        """Answer in turn."""
        with self._turn():
            return super().answer(questions)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        with self._turns.patient():
            if self._cancelled.is_set():
                raise JobCancelled
            yield
