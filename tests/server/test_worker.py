from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import BOTTOM, IMAGE, LEFT, MODEL, wait_until

from tmca.errors import CheckpointError
from tmca.imaging import rle
from tmca.imaging.frames import Frame, Geometry
from tmca.prediction import ALL_EFFECTS, PredictionOptions
from tmca.server.memory import Memory, Seen
from tmca.server.messages import (
    Answered,
    Ask,
    Cancel,
    Count,
    Failure,
    Form,
    FromWorker,
    Look,
    Measured,
    Models,
    WorkerSettings,
)
from tmca.server.problems import TooLargeError
from tmca.server.turns import Turns
from tmca.server.worker import Worker, _check_values


class Outbox(list[FromWorker]):
    """What the worker told."""

    def of(self, kind: type) -> list[Any]:
        return [message for message in self if isinstance(message, kind)]

    def answer(self, id_: int | str) -> Answered | Failure:
        wait_until(lambda: any(getattr(message, "id", None) == id_ for message in self))
        return next(message for message in self if getattr(message, "id", None) == id_)  # type: ignore[return-value]


@pytest.fixture
def outbox() -> Outbox:
    return Outbox()


@pytest.fixture
def worker(outbox: Outbox) -> Worker:
    """Return a worker whose thread that computes is not started yet."""
    return Worker(WorkerSettings({"small": str(MODEL)}, "cpu", max_batch=4), outbox.append)


def _ask(id_: int, *texts: str | None, digest: str = "d", seconds: float = 60.0, **fields: Any) -> Ask:
    values: dict[str, Any] = {
        "model": "small", "path": IMAGE, "digest": digest, "frame": None, "texts": texts or (LEFT,),
        "options": PredictionOptions(), "form": Form.JSON, "deadline": time.monotonic() + seconds,
    }  # fmt: skip
    return Ask(id_, **(values | fields))


def _compute(worker: Worker) -> None:
    threading.Thread(target=worker.compute, daemon=True).start()


@pytest.mark.parametrize(("side", "sentences", "effects", "fits"), [
    (10_000, 1, 1, True), (10_000, 2, 1, True), (10_000, 3, 1, False), (5_000, 16, 0, True), (5_000, 16, 1, False),
])  # fmt: skip
def test_what_does_not_fit_into_memory_is_refused_before_it_is_computed(
    side: int, sentences: int, effects: int, fits: bool
):
    ask = _ask(1, *(str(number) for number in range(sentences)))
    ask = replace(ask, options=PredictionOptions(effects=ALL_EFFECTS[:effects]))
    pixels = np.broadcast_to(np.uint8(0), (side, side, 3))
    frame = Frame(pixels, Geometry((side, side)))
    if fits:
        _check_values(ask, frame)
    else:
        with pytest.raises(TooLargeError, match="more than fit into memory"):
            _check_values(ask, frame)


def test_requests_that_wait_are_answered_together(worker: Worker, outbox: Outbox):
    for id_, digest in enumerate("aabc", start=1):
        worker.receive(_ask(id_, LEFT if id_ % 2 else BOTTOM, digest=digest))
    wait_until(lambda: len(worker._ready) == 4)
    _compute(worker)
    answers = [outbox.answer(id_) for id_ in range(1, 5)]
    (measured,) = outbox.of(Measured)
    assert (measured.questions, measured.encoded) == (4, 3)
    masks = [rle.decode_mask(answer.value["predictions"][0]["mask"]) for answer in answers]
    assert np.array_equal(masks[0], masks[2])
    assert not np.array_equal(masks[0], masks[1])


def test_a_batch_is_not_larger_than_allowed_and_none_is_left(worker: Worker, outbox: Outbox):
    for id_ in range(1, 8):
        worker.receive(_ask(id_, LEFT, BOTTOM))
    wait_until(lambda: len(worker._ready) == 7)
    _compute(worker)
    assert all(isinstance(outbox.answer(id_), Answered) for id_ in range(1, 8))
    assert max(measured.questions for measured in outbox.of(Measured)) == 4


def test_one_request_may_hold_more_sentences_than_a_batch(worker: Worker, outbox: Outbox):
    _compute(worker)
    worker.receive(_ask(1, *(LEFT,) * 9))
    assert len(outbox.answer(1).value["predictions"]) == 9


