from __future__ import annotations

import asyncio
import errno
import io
import json
import shutil
import sqlite3
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving import BOTTOM, IMAGE, KEY, LEFT, MODEL, wait_until
from starlette.testclient import TestClient

from tmca.batch import BatchOptions, predict_batch
from tmca.errors import StorageError
from tmca.files import replace_file, replace_folder
from tmca.inference import Predictor
from tmca.jobs import make_jobs
from tmca.server import ServerSettings, create_app
from tmca.server.engine import Engine
from tmca.server.job_store import (
    CANCELLED,
    DONE,
    FAILED,
    MOST_ATTEMPTS,
    QUEUED,
    RESERVE,
    RESERVE_BYTES,
    RUNNING,
    JobRequest,
    JobState,
    JobStore,
)
from tmca.server.jobs import JobRunner
from tmca.server.messages import Answered, Failure, FromWorker, Work, WorkerSettings
from tmca.server.problems import BusyError, ConflictError, NotFoundError
from tmca.server.service import Service
from tmca.server.uploads import SentNames, remove_folder
from tmca.server.worker import Worker

REQUEST = JobRequest("small", ("a.png", "b.png"), prompt="John Smith's polyp", types=("png",))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(tmp_path / "data")
    yield store
    store.close()


def _add(store: JobStore, token: str | None = None, limit: int = 100) -> JobState:
    id_ = store.new_id()
    (store.make_folder(id_) / "a.png").write_bytes(b"1")
    return store.add(id_, REQUEST, 2, token, limit)


# --- the store ---


def test_what_a_late_worker_writes_for_a_removed_job_is_deleted(store: JobStore):
    job = _add(store)
    store.finish(job.id, CANCELLED, {})
    store.remove(job.id)
    late = store.path(job.id) / "output"
    late.mkdir(parents=True)
    (late / "patient.dcm").write_bytes(b"x")
    store.remove_old(3600.0)
    assert not store.path(job.id).exists()


def test_a_job_is_kept_as_it_was_asked(store: JobStore):
    job = _add(store)
    assert store.get(job.id) == job
    assert (job.status, job.request, job.total, job.attempts) == (QUEUED, REQUEST, 2, 0)
    assert "Smith" not in json.dumps(job.as_dict(0))


def test_a_clients_own_name_makes_one_job_of_two(store: JobStore):
    first = _add(store, "ward-7")
    assert _add(store, "ward-7").id == first.id
    assert store.counts()[QUEUED] == 1


@pytest.mark.parametrize("status", [FAILED, CANCELLED])
def test_a_job_that_came_to_nothing_leaves_its_clients_name_free(store: JobStore, status: str):
    first = _add(store, "ward-7")
    store.finish(first.id, status, {})
    second = _add(store, "ward-7")
    assert (second.id != first.id, second.status) == (True, QUEUED)
    assert _add(store, "ward-7").id == second.id


def test_a_known_request_is_answered_however_many_wait(store: JobStore):
    first = _add(store, "ward-7")
    assert _add(store, "ward-7", limit=1).id == first.id


def test_the_job_that_waited_longest_is_next(store: JobStore):
    first, second = _add(store), _add(store)
    running = store.next()
    assert running is not None
    assert (running.id, running.status, running.attempts) == (first.id, RUNNING, 1)
    assert getattr(store.next(), "id", None) == second.id
    assert store.next() is None


def test_too_many_waiting_jobs_are_refused(store: JobStore):
    _add(store, limit=1)
    with pytest.raises(BusyError) as caught:
        _add(store, limit=1)
    assert caught.value.headers["Retry-After"] == "60"


def test_a_killed_servers_job_waits_again_and_what_was_not_accepted_goes(store: JobStore):
    job = _add(store)
    store.next()
    left = store.make_folder(store.new_id())  # it was being sent
    store.recover()
    assert store.get(job.id).status == QUEUED
    assert not left.parent.exists()
    assert (store.path(job.id) / "input" / "a.png").exists()


def test_what_else_lies_in_the_folder_is_left_alone(tmp_path: Path):
    others = [tmp_path / "study" / "scan.nii", tmp_path / "jobs" / "mine" / "notes.txt"]
    for file in others:
        file.parent.mkdir(parents=True)
        file.write_text("precious")
    store = JobStore(tmp_path)
    store.recover()
    store.close()
    assert all(file.exists() for file in others)


