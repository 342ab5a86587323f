from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from serving import BOTTOM, IMAGE, LEFT, image_form
from starlette.testclient import TestClient

from tmca.health.self_test import SELF_TEST
from tmca.imaging import rle
from tmca.imaging.raster import read_mask
from tmca.server.api import accepted
from tmca.server.messages import Form
from tmca.server.problems import PROBLEM_TYPE, NotAcceptableError

TRUE_MASKS = {LEFT: SELF_TEST / "mask-1.png", BOTTOM: SELF_TEST / "mask-2.png"}


def _dice(mask: np.ndarray, other: np.ndarray) -> float:
    return 2 * (mask & other).sum() / (mask.sum() + other.sum())


def _segment(client: TestClient, *prompts: str, accept: str = "application/json", **fields: Any) -> Any:
    with image_form(*prompts, **fields) as form:
        return client.post("/v1/segment", headers={"Accept": accept}, **form)


def test_each_sentence_gets_its_mask(client: TestClient):
    response = _segment(client, LEFT, BOTTOM)
    assert response.status_code == 200
    answer = response.json()
    for prompt, prediction in zip((LEFT, BOTTOM), answer["predictions"], strict=True):
        assert prediction["prompt"] == prompt
        assert prediction["region_found"]
        assert _dice(rle.decode_mask(prediction["mask"]), read_mask(TRUE_MASKS[prompt])) > 0.99
    assert answer["image"]["size"] == [96, 96]
    assert answer["model"]["name"] == "small"
    assert answer["request_id"] == response.headers["X-Request-ID"]


def test_no_sentence_is_said_to_be_none(client: TestClient):
    (prediction,) = _segment(client).json()["predictions"]
    assert prediction["prompt"] is None
    assert prediction["setting"] == "no text"


def test_an_image_that_was_asked_before_is_not_encoded_again(client: TestClient):
    _segment(client, LEFT)
    before = client.get("/metrics").text
    _segment(client, BOTTOM)
    after = client.get("/metrics").text
    assert _figure(after, "tmca_images_encoded_total") == _figure(before, "tmca_images_encoded_total")
    assert _figure(after, "tmca_images_remembered_total") == _figure(before, "tmca_images_remembered_total") + 1


def _figure(metrics: str, name: str) -> float:
    return float(next(line.split()[1] for line in metrics.splitlines() if line.startswith(f"{name} ")))


@pytest.mark.parametrize("picture", ["mask", "overlay", "probability"])
def test_a_picture_is_sent_to_who_accepts_one(client: TestClient, picture: str):
    response = _segment(client, LEFT, accept="image/png", picture=picture)
    assert response.headers["Content-Type"] == "image/png"
    assert response.headers["X-Region-Found"] == "true"
    assert f'filename="image_{picture}.png"' in response.headers["Content-Disposition"]
    pixels = np.asarray(Image.open(io.BytesIO(response.content)))
    assert pixels.shape[:2] == (96, 96)
    if picture == "mask":
        assert _dice(pixels > 0, read_mask(TRUE_MASKS[LEFT])) > 0.99


def test_an_empty_mask_says_so(client: TestClient):
    response = _segment(client, LEFT, accept="image/png", min_region="9000")
    assert response.headers["X-Region-Found"] == "false"


def test_a_dicom_image_gets_a_dicom_seg(client: TestClient, draw_dicom: Callable[..., Path], tmp_path: Path):
    pixels = np.asarray(Image.open(IMAGE).convert("L"))
    path = draw_dicom(tmp_path / "x.dcm", pixels)
    response = _segment(client, LEFT, accept="application/dicom", path=path)
    assert response.status_code == 200, response.text
    result = pydicom.dcmread(io.BytesIO(response.content))
    assert result.Modality == "SEG"
    assert (result.Rows, result.Columns) == pixels.shape
    assert result.SegmentSequence[0].SegmentAlgorithmType == "SEMIAUTOMATIC"


def test_a_report_becomes_a_sentence(client: TestClient):
    report = "FINDINGS: There is one small polyp in the upper left. IMPRESSION: one small polyp."
    answer = _segment(client, report=report).json()
    assert answer["predictions"][0]["prompt"] == answer["report"]["prompt"]
    assert "one small" in answer["report"]["prompt"]


