"""Draw the picture of the web page: a phantom the model has not seen, asked about by two sentences.

Usage, after ``make demo``: python docs/draw_page.py [DEMO] [PICTURE]; needs Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

from tmca.files import write_bytes

PORT = 8931
URL = f"http://127.0.0.1:{PORT}"
CASE = "test-00006"
SENTENCES = (
    "one small dark oval lesion, located in top left of the image",
    "one large bright lesion, located in bottom of the image",
)
WIDTH, HEIGHT = 1280, 900


def main(demo: Path, picture: Path) -> None:
    """Serve the demo's model, ask, and keep what is seen."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tmca", "serve", "-m", str(demo / "run"), "--port", str(PORT)]
        with subprocess.Popen([*command, "--data-dir", folder]) as server, sync_playwright() as playwright:
            try:
                _wait()
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
                page.goto(URL)
                page.set_input_files("#image-input input[type=file]", demo / "data" / "images" / f"{CASE}.png")
                page.fill("#prompt textarea", "\n".join(SENTENCES))
                page.wait_for_selector("#tokens p")
                page.click("#segment")
                page.wait_for_selector("#overlay img.fill >> nth=1")
                page.mouse.move(0, 0)
                page.wait_for_timeout(500)
                write_bytes(picture, page.screenshot(full_page=True))
                browser.close()
            finally:
                server.terminate()


def _wait() -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{URL}/readyz", timeout=5)
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise TimeoutError(URL)


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(*given, *(Path("demo"), Path("docs/images/page.png"))[len(given) :])