def test_a_job_of_an_earlier_version_is_finished(store: JobStore):
    job = _add(store)
    store.path(job.id).rename(store.folder / job.id)  # it lay beside the database
    store.recover()
    assert (store.path(job.id) / "input" / "a.png").exists()


def test_a_job_that_was_interrupted_too_often_is_reported(store: JobStore):
    job = _add(store)
    for _ in range(MOST_ATTEMPTS):
        store.next()
        store.recover()
    found = store.get(job.id)
    assert found.status == FAILED
    assert found.outcome["error"]["code"] == "interrupted"


def test_a_server_that_stops_in_order_costs_no_attempt(store: JobStore):
    job = _add(store)
    store.next()
    store.put_back(job.id)
    assert (store.get(job.id).status, store.get(job.id).attempts) == (QUEUED, 0)


def test_the_first_end_of_a_job_stands(store: JobStore):
    job = _add(store)
    store.next()
    store.finish(job.id, CANCELLED, {})
    store.finish(job.id, DONE, {"cases_done": 2})
    store.put_back(job.id)
    assert store.get(job.id).status == CANCELLED


def test_what_a_killed_worker_left_unfinished_is_not_handed_out(store: JobStore):
    job = _add(store)
    output = store.path(job.id) / "output"
    with replace_file(output / "a.png") as file, replace_folder(output / "series") as folder:
        file.write_bytes(b"1")
        (folder / "1.dcm").write_bytes(b"1")
    file.write_bytes(b"half")
    folder.mkdir()
    (folder / "1.dcm").write_bytes(b"half")
    store.finish(job.id, DONE, {})
    assert sorted(zipfile.ZipFile(store.result(job.id)).namelist()) == ["a.png", "series/1.dcm"]
    assert not file.exists()
    assert not folder.exists()


def test_only_a_finished_job_is_deleted_with_its_files(store: JobStore):
    job = _add(store)
    with pytest.raises(ConflictError):
        store.remove(job.id)
    store.finish(job.id, DONE, {})
    store.remove(job.id)
    assert not store.path(job.id).exists()
    with pytest.raises(NotFoundError):
        store.get(job.id)


def test_old_jobs_are_forgotten_and_new_ones_kept(store: JobStore):
    finished, waiting = _add(store), _add(store)
    store.finish(finished.id, DONE, {})
    store.remove_old(60.0)
    assert store.get(finished.id)
    time.sleep(0.01)
    store.remove_old(0.0)
    assert store.get(waiting.id)
    with pytest.raises(NotFoundError):
        store.get(finished.id)


def test_two_servers_do_not_share_a_folder(store: JobStore):
    with pytest.raises(StorageError, match="Another server"):
        JobStore(store.folder)


def test_a_closed_servers_folder_is_free(tmp_path: Path):
    JobStore(tmp_path).close()
    JobStore(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        JobStore(tmp_path / "file" / "data")


def test_a_database_that_is_none_is_explained(tmp_path: Path):
    (tmp_path / "jobs.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(StorageError):
        JobStore(tmp_path)
    (tmp_path / "jobs.sqlite").unlink()
    (tmp_path / "jobs.sqlite").mkdir()
    with pytest.raises(StorageError):
        JobStore(tmp_path)


def test_a_full_disk_is_explained_and_nothing_is_half_accepted(store: JobStore, monkeypatch: pytest.MonkeyPatch):
    class Full:
        def execute(self, query: str, values: Any = ()) -> Any:
            if query.startswith("INSERT"):
                raise sqlite3.OperationalError("database or disk is full")
            return database.execute(query, values)

    database = store._database
    monkeypatch.setattr(store, "_database", Full())
    with pytest.raises(StorageError, match="full"):
        _add(store)
    monkeypatch.undo()
    assert store.counts()[QUEUED] == 0


class _FullDisk:
    """A database on a disk that is full as long as the reserve, or a job's folder, is there."""

    def __init__(self, store: JobStore, *, until: Callable[[], bool] | None = None) -> None:
        self.database = store._database
        self.has_room = until or (lambda: not (store.folder / RESERVE).exists())

    def execute(self, query: str, values: Any = ()) -> Any:
        if query.startswith(("INSERT", "UPDATE", "DELETE")) and not self.has_room():
            raise sqlite3.OperationalError("database or disk is full")
        return self.database.execute(query, values)

    def close(self) -> None:
        self.database.close()


def _fill(store: JobStore, monkeypatch: pytest.MonkeyPatch, *, until: Callable[[], bool] | None = None) -> None:
    assert (store.folder / RESERVE).exists()
    monkeypatch.setattr(store, "_database", _FullDisk(store, until=until))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=2**30, free=0))