def test_threshold_and_smallest_region_are_obeyed(client: TestClient):
    areas = [
        _segment(client, LEFT, **fields).json()["predictions"][0]["mask"]["area"]
        for fields in ({"threshold": "0.1"}, {"threshold": "0.9"}, {"min_region": "9000"})
    ]
    assert areas[0] > areas[1] > areas[2] == 0


def test_the_effect_of_the_sentence_is_measured_on_request(client: TestClient):
    (plain,) = _segment(client, LEFT).json()["predictions"]
    (full,) = _segment(client, LEFT, prompt_effect="true").json()["predictions"]
    assert len(full["prompt_effect"]) > len(plain["prompt_effect"]) > 0


@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        ({"threshold": "2"}, 422, "threshold"),
        ({"threshold": "nan"}, 422, "threshold"),
        ({"threshold": "high"}, 422, "a number"),
        ({"min_region": "-1"}, 422, "region"),
        ({"frame": "-1"}, 422, "expected a whole number from 0"),
        ({"frame": "x"}, 422, "expected a whole number from 0"),
        ({"frame": "1" * 400}, 422, "111"),
        ({"min_region": "1.5"}, 422, "expected a whole number"),
        ({"prompt_effect": "maybe"}, 422, "expected true or false"),
        ({"frame": "7"}, 422, "7"),
        ({"model": "other"}, 422, "Unknown model"),
        ({"picture": "photo"}, 422, "picture"),
        ({"report": "Everything is well."}, 422, "names no finding"),
        ({"report": "a polyp", "prompt": ["a polyp"]}, 422, "Both"),
        ({"target": "unicorn"}, 422, "Unknown target"),
        ({"prompt": ["a"] * 17}, 422, "17 times"),
    ],
)
def test_a_wrong_field_is_explained(client: TestClient, fields: dict[str, Any], status: int, reason: str):
    response = _segment(client, **fields)
    assert response.headers["Content-Type"] == PROBLEM_TYPE
    told = response.json()
    assert (response.status_code, told["status"]) == (status, status)
    assert reason in told["detail"]
    assert told["hint"]
    assert told["instance"] == f"urn:request:{response.headers['X-Request-ID']}"


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [
        ("empty.png", b"", 415),
        ("text.png", b"no image", 415),
        ("cut.png", IMAGE.read_bytes()[:2000], 422),
        ("page.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
        ("archive.png", b"PK\x03\x04" + bytes(100), 415),
        ("../../etc/passwd.png", IMAGE.read_bytes()[:60], 422),
        ("cut.dcm", bytes(128) + b"DICM" + b"\x02\x00", 422),
        ("cut.nii", b"\x5c\x01\x00\x00" + bytes(100), 422),
    ],
)
def test_a_file_that_is_no_image_is_explained(client: TestClient, name: str, content: bytes, status: int):
    response = client.post("/v1/segment", files={"image": (name, content)}, data={"prompt": LEFT})
    assert response.status_code == status
    assert response.headers["Content-Type"] == PROBLEM_TYPE
    assert "/tmp" not in response.text
    assert "tmca-server" not in response.text
    assert _segment(client, LEFT).status_code == 200


@pytest.mark.parametrize(("path", "name"), [("/v1/segment", "promt"), ("/v1/jobs", "min-region")])
def test_a_field_that_is_not_known_is_refused_not_left_out(client: TestClient, path: str, name: str):
    response = client.post(path, files={"image": ("a.png", IMAGE.read_bytes())}, data={name: "1"})
    assert response.status_code == 422
    problem = response.json()
    assert problem["code"] == "invalid_request"
    assert f"Unknown field {name!r}" in problem["detail"]
    assert problem["hint"] in ("did you mean 'prompt'?", "did you mean 'min_region'?")


def test_a_file_of_many_that_is_no_image_is_named(client: TestClient):
    files = [("image", ("good.png", IMAGE.read_bytes())), ("image", ("notes.png", b"no image"))]
    response = client.post("/v1/jobs", files=files, data={"prompt": LEFT})
    assert response.status_code == 415
    assert "'notes.png'" in response.json()["detail"]


def test_a_bomb_is_refused_before_it_is_unpacked(client: TestClient):
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    response = client.post("/v1/segment", files={"image": ("bomb.png", bomb)})
    assert response.status_code == 422
    assert "60000" in response.json()["detail"].replace(",", "").replace(" ", "")


