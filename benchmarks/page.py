"""How long does the page take to appear, and a sentence to become a mask on the screen?

A browser without a window opens the page of `tmca serve` on loopback, and asks new sentences about one image. The first
takes the image's encoding along; for the others it is known. Timed in the browser, from the key that asks to the mask
that is drawn; server and browser share the processor.

    python benchmarks/page.py [-m RUN] [--image FILE] [--rounds 20]

Takes random weights of the preset ``kvasir-mobile`` where no run is named, and draws an image where none is. Needs
Chromium. Prints a table and writes ``benchmarks/results/page.json``.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from measuring import report
from playwright.sync_api import Browser, sync_playwright
from serve import PRESET, SENTENCE, server

from tmca.data.phantom import write_phantoms
from tmca.presets import get_preset
from tmca.speed import random_model

PAINTED = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
ASK = """async () => {
  document.querySelectorAll("#overlay img.fill").forEach((image) => image.classList.add("before"));
  const started = performance.now();
  document.querySelector("#segment").click();
  while (performance.now() - started < 60000) {
    const image = document.querySelector("#overlay img.fill:not(.before)");
    if (image && image.complete) return performance.now() - started;
    await new Promise(requestAnimationFrame);
  }
  throw new Error("no mask appeared");
}"""


def visit(browser: Browser, url: str, image: Path, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of everything a visitor waits for."""
    waited: dict[str, list[float]] = {"the page appears": [], "first sentence": [], "further sentence": []}
    for _ in range(3):
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#prompt textarea")
        waited["the page appears"].append(page.evaluate(PAINTED))
        page.close()
    page = browser.new_page()
    page.goto(url)
    page.set_input_files("#image-input input[type=file]", image)
    page.wait_for_function("document.querySelector('#image-facts').textContent.includes('pixels')")
    for number in range(rounds + 1):
        page.fill("#prompt textarea", f"{SENTENCE}, {number}")
        page.wait_for_timeout(700)
        waited["further sentence" if number else "first sentence"].append(page.evaluate(ASK))
    return waited


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("there is no Chromium (Debian, Ubuntu: apt install chromium)")
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        folder = Path(temporary)
        image = arguments.image
        if image is None:
            manifest = write_phantoms(folder / "data", {"test": 1}, size=512)
            image = manifest.image_path(manifest.records[0])
        model = arguments.model
        if not model:
            model = str(folder / "model")
            random_model(get_preset(PRESET)).save_pretrained(Path(model))
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        with server(model, folder / "jobs", "--page") as (url, _):
            waited = visit(browser, url, image, arguments.rounds)
        browser.close()
    table = [
        {
            "what is waited for": name,
            "median, ms": f"{statistics.median(times):.0f}",
            "longest, ms": f"{max(times):.0f}",
            "times": str(len(times)),
        }
        for name, times in waited.items()
    ]
    report("page", __doc__, table, model=arguments.model or f"{PRESET}, random weights", milliseconds=waited)


if __name__ == "__main__":
    main()