def test_a_reserve_is_kept_and_is_really_there(store: JobStore):
    status = (store.folder / RESERVE).stat()
    assert status.st_size == RESERVE_BYTES
    assert status.st_blocks * 512 >= RESERVE_BYTES


def test_the_end_of_a_job_is_noted_on_a_full_disk(store: JobStore, monkeypatch: pytest.MonkeyPatch):
    job = _add(store)
    store.next()
    _fill(store, monkeypatch)
    store.finish(job.id, DONE, {"cases_done": 2})
    monkeypatch.undo()
    assert store._rows("SELECT status FROM jobs WHERE id = ?", job.id)[0]["status"] == DONE
    assert not (store.folder / RESERVE).exists()
    store.remove_old(3600.0)
    assert (store.folder / RESERVE).stat().st_size == RESERVE_BYTES


def test_a_job_is_removed_on_a_full_disk(store: JobStore, monkeypatch: pytest.MonkeyPatch):
    job = _add(store)
    store.finish(job.id, DONE, {})
    _fill(store, monkeypatch)
    store.remove(job.id)
    with pytest.raises(NotFoundError):
        store.get(job.id)


def test_the_files_of_a_job_make_room_for_its_removal(store: JobStore, monkeypatch: pytest.MonkeyPatch):
    job = _add(store)
    store.finish(job.id, DONE, {})
    _fill(store, monkeypatch, until=lambda: not store.path(job.id).exists())
    store.remove(job.id)
    with pytest.raises(NotFoundError):
        store.get(job.id)
    assert list(store.folders.iterdir()) == []


def test_the_files_of_a_job_go_even_where_its_row_must_stay(store: JobStore, monkeypatch: pytest.MonkeyPatch):
    job = _add(store)
    store.finish(job.id, DONE, {"cases_done": 2})
    _fill(store, monkeypatch, until=lambda: False)
    with pytest.raises(StorageError, match="full"):
        store.remove(job.id)
    assert not store.path(job.id).exists()
    assert store.get(job.id).as_dict(store.done(job.id))["cases_done"] == 2
    with pytest.raises(NotFoundError):
        store.result(job.id)
    monkeypatch.undo()
    store.remove_old(3600.0)
    with pytest.raises(NotFoundError):
        store.get(job.id)


def test_a_removal_that_was_interrupted_is_finished_by_the_next_server(store: JobStore):
    done, waiting, half = _add(store), _add(store), _add(store)
    for job in (done, half):
        store.finish(job.id, DONE, {})
    remove_folder(store.path(done.id))
    store.path(half.id).rename(store.folders / f"{half.id}.removed")
    remove_folder(store.path(waiting.id))  # that was nobody of us
    store.recover()
    assert (store.counts()[DONE], list(store.folders.iterdir())) == (0, [])
    assert store.get(waiting.id).outcome["error"]["code"] == "files_missing"


def test_a_killed_servers_jobs_are_taken_up_on_a_full_disk(store: JobStore, monkeypatch: pytest.MonkeyPatch):
    job = _add(store)
    store.next()
    _fill(store, monkeypatch)
    store.recover()
    assert store.get(job.id).status == QUEUED


def test_a_server_starts_whose_jobs_cannot_be_taken_up_yet(store: JobStore, monkeypatch: pytest.MonkeyPatch):
    job = _add(store)
    store.next()
    _fill(store, monkeypatch, until=lambda: False)
    store.recover()
    with pytest.raises(StorageError):
        store.next()
    monkeypatch.undo()
    assert getattr(store.next(), "id", None) == job.id


def test_a_database_is_opened_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    JobStore(tmp_path).close()
    assert (tmp_path / RESERVE).exists()
    connect = sqlite3.connect

    def full(*arguments: Any, **options: Any) -> sqlite3.Connection:
        if (tmp_path / RESERVE).exists():
            raise sqlite3.OperationalError("database or disk is full")
        return connect(*arguments, **options)

    monkeypatch.setattr("sqlite3.connect", full)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=2**30, free=0))
    JobStore(tmp_path).close()


