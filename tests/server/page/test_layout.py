"""What reaches the page when answers come late."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import nibabel
import numpy as np
import pytest
from serving import IMAGE, LEFT, WorkerHere, settings_for

from tmca.errors import TMCAError
from tmca.server.page.handlers import Desk
from tmca.server.page.layout import _Page


class Slow(WorkerHere):
    """Keeps answers back until it is told to go on."""

    waits = False

    async def ask(self, make: Callable[[int], Any]) -> Any:
        answer = await super().ask(make)
        while self.waits:
            await asyncio.sleep(0.01)
        return answer


@pytest.fixture(scope="module")
def engine() -> Slow:
    return Slow()


@pytest.fixture
def page(engine: Slow, tmp_path: Path) -> _Page:
    async def build() -> _Page:  # Gradio makes an event loop, and leaves it open, where there is none
        with gr.Blocks():
            return _Page(engine, settings_for(tmp_path))

    return asyncio.run(build())


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((20, 30, 9), np.float32), np.eye(4)), path)
    return path


def _title(page: _Page, updates: Any) -> str | None:
    """Return which image a change lays before the user."""
    return None if updates is None or updates[page.opened] is None else updates[page.opened].title


@pytest.mark.parametrize("meanwhile", ["open", "clear", "turn", "recall", "a file that is no image", "nothing"])
def test_an_answer_about_an_image_that_was_put_away_is_dropped(page: _Page, engine: Slow, scan: Path, meanwhile: str):
    async def run() -> tuple[Any, Any]:
        desk = Desk()
        opened = (await page.open(desk, str(scan)))[page.opened]
        past = (await page.ask(desk, opened, (), LEFT, "small", 0.5, 0.0))[page.past]
        others: dict[str, Callable[[], Any]] = {
            "open": lambda: page.open(desk, str(IMAGE)),
            "clear": lambda: page.clear(desk),
            "turn": lambda: page.turn(desk, opened, 0.0),
            "recall": lambda: page.recall(desk, past, 0),
            "a file that is no image": lambda: page.open(desk, __file__),
            "nothing": lambda: asyncio.sleep(0),
        }
        engine.waits = True
        answer = asyncio.ensure_future(page.ask(desk, opened, past, LEFT, "small", 0.5, 0.0))
        await asyncio.sleep(0.05)
        other = asyncio.ensure_future(others[meanwhile]())
        await asyncio.sleep(0.05)
        engine.waits = False
        return await answer, await other

    answer, other = asyncio.run(run())
    if meanwhile == "nothing":
        assert answer[page.result].image.title == "scan, slice 4"
    else:
        assert answer is None
        titles = {"open": "image", "turn": "scan, slice 0", "recall": "scan, slice 4"}
        assert _title(page, other) == titles.get(meanwhile)


def test_a_failure_about_an_image_that_was_put_away_is_not_told(page: _Page, engine: Slow):
    async def run(*, put_away: bool) -> Any:
        desk = Desk()
        opened = (await page.open(desk, str(IMAGE)))[page.opened]
        engine.waits = True
        answer = asyncio.ensure_future(page.ask(desk, opened, (), LEFT, "no such model", 0.5, 0.0))
        await asyncio.sleep(0)
        if put_away:
            await page.clear(desk)
        engine.waits = False
        return await answer

    with pytest.raises(TMCAError):
        asyncio.run(run(put_away=False))
    assert asyncio.run(run(put_away=True)) is None


def test_of_two_images_the_last_one_stays(page: _Page, scan: Path):
    async def run() -> list[Any]:
        desk = Desk()
        return await asyncio.gather(page.open(desk, str(scan)), page.open(desk, str(IMAGE)))

    first, last = asyncio.run(run())
    assert first is None
    assert _title(page, last) == "image"


def test_what_is_no_image_leaves_nothing_open(page: _Page, tmp_path: Path):
    shutil.copy(IMAGE, tmp_path / "notes.txt")
    updates = asyncio.run(page.open(Desk(), str(tmp_path / "notes.txt")))
    assert updates is not None
    assert updates[page.opened] is None
    assert updates[page.result] is None
    assert "notes.txt is no image" in updates[page.status]
