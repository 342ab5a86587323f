from __future__ import annotations

import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import BOTTOM, IMAGE, LEFT
from starlette.testclient import TestClient

from tmca.health.self_test import SELF_TEST
from tmca.imaging.raster import read_mask
from tmca.server import kserve

INFER = "/v2/models/small/infer"


def _bytes(name: str, *values: Any) -> dict[str, Any]:
    return {"name": name, "shape": [len(values)], "datatype": "BYTES", "data": list(values)}


def _file() -> dict[str, Any]:
    return _bytes("image", base64.b64encode(IMAGE.read_bytes()).decode())


def _pixels(**changes: Any) -> dict[str, Any]:
    pixels = np.asarray(Image.open(IMAGE).convert("RGB"))
    tensor = {"name": "image", "shape": list(pixels.shape), "datatype": "UINT8", "data": pixels.ravel().tolist()}
    return tensor | changes


@pytest.mark.parametrize("image", [_file(), _pixels()], ids=["file", "pixels"])
def test_a_mask_for_each_sentence(client: TestClient, image: dict[str, Any]):
    response = client.post(INFER, json={"id": "7", "inputs": [image, _bytes("prompt", LEFT, BOTTOM)]})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert (answer["model_name"], answer["id"]) == ("small", "7")
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("mask", "UINT8", [2, 96, 96])
    masks = np.array(output["data"], bool).reshape(output["shape"])
    for mask, file in zip(masks, ("mask-1.png", "mask-2.png"), strict=True):
        true = read_mask(SELF_TEST / file)
        assert 2 * (mask & true).sum() / (mask.sum() + true.sum()) > 0.99
    assert answer["parameters"]["region_found"] == [True, True]


def test_probabilities_and_thresholds_on_request(client: TestClient):
    request = {
        "inputs": [_file(), _bytes("prompt", LEFT)],
        "outputs": [{"name": "probability"}, {"name": "mask"}],
        "parameters": {"threshold": 0.9},
    }
    outputs = {output["name"]: output for output in client.post(INFER, json=request).json()["outputs"]}
    probability = np.array(outputs["probability"]["data"])
    assert outputs["probability"]["datatype"] == "FP32"
    assert ((probability > 0.9) == np.array(outputs["mask"]["data"], bool)).mean() > 0.999


def _large(side: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.open(IMAGE).convert("L").resize((side, side)).save(buffer, "PNG")
    return _bytes("image", base64.b64encode(buffer.getvalue()).decode())


def test_probabilities_have_five_places(client: TestClient):
    (output,) = client.post(INFER, json={"inputs": [_file()], "outputs": [{"name": "probability"}]}).json()["outputs"]
    assert [round(number, 5) for number in output["data"]] == output["data"]


def _longest_wait(client: TestClient, request: dict[str, Any]) -> float:
    """Ask again and again while a request is answered; the longest wait as a share of the time that one takes."""
    waits = []
    with ThreadPoolExecutor(1) as pool:
        started = time.perf_counter()
        asked = pool.submit(client.post, INFER, json=request)
        while not asked.done():
            sent = time.perf_counter()
            assert client.get("/healthz").status_code == 200
            waits.append(time.perf_counter() - sent)
        assert asked.result().status_code == 200
        return max(waits) / (time.perf_counter() - started)


def test_others_are_answered_while_a_large_answer_is_written(client: TestClient):
    request = {"inputs": [_large(1600)], "outputs": [{"name": "probability"}]}
    client.post(INFER, json=request)  # the image is known from here on
    # The machine itself may be busy elsewhere for a moment, but not each time.
    assert any(_longest_wait(client, request) < 1 / 3 for _ in range(3))


@pytest.mark.parametrize(
    ("sentences", "outputs", "status"), [(2, ["mask"], 200), (2, ["mask", "probability"], 413), (3, ["mask"], 413)]
)
def test_an_answer_that_would_be_too_large_is_refused(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, sentences: int, outputs: list[str], status: int
):
    monkeypatch.setattr(kserve, "MOST_VALUES", 2 * 96 * 96)
    request = {
        "inputs": [_file(), _bytes("prompt", *[LEFT] * sentences)],
        "outputs": [{"name": name} for name in outputs],
    }
    for _ in range(2):  # whether the image is known or not
        response = client.post(INFER, json=request)
        assert response.status_code == status
        if status == 413:
            assert response.json()["code"] == "too_large"
            assert "96 × 96" in response.json()["detail"]


def test_no_sentence_is_allowed(client: TestClient):
    answer = client.post(INFER, json={"inputs": [_file()]}).json()
    assert answer["parameters"]["setting"] == ["no text"]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({}, 422),
        ({"inputs": []}, 422),
        ({"inputs": [_bytes("prompt", "a")]}, 422),
        ({"inputs": [_file(), _file()]}, 422),
        ({"inputs": [_file(), _bytes("other", "a")]}, 422),
        ({"inputs": [_bytes("image", "§")]}, 422),
        ({"inputs": [_bytes("image", 1)]}, 422),
        ({"inputs": [_bytes("image", base64.b64encode(b"text").decode())]}, 415),
        ({"inputs": [_file(), _bytes("prompt", 1)]}, 422),
        ({"inputs": [_file(), _bytes("prompt", *"a" * 17)]}, 422),
        ({"inputs": [_pixels(shape=[1, 1, 3])]}, 422),
        ({"inputs": [_pixels(shape=[96, 96, 4])]}, 422),
        ({"inputs": [_pixels(shape=[-96, -96, 3])]}, 422),
        ({"inputs": [_pixels(shape=[1, 1, 3], data=[0, 1, 256])]}, 422),
        ({"inputs": [_pixels(shape=[1, 1, 3], data=[0, 1, True])]}, 422),
        ({"inputs": [_file()], "parameters": {"threshold": "high"}}, 422),
        ({"inputs": [_file()], "parameters": {"threshold": 7}}, 422),
        ({"inputs": [_file()], "parameters": {"threshold": 10**400}}, 422),
        ({"inputs": [_file()], "parameters": {"threshold": True}}, 422),
        ({"inputs": [_file()], "outputs": [{"name": "other"}]}, 422),
    ],
)
def test_a_wrong_request_is_explained(client: TestClient, request_: dict[str, Any], status: int):
    response = client.post(INFER, json=request_)
    assert response.status_code == status
    assert response.json()["detail"]
    assert response.json()["hint"]


def test_other_questions_of_the_protocol(client: TestClient):
    assert client.get("/v2").json()["name"] == "tmca"
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/small/ready").json() == {"name": "small", "ready": True}
    assert [tensor["name"] for tensor in client.get("/v2/models/small").json()["outputs"]] == ["mask", "probability"]
    assert client.get("/v2/models/other").json()["code"] == "not_found"
    assert client.post("/v2/models/other/infer", json={"inputs": [_file()]}).status_code == 404