def test_what_cannot_be_sent_as_one_file_is_said(client: TestClient):
    assert _segment(client, LEFT, BOTTOM, accept="image/png").json()["code"] == "not_acceptable"
    assert _segment(client, LEFT, accept="application/dicom").json()["code"] == "not_acceptable"
    assert _segment(client, LEFT, accept="text/plain").json()["code"] == "not_acceptable"


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("*/*", Form.JSON),
        ("image/png", Form.MASK),
        ("image/*;q=0.9, application/json;q=0.8", Form.MASK),
        ("text/html, application/dicom;q=0.3, */*;q=0.1", Form.DICOM),
        ("application/json;q=0, image/png;q=0.2", Form.MASK),
        ("image/png;q=high, application/json", Form.JSON),
    ],
)
def test_the_accepted_type_of_most_weight_is_made(accept: str, form: Form):
    assert accepted(accept) is form


def test_nothing_accepted_is_an_error():
    with pytest.raises(NotAcceptableError):
        accepted("text/html;q=1")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/segment", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/segment", 415, "unsupported_type"),
        ("GET", "/v1/jobs/unknown", 404, "not_found"),
        ("DELETE", "/v1/jobs/unknown", 404, "not_found"),
        ("GET", "/v1/jobs/unknown/result", 404, "not_found"),
        ("POST", "/v1/jobs/unknown/cancel", 404, "not_found"),
    ],
)
def test_other_requests_get_a_problem_too(client: TestClient, method: str, path: str, status: int, code: str):
    response = client.request(method, path)
    assert (response.status_code, response.json()["code"]) == (status, code)


@pytest.mark.parametrize(
    "body", [b"", b"--x\r\n", b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\n1', b"\xff" * 100]
)
def test_a_form_that_cannot_be_read_is_no_fault_of_the_server(client: TestClient, body: bytes):
    response = client.post("/v1/segment", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert response.status_code == 422


def test_every_documented_limit_is_told(client: TestClient):
    limits = client.get("/capabilities").json()["limits"]
    text = (Path(__file__).parents[2] / "docs" / "reference" / "http.md").read_text("utf-8")
    rows = text.partition("## Limits")[2].partition("## Metrics")[0].splitlines()
    assert {name for row in rows[5:] for name in re.findall(r"`(\w+)`", row.rstrip("|").rpartition("|")[2])} == set(
        limits
    )
    assert (limits["upload_seconds"], limits["job_images"], limits["prompt_characters"]) == (120.0, 10_000, 20_000)
    assert (limits["tensor_bytes"], limits["tensor_values"]) == (32 * 2**20, 8_000_000)


def test_the_server_says_what_it_can(client: TestClient):
    told = client.get("/capabilities").json()
    assert told["models"][0]["name"] == "small"
    assert told["models"][0]["default"]
    assert str(SELF_TEST) not in json.dumps(told)
    assert ".dcm" in told["inputs"]
    assert told["limits"]["prompts"] == 16
    assert told["intended_use"] == "research only; not a medical device"


def test_metrics_are_prometheus_text(client: TestClient):
    _segment(client, LEFT)
    text = client.get("/metrics").text
    assert 'tmca_request_seconds_count{method="POST",route="/v1/segment",status="200"}' in text
    assert "tmca_ready 1.0" in text
    assert 'tmca_jobs{status="queued"} 0.0' in text


def test_alive_and_ready(client: TestClient):
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_the_documentation_loads_nothing_from_elsewhere(client: TestClient):
    import re

    page = client.get("/docs").text
    links = re.findall(r'(?:src|href)="([^"]+)"', page) + re.findall(r"url: '([^']+)'", page)
    assert links
    for link in links:
        assert link.startswith("/")
        assert client.get(link).status_code == 200


def test_the_document_describes_every_route(client: TestClient):
    document = client.get("/openapi.json").json()
    assert set(document["paths"]["/v1/segment"]["post"]["requestBody"]["content"]) == {"multipart/form-data"}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], f"{method} {path}"
            assert (
                "500" in operation["responses"]
                or path in ("/healthz", "/capabilities", "/metrics", "/v2")
                or ("ready" in path or "live" in path)
            )