def test_a_server_has_its_temporary_folder_on_a_full_disk(
    make_settings: Callable[..., ServerSettings], monkeypatch: pytest.MonkeyPatch
):
    settings = make_settings()
    JobStore(settings.data).close()
    assert (settings.data / RESERVE).exists()
    make = tempfile.mkdtemp

    def full(**options: Any) -> str:
        if (settings.data / RESERVE).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return make(**options)

    monkeypatch.setattr("tempfile.mkdtemp", full)
    service = Service(settings)
    service.store.close()
    assert service.temporary.is_dir()
    remove_folder(service.temporary)


def test_nothing_is_begun_on_a_full_disk(store: JobStore, monkeypatch: pytest.MonkeyPatch):
    job = _add(store)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=2**30, free=0))
        with pytest.raises(StorageError, match="No space left"):
            store.next()
    assert getattr(store.next(), "id", None) == job.id


def test_an_end_that_cannot_be_noted_is_told_and_noted_later(store: JobStore, monkeypatch: pytest.MonkeyPatch):
    job = _add(store)
    store.next()
    _fill(store, monkeypatch, until=lambda: False)
    store.finish(job.id, CANCELLED, {})
    store.finish(job.id, DONE, {"cases_done": 2})
    assert store.get(job.id).status == CANCELLED
    monkeypatch.undo()
    assert store.next() is None
    assert store._rows("SELECT status FROM jobs WHERE id = ?", job.id)[0]["status"] == CANCELLED


class _Stuck(Engine):
    """An engine whose jobs end by being cancelled, or when the disk is full."""

    def __init__(self) -> None:
        super().__init__(WorkerSettings({}))
        self.full = asyncio.Event()
        self.ended = False

    async def work(self, job: Work) -> Any:
        try:
            await self.full.wait()
            raise StorageError(f"Cannot write {job.folder}", hint="the disk is full")
        finally:
            self.ended = True


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_running_job_is_cancelled_though_that_cannot_be_noted(store: JobStore, monkeypatch: pytest.MonkeyPatch):
    async def cancelled() -> None:
        engine = _Stuck()
        runner = JobRunner(store, engine, 1.0)
        job = _add(store)
        runner.start()
        await _until(lambda: runner._running is not None)
        _fill(store, monkeypatch, until=lambda: False)
        assert (await runner.cancel(job.id)).status == CANCELLED
        await _until(lambda: engine.ended)
        with pytest.raises(StorageError):
            store.remove(job.id)
        assert not store.path(job.id).exists()
        await runner.stop()
        monkeypatch.undo()

    asyncio.run(cancelled())


def test_old_jobs_are_removed_while_an_end_cannot_be_noted(store: JobStore, monkeypatch: pytest.MonkeyPatch):
    async def freed() -> None:
        old, job = _add(store), _add(store)
        store.finish(old.id, DONE, {})
        engine = _Stuck()
        runner = JobRunner(store, engine, 1.0)
        runner.start()
        await _until(lambda: runner._running is not None)
        _fill(store, monkeypatch, until=lambda: not store.path(old.id).exists())
        engine.full.set()
        await _until(lambda: store.get(job.id).status == FAILED)
        assert store.path(old.id).exists()
        runner.keep_hours = 0.0
        runner.wake()
        await _until(lambda: not store.path(old.id).exists())
        await runner.stop()
        monkeypatch.undo()

    asyncio.run(freed())


# --- a job that was begun before ---


