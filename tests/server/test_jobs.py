from __future__ import annotations

import io
import json
import sqlite3
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from serving import BOTTOM, IMAGE, KEY, LEFT, wait_until
from starlette.testclient import TestClient

from tmca.errors import StorageError
from tmca.files import replace_file, replace_folder
from tmca.server import ServerSettings, create_app
from tmca.server.jobs import CANCELLED, DONE, FAILED, MOST_ATTEMPTS, QUEUED, RUNNING, JobRequest, JobState, JobStore
from tmca.server.problems import BusyError, ConflictError, NotFoundError
from tmca.server.uploads import SentNames

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
    ],
)
def test_a_table_that_does_not_fit_the_images_is_refused(
    client: TestClient, names: tuple[str, ...], table: str, words: str
):
    response = _post(client, *names, prompts=[("sentences.csv", io.BytesIO(table.encode()))])
    assert response.status_code == 422
    assert words in response.text


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
