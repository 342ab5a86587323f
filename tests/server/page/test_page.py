"""The page as it is used, in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from serving import BOTTOM, IMAGE, LEFT, Running, running_server, start_server, wait_until

from tmca.imaging import rle

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian, Ubuntu: apt install chromium)")
DESKTOP, TABLET = {"width": 1280, "height": 900}, {"width": 820, "height": 1180}
TABS = ("Mask", "Probability", "Attention", "Correct")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, server: Running) -> Iterator[Callable[..., Page]]:
    """Return a function that opens the page; afterwards no script has failed and nobody else was asked."""
    contexts: list[Any] = []
    faults: list[str] = []
    asked: list[str] = []

    def begin(size: dict[str, int] = DESKTOP, scheme: Any = "light") -> Page:
        context = browser.new_context(viewport=size, color_scheme=scheme, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url)
        expect(page.locator("#prompt textarea")).to_be_visible()
        return page

    yield begin
    for context in contexts:
        context.close()
    assert faults == []
    assert [url for url in asked if not url.startswith((server.url, "data:", "blob:"))] == []


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    return open_page()


def _choose(page: Page, path: Path = IMAGE) -> None:
    page.set_input_files("#image-input input[type=file]", path)
    expect(page.locator("#image-facts")).to_contain_text("pixels")


def _ask(page: Page, *sentences: str) -> None:
    page.fill("#prompt textarea", "\n".join(sentences))
    page.click("#segment")
    expect(page.locator("#answer")).to_contain_text(re.compile("found|no region|sentences", re.IGNORECASE))
    expect(page.locator("#overlay img.fill")).to_have_count(max(1, len(sentences)))


def _mask(page: Page, number: int = 0) -> np.ndarray:
    return _pixels(page.locator("#overlay img.fill").nth(number).get_attribute("src") or "")


def _pixels(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGBA"))[:, :, 3] > 127


def _set(page: Page, name: str, value: float) -> None:
    page.fill(f"#{name} input[type=number]", str(value))
    page.press(f"#{name} input[type=number]", "Enter")


def _drawn(page: Page) -> np.ndarray:
    return _pixels(page.evaluate("JSON.parse(window.tmcaEditor.drawing(false)).drawn"))


def _open_editor(page: Page) -> None:
    page.get_by_role("tab", name="Correct").click()
    expect(page.locator("#editor .stage.ready")).to_be_visible()


def _stroke(page: Page) -> None:
    box = page.locator("#editor canvas").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.2 * box["height"], steps=4)
    page.mouse.up()


def _saved(page: Page, kind: str, folder: Path) -> Path:
    with page.expect_download() as download:
        page.click(f"#download-{kind}")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_an_image_and_a_sentence_make_a_mask(page: Page):
    _choose(page)
    expect(page.locator("#overlay img")).to_have_count(1)
    page.type("#prompt textarea", LEFT)
    expect(page.locator("#tokens")).to_contain_text(re.compile(r"\d+ of \d+ tokens"))
    _ask(page, LEFT)
    expect(page.locator("#answer")).to_contain_text("1 region found")
    expect(page.locator("#effect")).to_contain_text("sentence")
    left = _mask(page)
    assert left[:, :48].sum() > left[:, 48:].sum()
    _ask(page, BOTTOM)
    page.wait_for_function("old => document.querySelector('#overlay img.fill').src !== old", arg="")
    wait_until(lambda: not np.array_equal(_mask(page), left), 10)
    bottom = _mask(page)
    assert bottom[48:].sum() > bottom[:48].sum()


def test_sentences_are_compared_side_by_side(page: Page):
    _choose(page)
    _ask(page, LEFT, BOTTOM)
    expect(page.locator("#overlay figure")).to_have_count(2)
    assert not np.array_equal(_mask(page, 0), _mask(page, 1))
    expect(page.locator("#choice")).to_be_visible()
    for tab in ("Probability", "Attention"):
        page.get_by_role("tab", name=tab).click()
        expect(page.locator(f"#{tab.lower()} figure")).to_have_count(2)


def test_nothing_found_and_a_contradiction_are_said_in_words(page: Page):
    _choose(page)
    _ask(page, "no lesion in the image")
    expect(page.locator("#conflicts")).to_contain_text("Check the sentence and the mask")
    _set(page, "min-region", 1000)
    expect(page.locator("#answer")).to_contain_text(re.compile("no region", re.IGNORECASE))
    assert not _mask(page).any()


def test_threshold_and_opacity_change_what_is_seen_at_once(page: Page):
    _choose(page)
    _ask(page, LEFT)
    before = _mask(page).sum()
    _set(page, "threshold", 0.9)
    wait_until(lambda: _mask(page).sum() < before, 10)
    _set(page, "opacity", 0.9)
    page.wait_for_function(
        "() => Number(getComputedStyle(document.querySelector('#overlay img.fill')).opacity) === 0.9"
    )


def test_a_mask_is_corrected_undone_and_saved_as_semi_automatic(page: Page, tmp_path: Path):
    _choose(page)
    _ask(page, LEFT)
    _open_editor(page)
    before = _drawn(page)
    assert np.array_equal(before, _mask(page))
    _stroke(page)
    drawn = _drawn(page)
    assert drawn.sum() > before.sum()
    page.keyboard.press("Control+z")
    assert np.array_equal(_drawn(page), before)
    page.get_by_role("button", name="Redo").click()
    assert np.array_equal(_drawn(page), drawn)
    page.get_by_role("button", name="Eraser").click()
    _stroke(page)
    assert _drawn(page).sum() < drawn.sum()
    page.get_by_role("button", name="Undo").click()
    page.click("#apply-correction")
    expect(page.locator("#effect")).to_contain_text("corrected by hand")
    assert np.array_equal(_mask(page), drawn)
    found = json.loads(_saved(page, "rle", tmp_path).read_text("utf-8"))["predictions"][0]
    assert (found["algorithm_type"], found["corrected_by_hand"]) == ("SEMIAUTOMATIC", True)
    assert np.array_equal(rle.decode_mask(found["mask"]), drawn)
    path = _saved(page, "png", tmp_path)
    assert path.name == "image_mask_corrected.png"
    assert np.array_equal(np.asarray(Image.open(path)) > 0, drawn)


def test_the_brush_obeys_the_keyboard(page: Page):
    _choose(page)
    _ask(page, LEFT)
    page.keyboard.press("Alt+Shift+C")
    expect(page.locator("#editor .stage.ready")).to_be_visible()
    page.locator("#editor canvas").focus()
    before = _drawn(page).sum()
    for key in ("ArrowRight", "ArrowDown", "Space"):
        page.keyboard.press(key)
    assert _drawn(page).sum() > before


def test_keyboard_alone_is_enough_to_ask(page: Page):
    _choose(page)
    page.keyboard.press("Alt+Shift+S")
    page.keyboard.type(LEFT)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#answer")).to_contain_text("region")


def test_a_dicom_image_gives_a_dicom_seg(page: Page, draw_dicom: Callable[..., Path], tmp_path: Path):
    _choose(page, draw_dicom(tmp_path / "film.dcm", np.asarray(Image.open(IMAGE).convert("L"))))
    expect(page.locator("#image-facts")).to_contain_text("DICOM CR")
    expect(page.locator("body")).not_to_contain_text("Müller")
    _ask(page, LEFT)
    result = pydicom.dcmread(_saved(page, "dicom-seg", tmp_path))
    assert result.Modality == "SEG"
    assert (result.Rows, result.Columns) == (96, 96)


def test_a_volume_is_leafed_through(page: Page, tmp_path: Path):
    pixels = np.asarray(Image.open(IMAGE).convert("L"), np.float32)
    volume = np.stack([pixels.T, np.zeros_like(pixels), pixels.T, pixels.T], axis=-1)
    path = tmp_path / "volume.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 1.0, 3.0, 1.0])), path)
    _choose(page, path)
    expect(page.locator("#slice")).to_be_visible()
    expect(page.locator("#overlay figcaption")).to_contain_text("slice 2")
    shown = page.locator("#overlay img").get_attribute("src")
    slider = page.locator("#slice input[type=range]")
    slider.focus()
    slider.press("ArrowLeft")
    expect(page.locator("#overlay figcaption")).to_contain_text("slice 1")
    assert page.locator("#overlay img").get_attribute("src") != shown
    _ask(page, LEFT)
    saved = nibabel.load(_saved(page, "nifti", tmp_path))
    assert np.allclose(saved.affine[:3, :3], np.diag([1, 1, 3]))


@pytest.mark.parametrize("content", [b"text", IMAGE.read_bytes()[:900]], ids=["text", "truncated"])
def test_a_bad_file_is_explained_and_a_good_one_is_taken_next(page: Page, content: bytes, tmp_path: Path):
    path = tmp_path / "colon.png"
    path.write_bytes(content)
    page.set_input_files("#image-input input[type=file]", path)
    expect(page.locator("#status .problem")).to_contain_text("colon.png")
    expect(page.locator("body")).not_to_contain_text("Traceback")
    expect(page.locator("body")).not_to_contain_text("/tmp/")
    page.get_by_role("button", name=re.compile("clear|remove", re.IGNORECASE)).first.click()
    _choose(page)
    _ask(page, LEFT)
    expect(page.locator("#status .problem")).to_have_count(0)


def test_asking_without_an_image_is_explained(page: Page):
    page.click("#segment")
    expect(page.locator("#status .problem")).to_contain_text("There is no image yet")


def test_what_was_asked_before_is_shown_again(page: Page):
    _choose(page)
    _ask(page, LEFT)
    left = _mask(page)
    _ask(page, BOTTOM)
    wait_until(lambda: not np.array_equal(_mask(page), left), 10)
    page.get_by_role("button", name="Session history").click()
    page.locator("#history label").filter(has_text=LEFT).click()
    wait_until(lambda: np.array_equal(_mask(page), left), 10)
    expect(page.locator("#prompt textarea")).to_have_value(LEFT)


def test_what_was_drawn_is_kept_saved_and_found_again(page: Page, tmp_path: Path):
    _choose(page)
    _ask(page, LEFT)
    original = _mask(page)
    _open_editor(page)
    _stroke(page)
    drawn = _drawn(page)
    page.get_by_role("tab", name="Mask").click()
    page.get_by_role("tab", name="Correct").click()
    page.wait_for_timeout(500)
    assert np.array_equal(_drawn(page), drawn)
    expect(page.get_by_role("button", name="Undo")).to_be_enabled()
    path = _saved(page, "png", tmp_path)
    assert path.name == "image_mask_corrected.png"
    assert np.array_equal(np.asarray(Image.open(path)) > 0, drawn)
    expect(page.locator("#effect")).to_contain_text("corrected by hand")
    page.get_by_role("button", name="Session history").click()
    page.locator("#history label").filter(has_not_text="corrected by hand").click()
    wait_until(lambda: np.array_equal(_mask(page), original), 10)
    page.locator("#history label").filter(has_text="corrected by hand").click()
    wait_until(lambda: np.array_equal(_mask(page), drawn), 10)
    page.get_by_role("tab", name="Correct").click()
    wait_until(lambda: np.array_equal(_drawn(page), drawn), 10)
    _stroke(page)
    page.get_by_role("button", name="Back to the model").click()
    wait_until(lambda: np.array_equal(_drawn(page), original), 10)


def test_strokes_on_an_earlier_mask_are_not_saved_with_a_later_one(page: Page, tmp_path: Path):
    _choose(page)
    _ask(page, LEFT)
    left = _mask(page)
    _open_editor(page)
    _stroke(page)
    _ask(page, BOTTOM)
    wait_until(lambda: not np.array_equal(_mask(page), left), 10)
    mask = _mask(page)
    path = _saved(page, "png", tmp_path)
    assert path.name == "image_mask.png"
    assert np.array_equal(np.asarray(Image.open(path)) > 0, mask)


def test_a_file_that_is_no_image_does_not_leave_the_image_before_it(page: Page, tmp_path: Path):
    _choose(page)
    _ask(page, LEFT)
    (tmp_path / "notes.txt").write_text("no image")
    page.get_by_label("Clear").first.click()
    page.set_input_files("#image-input input[type=file]", tmp_path / "notes.txt")
    expect(page.locator("#status")).to_contain_text("no image")
    page.click("#segment")
    expect(page.locator("#status")).to_contain_text("There is no image yet")
    expect(page.locator("#overlay img")).to_have_count(0)


def test_an_answer_that_arrives_after_another_image_was_opened_is_hidden(page: Page, tmp_path: Path):
    _choose(page)
    other = tmp_path / "other.png"
    Image.open(IMAGE).transpose(Image.Transpose.ROTATE_90).resize((64, 80)).save(other)
    held: list[Any] = []

    def hold_first(route: Any) -> None:
        if held:
            route.continue_()
        else:
            held.append((route, route.fetch()))

    page.fill("#prompt textarea", f"{LEFT}\n{BOTTOM}")
    page.wait_for_timeout(500)
    page.route("**/gradio_api/run/**", hold_first)
    page.click("#segment")
    wait_until(lambda: page.wait_for_timeout(50) or bool(held), 20)
    page.get_by_label("Clear").first.click()
    page.set_input_files("#image-input input[type=file]", other)
    expect(page.locator("#image-facts")).to_contain_text("80")
    route, response = held[0]
    route.fulfill(response=response)
    expect(page.locator("#answer .of")).to_have_text("image")
    expect(page.locator("#overlay")).to_be_hidden()
    expect(page.locator("#downloads")).to_be_hidden()
    page.screenshot(path=tmp_path / "late.png")
    _ask(page, LEFT)
    expect(page.locator("#overlay")).to_be_visible()
    expect(page.locator("#overlay figcaption")).to_contain_text("other")


def test_a_server_that_was_away_is_used_again(browser: Browser, tmp_path: Path):
    with running_server(tmp_path) as running:
        page = browser.new_page()
        page.goto(running.url)
        _choose(page)
        _ask(page, LEFT)
        running.kill()
        page.click("#segment")
        expect(page.locator("body")).to_contain_text(re.compile("server|connection", re.IGNORECASE), timeout=20_000)
        again = start_server(tmp_path, port=running.port)
        try:
            page.goto(again.url)
            _choose(page)
            _ask(page, LEFT)
            assert _mask(page).any()
        finally:
            again.kill()
            page.close()


def test_it_is_quick(page: Page):
    (paint,) = page.evaluate("performance.getEntriesByName('first-contentful-paint').map((entry) => entry.startTime)")
    assert paint < 2000
    _choose(page)
    _ask(page, LEFT)
    page.fill("#prompt textarea", BOTTOM)
    expect(page.locator("#tokens")).to_contain_text("tokens")
    milliseconds = page.evaluate(
        """async () => {
          const before = document.querySelector('#overlay img.fill').src, begun = performance.now();
          document.querySelector('#segment').click();
          while (document.querySelector('#overlay img.fill').src === before && performance.now() - begun < 5000)
            await new Promise((resolve) => setTimeout(resolve, 5));
          return performance.now() - begun;
        }"""
    )
    assert milliseconds < 1000


def _faults(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [
        f"{fault['id']}: {fault['help']}: {[node['html'][:200] for node in fault['nodes'][:3]]}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("size", [DESKTOP, TABLET], ids=["desktop", "tablet"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible(open_page: Callable[..., Page], size: dict[str, int], scheme: str):
    page = open_page(size, scheme)
    assert ("dark" in (page.locator("body").get_attribute("class") or "")) == (scheme == "dark")
    assert _faults(page) == []
    _choose(page)
    _ask(page, LEFT, "no lesion in the image")
    for tab in TABS:
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        assert _faults(page) == [], tab
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