class _Half:
    """A job of four images in a store, and who works on it."""

    def __init__(self, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = store
        self.request = JobRequest("small", tuple(f"{number}.png" for number in range(4)), prompt=LEFT)
        self.id = store.new_id()
        inputs = store.make_folder(self.id)
        for name in self.request.images:
            shutil.copy(IMAGE, inputs / name)
        store.add(self.id, self.request, 4, None, 10)
        self.work = self.request.work(self.id, store.path(self.id))
        self.monkeypatch = monkeypatch

    def begin(self, count: int, *, model: str = "", version: str = "") -> None:
        """Do the first few images with another model or version, and be killed."""
        predictor = Predictor.from_pretrained(str(MODEL), "cpu")
        if model:
            other = predictor.provenance() | {"preset": model}
            self.monkeypatch.setattr(predictor, "provenance", lambda: other)
        jobs = make_jobs(self.work.images, LEFT)
        with self.monkeypatch.context() as patch:
            if version:
                patch.setattr("tmca.journal.version", lambda _: version)
            options = BatchOptions(self.work.prediction, self.work.outputs, overwrite=True)
            predict_batch(predictor, jobs[:count], self.work.folder, options)

    def end(self) -> dict[str, Any]:
        """Do the job as the worker does it, and return its report."""
        told: list[FromWorker] = []
        worker = Worker(WorkerSettings({"small": str(MODEL)}, "cpu"), told.append)
        worker.receive(self.work)
        wait_until(lambda: any(isinstance(message, Answered | Failure) for message in told))
        (answer,) = [message for message in told if isinstance(message, Answered | Failure)]
        assert isinstance(answer, Answered), answer
        assert (answer.value["cases"], answer.value["failures"]) == (4, [])
        report: dict[str, Any] = json.loads((self.work.folder / "run_report.json").read_text())
        return report


@pytest.fixture
def half(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> _Half:
    return _Half(store, monkeypatch)


@pytest.mark.parametrize("before", [{"model": "older"}, {"version": "0.0.1"}])
def test_a_half_done_job_is_finished_by_another_model_or_version(half: _Half, before: dict[str, str]):
    half.begin(3, **before)
    report = half.end()
    assert report["resumed"] == 0
    assert len({case["key"] for case in report["cases"]}) == 1  # all by the same


def test_what_the_same_model_finished_is_not_done_again(half: _Half):
    half.begin(3)
    assert half.end()["resumed"] == 3


def test_a_model_that_comes_back_does_again_what_the_other_has_replaced(half: _Half):
    half.begin(3)
    half.begin(1, model="other")
    report = half.end()
    assert report["resumed"] == 2
    assert len({case["key"] for case in report["cases"]}) == 1


def test_what_another_model_made_of_a_job_does_not_count(half: _Half):
    half.begin(3, model="older")
    assert half.store.done(half.id) == 3
    half.begin(1)
    assert half.store.done(half.id) == 1


# --- over HTTP ---


def _post(client: TestClient, *names: str, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    with ExitStack() as stack:
        files = [("image", (name, stack.enter_context(IMAGE.open("rb")))) for name in names]
        files += [("prompts", content) for content in fields.pop("prompts", ())]
        return client.post("/v1/jobs", files=files, data=fields, headers=headers or {})


def _finished(client: TestClient, response: Any) -> dict[str, Any]:
    assert response.status_code == 202, response.text
    path = response.headers["Location"]
    state: dict[str, Any] = {}

    def ended() -> bool:
        state.update(client.get(path).json())
        return state["status"] not in (QUEUED, RUNNING)

    wait_until(ended)
    return state


def _files(client: TestClient, state: dict[str, Any]) -> dict[str, bytes]:
    archive = zipfile.ZipFile(io.BytesIO(client.get(state["links"]["result"]).content))
    return {name: archive.read(name) for name in archive.namelist()}


def test_a_job_segments_its_images(client: TestClient):
    state = _finished(client, _post(client, "a.png", "b.png", prompt=LEFT))
    assert (state["status"], state["cases_done"], state["failures"]) == (DONE, 2, [])
    files = _files(client, state)
    assert {"a.png", "b.png", "run_report.json"} <= files.keys()
    assert b"/input/" not in b"".join(files.values())


def test_each_image_gets_its_own_sentence(client: TestClient):
    table = b"image,text,report\na.png,%s,/etc/passwd\nb.png,%s,\n" % (f'"{LEFT}"'.encode(), f'"{BOTTOM}"'.encode())
    response = _post(client, "a.png", "b.png", prompts=[("sentences.csv", io.BytesIO(table))])
    files = _files(client, _finished(client, response))
    assert files["a.png"] != files["b.png"]
    assert not any(b"root:" in content for content in files.values())  # a column `report` is not read


def test_a_sentence_goes_to_the_image_that_was_sent_under_its_name(client: TestClient):
    table = f'image,text\nward/a+b.jpeg,"{LEFT}"\nA B.PNG,"{BOTTOM}"\n'.encode()
    response = _post(client, "a+b.jpeg", "A B.PNG", prompts=[("sentences.csv", io.BytesIO(table))])
    state = _finished(client, response)
    assert (state["status"], state["cases_done"], state["failures"]) == (DONE, 2, [])
    report = json.loads(_files(client, state)["run_report.json"])
    assert {Path(case["image"]).name: case["prompt"] for case in report["cases"]} == {
        "a_b.png": LEFT,
        "A B.png": BOTTOM,
    }


@pytest.mark.parametrize(
    ("names", "table", "words"),
    [
        (("scan.png", "scan.png"), "image,text\np1/scan.png,x\np2/scan.png,y\n", "2 images were sent with that name"),
        (("scan.png",), "image,text\np1/scan.png,x\np2/scan.png,y\n", "would be the same image"),
        (("a.png",), "image,text\nb.png,x\n", "no image was sent with that name"),
        (("a.png", "b.png"), "image,text\na.png,x\n", "no line for 1 of 2 images, first 'b.png'"),
        (("a.png",), "image,sentence\na.png,x\n", "prompts has no column 'text'"),
        (("a.png",), "image,Text\na.png,x\n", "rename 'Text' to 'text'"),
    ],
)
def test_a_table_that_does_not_fit_the_images_is_refused(
    client: TestClient, names: tuple[str, ...], table: str, words: str
):
    response = _post(client, *names, prompts=[("sentences.csv", io.BytesIO(table.encode()))])
    assert response.status_code == 422
    assert words in response.text


def test_no_mask_is_called_as_another_image_was(client: TestClient):
    state = _finished(client, _post(client, "ward1/x.png", "ward2/x.png", "x_2.png", "P#1.png", prompt=LEFT))
    assert state["renamed"] == {"x_3.png": "ward2/x.png", "P_1.png": "P#1.png"}
    report = json.loads(_files(client, state)["run_report.json"])
    assert {Path(case["image"]).name for case in report["cases"]} == {"x.png", "x_2.png", "x_3.png", "P_1.png"}


@pytest.mark.parametrize(
    ("image", "stored"), [("p1/x.dcm", "x.dcm"), ("p2/x.dcm", "x_2.dcm"), ("y", "y.dcm"), ("y.dicom", "y.dcm")]
)
def test_a_name_is_found_by_its_path_then_its_last_part_then_without_its_ending(image: str, stored: str):
    sent = [("p1/x.dcm", "x.dcm"), ("p2\\x.dcm", "x_2.dcm"), ("y.dicom", "y.dcm")]
    assert SentNames(sent).stored(image) == stored


def test_one_bad_image_does_not_end_the_others(client: TestClient):
    with IMAGE.open("rb") as good:
        files = [("image", ("good.png", good)), ("image", ("bad.png", io.BytesIO(IMAGE.read_bytes()[:900])))]
        state = _finished(client, client.post("/v1/jobs", files=files, data={"prompt": LEFT}))
    assert (state["status"], state["cases_done"]) == (DONE, 1)
    assert [failure["image"] for failure in state["failures"]] == ["bad.png"]
    assert "/input/" not in json.dumps(state["failures"])


def test_a_job_of_bad_images_only_has_failed(client: TestClient):
    files = [("image", ("bad.png", io.BytesIO(IMAGE.read_bytes()[:900])))]
    state = _finished(client, client.post("/v1/jobs", files=files, data={"prompt": LEFT}))
    assert (state["status"], state["error"]["code"]) == (FAILED, "no_case_done")
    assert client.get(state["links"]["result"]).json()["code"] == "conflict"


def test_files_of_one_name_are_kept_apart(client: TestClient):
    state = _finished(client, _post(client, "ward/a.png", "../a.png", "a.png", prompt=LEFT))
    assert state["cases_done"] == 3


def test_the_same_request_twice_is_one_job(client: TestClient):
    headers = {"Idempotency-Key": "study-42"}
    first = _post(client, "a.png", prompt=LEFT, headers=headers)
    second = _post(client, "a.png", prompt=LEFT, headers=headers)
    assert (first.status_code, second.status_code) == (202, 200)
    assert first.json()["id"] == second.json()["id"]


@pytest.mark.parametrize(
    ("names", "content", "fields"),
    [
        (("a.png",), IMAGE.read_bytes() + b"another patient", {"prompt": LEFT}),
        (("b.png",), IMAGE.read_bytes(), {"prompt": LEFT}),
        (("a.png", "b.png"), IMAGE.read_bytes(), {"prompt": LEFT}),
        (("a.png",), IMAGE.read_bytes(), {"prompt": BOTTOM}),
        (("a.png",), IMAGE.read_bytes(), {"prompt": LEFT, "threshold": "0.6"}),
    ],
)
def test_the_same_key_does_not_name_another_request(
    client: TestClient, names: tuple[str, ...], content: bytes, fields: dict[str, str]
):
    headers = {"Idempotency-Key": "study-43"}
    first = _post(client, "a.png", prompt=LEFT, headers=headers)
    files = [("image", (name, io.BytesIO(content))) for name in names]
    second = client.post("/v1/jobs", files=files, data=fields, headers=headers)
    assert first.status_code in (200, 202)
    assert (second.status_code, second.json()["code"]) == (422, "invalid_request")
    assert "Idempotency-Key" in second.json()["detail"]
    assert first.json()["id"] not in second.text


def test_the_same_key_with_other_sentences_is_another_request(client: TestClient):
    headers = {"Idempotency-Key": "study-44"}
    tables = [f'image,text\na.png,"{text}"\n'.encode() for text in (LEFT, BOTTOM, LEFT)]
    codes = [
        _post(client, "a.png", prompts=[("x.csv", io.BytesIO(table))], headers=headers).status_code for table in tables
    ]
    assert codes == [202, 422, 200]


def test_a_clients_job_is_not_anothers(make_settings: Callable[..., ServerSettings]):
    settings = make_settings(keys=(KEY, f"{KEY}-2"))
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        codes = [
            _post(
                client,
                "a.png",
                prompt=LEFT,
                headers={"Idempotency-Key": "1", "Authorization": f"Bearer {key}"},
            ).status_code
            for key in (KEY, f"{KEY}-2", KEY)
        ]
    assert codes == [202, 422, 200]


def test_a_cancelled_job_ends(client: TestClient):
    response = _post(client, *(f"{number}.png" for number in range(40)), prompt=LEFT)
    state = client.post(f"{response.headers['Location']}/cancel").json()
    assert state["status"] == CANCELLED
    assert client.post(f"{response.headers['Location']}/cancel").json()["status"] == CANCELLED
    assert client.delete(response.headers["Location"]).status_code == 204
    state = _finished(client, _post(client, "a.png", prompt=LEFT))  # the worker is free again
    assert state["status"] == DONE


@pytest.mark.parametrize(
    ("names", "fields", "reason"),
    [
        ((), {"prompts": [("x.csv", io.BytesIO(b"image,text\n"))]}, "missing"),
        (("a.png",), {"prompt": "a", "report": "b"}, "one of"),
        (("a.png",), {"output_type": "exe"}, "exe"),
        (("a.png",), {"model": "other"}, "Unknown model"),
        (("a.png",), {"prompts": [("x.txt", io.BytesIO(b"image,text\n"))]}, "neither CSV"),
        (("a.png",), {"prompts": [("x.csv", io.BytesIO(b"name,text\n"))]}, "image"),
        (("a.png",), {"prompts": [("x.csv", io.BytesIO(b"\xff\xfe\x00"))]}, "prompts"),
    ],
)
def test_a_wrong_job_is_refused_and_leaves_nothing(
    client: TestClient, names: tuple[str, ...], fields: dict[str, Any], reason: str
):
    store: JobStore = client.app.state.service.store  # type: ignore[attr-defined]
    before = {path.name for path in store.folders.iterdir()}
    response = _post(client, *names, **fields)
    assert response.status_code == 422
    assert reason in response.json()["detail"]
    assert str(store.folder) not in response.text
    assert {path.name for path in store.folders.iterdir()} <= before  # one of a job that was deleted may just go


def test_a_stopped_server_goes_on_with_its_jobs(make_settings: Callable[..., ServerSettings]):
    settings = make_settings()
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        job = _post(client, *(f"{number}.png" for number in range(30)), prompt=LEFT).json()
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        wait_until(lambda: client.get(job["links"]["self"]).json()["status"] == DONE)
        assert client.get(job["links"]["self"]).json()["cases_done"] == 30
        assert len([name for name in _files(client, job) if name.endswith(".png") and "/" not in name]) == 30
