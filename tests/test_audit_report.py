from __future__ import annotations

import base64
import html
import io
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tmca.audit_report import EXAMPLES, WIDEST_PANEL, audit_table, fingerprint_rows, verdict, write_audit_report
from tmca.data.audit import CHECKS, Audit, audit
from tmca.data.manifest import Manifest
from tmca.imaging.raster import write_image, write_mask

EVIL = 'three <script>alert("x")</script> lesions, located in "left" of the image'


class _Page(HTMLParser):
    """Collects what a browser would load, and checks that tags are closed."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pictures: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.pictures += [values["src"] or ""] if "src" in values else []
        self.links += [values["href"] or ""] if "href" in values else []
        self.ids += [values["id"] or ""] if "id" in values else []
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def data(phantoms: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Phantoms with a fault of nearly every kind."""
    root = tmp_path_factory.mktemp("spoiled") / "phantoms"
    shutil.copytree(phantoms.root, root)
    records = list(phantoms.records)
    shutil.copy(root / records[0].image, root / records[-1].image)  # a training image in the test split
    (root / records[1].image).write_bytes(b"broken")
    write_mask(root / str(records[2].mask), np.ones((40, 64), dtype=bool))
    write_image(root / str(records[3].mask), np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8))
    mask = np.zeros((64, 64), dtype=bool)
    mask[30:50, 30:50] = mask[0, 0] = True
    write_mask(root / str(records[4].mask), mask)
    records[4] = replace(records[4], text="one lesion")
    records[5] = replace(records[5], text=EVIL, patient_id="P1")
    records[-2] = replace(records[-2], patient_id="P1")
    write_image(root / "images" / "orphan.png", np.zeros((8, 8, 3), dtype=np.uint8))
    return Manifest(root, tuple(records), "phantoms")


@pytest.fixture(scope="module")
def found(data: Manifest) -> Audit:
    return audit(data)


@pytest.fixture(scope="module")
def page(found: Audit, data: Manifest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "sub" / "audit.html"
    assert write_audit_report(found, data, path) == path
    return path.read_text("utf-8")


def test_the_page_loads_nothing_from_elsewhere(page: str):
    parsed = _Page(page)
    assert parsed.pictures
    assert all(picture.startswith("data:image/jpeg;base64,") for picture in parsed.pictures)
    assert all(link.startswith("#") for link in parsed.links)
    assert not {"script", "link", "iframe", "object", "embed"} & set(parsed.tags)
    assert not re.search(r"@import|url\(|https?://", page)


def test_every_check_that_found_something_has_its_section(page: str, found: Audit):
    parsed = _Page(page)
    assert parsed.ids == list(found.by_check)
    assert [link[1:] for link in parsed.links] == parsed.ids
    for name in (
        *("unreadable", "size_mismatch", "mask_not_binary", "same_image_across_splits", "patient_across_splits"),
        *("stray_specks", "orphan_file", "unknown_words"),
    ):
        assert name in parsed.ids
        assert html.escape(CHECKS[name].why, quote=False) in page
    for finding in found.findings:
        assert finding.message in html.unescape(page)


def test_pictures_are_small_and_whole(page: str):
    for picture in _Page(page).pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2], validate=True))) as image:
            assert image.format == "JPEG"
            assert max(image.size) <= WIDEST_PANEL


def test_duplicates_stand_side_by_side(page: str, data: Manifest):
    section = page.partition('<h2 id="same_image_across_splits">')[2].partition("<h2")[0]
    captions = re.findall(r'alt="(\S+) ', section)
    assert captions == [data.records[0].id, data.records[-1].id]


def test_a_speck_gets_a_ring(page: str):
    section = page.partition('<h2 id="stray_specks">')[2].partition("<h2")[0]
    picture = re.findall(r"base64,([^\"]+)", section)[0]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")).astype(int)
    corner = pixels[:8, :8]
    assert ((corner[..., 0] > 150) & (corner[..., 1] < 120)).any()


def test_sentences_are_escaped(page: str):
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert _Page(page).text.count("alert(") >= 1


def test_only_some_findings_are_drawn(data: Manifest, tmp_path: Path):
    spoiled = data.with_records(replace(record, text="no lesion in the image") for record in data.records)
    found = audit(spoiled)
    count = len(found.by_check["contradicted_presence"])
    assert count > EXAMPLES
    page = write_audit_report(found, spoiled, tmp_path / "a.html", examples=3).read_text("utf-8")
    section = page.partition('<h2 id="contradicted_presence">')[2].partition("<h2")[0]
    assert section.count("<img") == 6  # each as it is, and with its mask
    assert section.count("<li>") == count - 3


def test_a_clean_dataset_has_a_short_page(phantoms: Manifest, tmp_path: Path):
    part = phantoms.with_records(replace(record, text=None, mask=None) for record in phantoms.records[:5])
    found = replace(audit(part), findings=())
    page = _Page(write_audit_report(found, part, tmp_path / "a.html").read_text("utf-8"))
    assert "nothing found in 5 cases" in page.text
    assert not page.pictures


def test_the_facts_of_the_splits_are_in_the_page(page: str, found: Audit):
    text = " ".join(_Page(page).text.split())
    rows = fingerprint_rows(found.fingerprint)
    assert len(rows) > 10
    for name, cells in rows:
        assert name in text
        assert len(cells) == 3
        assert all(cell in text for cell in cells)


def test_the_verdict(found: Audit):
    assert verdict(found).startswith(f"{len(found.errors)} errors, ")
    assert verdict(replace(found, findings=found.errors[:1], cases=1)) == "1 error in 1 case"


def test_the_table_of_the_terminal(found: Audit):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(audit_table(found))
    text = console.export_text()
    assert verdict(found) in text
    for name, findings in found.by_check.items():
        assert re.search(rf"{name}\W+{CHECKS[name].severity}\W+{len(findings)}\b", text), name
