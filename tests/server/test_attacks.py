"""What strangers send: nothing of it ends the server, and others are answered in between."""

from __future__ import annotations

import contextlib
import gzip
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from serving import IMAGE, LEFT, Running, image_form
from starlette.testclient import TestClient

GOOD = IMAGE.read_bytes()
NAMES = (
    "a.png", "../../../etc/cron.d/x.png", "..\\..\\x.jpg", "/dev/sda.png", "a\x00b.png", "x" * 5000 + ".png", ".png",
    "", "CON", "a;rm -rf ~.png", "%2e%2e%2fx.png", "<script>.svg", "\u202egnp.exe", "nul:.nii.gz",
)  # fmt: skip


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, content: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", content) + _chunk(b"IEND", b"")


def _saved(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.open(IMAGE).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


WHOLE = (GOOD, *map(_saved, ("JPEG", "TIFF", "WEBP", "BMP")))


def _truncated(chance: random.Random) -> bytes:
    whole = chance.choice(WHOLE)
    return whole[: chance.randrange(len(whole) // 2)]


def _flipped(chance: random.Random) -> bytes:
    damaged = bytearray(chance.choice(WHOLE))
    for _ in range(chance.randrange(1, 200)):
        damaged[chance.randrange(4, len(damaged))] = chance.randrange(256)
    return bytes(damaged)


def _noise(chance: random.Random) -> bytes:
    heads = (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\x00", bytes(128) + b"DICM", b"\x5c\x01\x00\x00", b"BM")
    return chance.choice(heads) + chance.randbytes(chance.randrange(2000))


def _bomb(chance: random.Random) -> bytes:
    side = chance.choice((40_000, 65_500, 2**31 - 1))
    volume = struct.pack("<i", 348) + bytes(36) + struct.pack("<8h", 3, *(32_000,) * 3, 1, 1, 1, 1) + bytes(900)
    bombs = (
        _png(side, side, zlib.compress(bytes(10_000))),
        _png(100, 100, zlib.compress(bytes(3_000_000))),
        gzip.compress(b"\x5c\x01\x00\x00" + bytes(200_000)),
        gzip.compress(volume),
    )
    return chance.choice(bombs)


def _disguised(_: random.Random) -> bytes:
    """Return a ZIP archive behind a picture's head, and such."""
    archive = b"PK\x03\x04" + bytes(26) + b"../../evil"
    return b"\x89PNG\r\n\x1a\n" + archive


def bad_uploads(number: int) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents that no picture should have."""
    chance = random.Random(0)
    kinds: tuple[Callable[[random.Random], bytes], ...] = (_truncated, _flipped, _noise, _bomb, _disguised)
    for index in range(number):
        yield chance.choice(NAMES), kinds[index % len(kinds)](chance)


def _ask(client: TestClient) -> int:
    with image_form(LEFT) as form:
        return client.post("/v1/segment", **form).status_code


def _attack(client: TestClient, number: int) -> dict[int, int]:
    counts: dict[int, int] = {}
    for index, (name, content) in enumerate(bad_uploads(number)):
        response = client.post("/v1/segment", files={"image": (name, content)}, data={"prompt": LEFT})
        counts[response.status_code] = counts.get(response.status_code, 0) + 1
        assert response.status_code in (200, 415, 422), (
            index,
            name,
            response.text,
        )  # 200: a flipped bit may not matter
        assert "/tmp" not in response.text
        if index % 100 == 0:
            assert _ask(client) == 200
    return counts


def test_bad_uploads_are_refused_and_others_are_answered(client: TestClient):
    engine = client.app.state.service.engine  # type: ignore[attr-defined]
    worker = engine.worker_pid
    counts = _attack(client, 500)
    assert counts[415] > 15
    assert counts[422] > 100
    assert _ask(client) == 200
    assert engine.worker_pid == worker  # none of them took it down


@pytest.mark.slow
def test_ten_thousand_bad_uploads(client: TestClient):
    assert sum(_attack(client, 10_000).values()) == 10_000
    assert _ask(client) == 200


def test_bad_images_of_a_job_do_not_end_it(client: TestClient):
    contents = [content for _, content in bad_uploads(60) if content.startswith(GOOD[:8])]
    files = [("image", (f"{index}.png", content)) for index, content in enumerate(contents)]
    response = client.post("/v1/jobs", files=[*files, ("image", ("good.png", GOOD))], data={"prompt": LEFT})
    assert response.status_code == 202, response.text
    path = response.headers["Location"]
    while (state := client.get(path).json())["status"] in ("queued", "running"):
        pass
    assert state["status"] == "done"
    assert state["cases_done"] + len(state["failures"]) == len(files) + 1


def test_no_request_that_the_document_allows_or_forbids_breaks_the_server(start: Callable[..., Running]):
    """Property test of every operation of the OpenAPI document, with values it allows and values it forbids."""
    server = start()
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    checks = CHECKS.get_by_names(
        ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
    )
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 15
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=15, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
            def ask(case: schemathesis.Case) -> None:
                case.call_and_validate(checks=checks)

            with contextlib.suppress(Unsatisfiable):  # nothing is forbidden where nothing is asked for
                ask()
    with image_form(LEFT) as form:
        assert httpx2.post(f"{server.url}/v1/segment", **form).status_code == 200