def test_a_request_at_fault_does_not_take_others_with_it(
    worker: Worker, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
):
    predictor = worker._served["small"].predictor
    answer = predictor.answer

    def fails(questions: Any) -> Any:
        if any(question.text == "poison" for question in questions):
            raise MemoryError
        return answer(questions)

    monkeypatch.setattr(predictor, "answer", fails)
    for id_, text in enumerate((LEFT, "poison", BOTTOM), start=1):
        worker.receive(_ask(id_, text))
    wait_until(lambda: len(worker._ready) == 3)
    _compute(worker)
    assert isinstance(outbox.answer(1), Answered)
    assert isinstance(outbox.answer(3), Answered)
    failure = outbox.answer(2)
    assert (failure.status, failure.code) == (500, "runtime_error")
    assert "poison" not in failure.message


def test_nobody_computes_what_nobody_waits_for(worker: Worker, outbox: Outbox):
    worker.receive(_ask(1))
    worker.receive(_ask(2))
    worker.receive(_ask(3, seconds=0.3))
    wait_until(lambda: len(worker._ready) == 3)
    worker.receive(Cancel(1))
    time.sleep(0.4)
    _compute(worker)
    assert isinstance(outbox.answer(2), Answered)
    assert (outbox.answer(3).status, outbox.answer(3).code) == (504, "deadline_exceeded")
    assert [measured.questions for measured in outbox.of(Measured)] == [1]
    assert not any(getattr(message, "id", None) == 1 for message in outbox)
    worker.receive(Cancel(2))  # too late
    assert worker._wanted == set()


def test_other_questions_are_answered_beside(worker: Worker, outbox: Outbox):
    worker.receive(Look(1, IMAGE, "d", None, time.monotonic() + 9))
    worker.receive(Count(2, "small", LEFT))
    looked = outbox.answer(1).value
    assert (looked.frames, looked.size, looked.kind) == (1, (96, 96), "picture")
    tokens, truncated, limit = outbox.answer(2).value
    assert 5 < tokens <= limit
    assert not truncated
    worker.receive(Count(3, "other", LEFT))
    assert outbox.answer(3).code == "invalid_config"


def test_a_changed_folder_is_loaded_again_and_a_broken_one_is_not(tmp_path: Path, outbox: Outbox):
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    worker = Worker(WorkerSettings({"small": str(folder)}, "cpu", reload_seconds=0.05), outbox.append)
    threading.Thread(target=worker.watch, daemon=True).start()
    _compute(worker)
    worker.receive(_ask(1))
    assert isinstance(outbox.answer(1), Answered)

    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    wait_until(lambda: bool(outbox.of(Models)[-1].states[0].problem))
    worker.receive(_ask(2))
    assert isinstance(outbox.answer(2), Answered)
    assert outbox.of(Models)[-1].states[0].generation == 1

    weights.write_bytes(whole)
    wait_until(lambda: outbox.of(Models)[-1].states[0].generation == 2)
    assert outbox.of(Models)[-1].states[0].problem == ""
    worker.receive(_ask(3))
    assert isinstance(outbox.answer(3), Answered)
    assert outbox.of(Measured)[-1].encoded == 1  # by the new model


def test_a_model_that_cannot_be_loaded_is_explained(tmp_path: Path, outbox: Outbox):
    with pytest.raises(CheckpointError):
        Worker(WorkerSettings({"none": str(tmp_path / "missing")}, "cpu"), outbox.append)


def test_memory_is_bounded_and_forgets_what_was_not_asked_for_longest(worker: Worker):
    predictor = worker._served["small"].predictor
    from tmca.imaging.reading import read_frames

    frame = next(iter(read_frames(IMAGE).only(None)))
    (encoded,) = predictor.encode([frame])
    seen = Seen(frame, encoded)
    memory = Memory(3 * seen.nbytes)
    for key in "abc":
        memory.put((key,), seen)
    assert memory.get(("a",)) is seen
    memory.put(("d",), seen)
    assert memory.nbytes == 3 * seen.nbytes
    assert memory.get(("b",)) is None
    assert memory.get(("a",)) is memory.get(("c",)) is memory.get(("d",)) is seen
    memory.put(("d",), seen)
    assert memory.nbytes == 3 * seen.nbytes


def test_a_job_lets_requests_go_first():
    turns = Turns()
    order: list[str] = []

    def run(turn: Callable[[], Any], name: str) -> threading.Thread:
        def work() -> None:
            with turn():
                order.append(name)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    with turns.patient():
        threads = [run(turns.patient, "job"), run(turns.urgent, "request"), run(turns.urgent, "request")]
        wait_until(lambda: turns._urgent == 2)
    for thread in threads:
        thread.join(5)
    assert order == ["request", "request", "job"]
