"""Make the screenshots of the web page in the README: `python assets/demo/make_page_pictures.py BUNDLE`.

Starts the server on BUNDLE, runs queries on two sample clips in the machine's Chromium, and writes
docs/images/page_desktop.png and page_phone.png. Needs the extras `serve` and `dev`, and Chromium.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CLIPS, IMAGES = ROOT / "assets/demo/clips", ROOT / "docs/images"
MOST_BYTES = 400_000


@contextmanager
def server(bundle: str) -> Iterator[str]:
    """Serve a bundle on a free port and yield the address."""
    command = [sys.executable, str(ROOT / "cli.py"), "serve", bundle, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            found = re.search(r"http://[\d.]+:\d+/", said)
            if found is None:
                raise SystemExit(f"the server did not start: {said}{process.stdout.read()}")
            yield found[0]
        finally:
            process.terminate()


def ask(page: Any, clip: str, queries: list[str], *, shown_at: float) -> None:
    """Choose a clip, run the queries, and seek to a fraction of its length."""
    page.set_input_files("#file", str(CLIPS / clip))
    for number, query in enumerate(queries, start=1):
        row = page.get_by_label(f"Query {number}", exact=True)
        if row.count() == 0:
            page.get_by_role("button", name="Add a query").click()
        row.fill(query)
    page.get_by_role("button", name="Find", exact=True).click()
    page.wait_for_selector(".answer", timeout=120_000)
    track = page.locator("#scrubber .track").bounding_box()
    page.mouse.click(track["x"] + shown_at * track["width"], track["y"] + track["height"] / 2)
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)


def write(picture: bytes, name: str) -> None:
    """Write a PNG with 256 colours, a quarter of the size with all colours."""
    IMAGES.mkdir(exist_ok=True)
    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(IMAGES / name, optimize=True)
    size = (IMAGES / name).stat().st_size
    print(f"{IMAGES / name}: {size / 1e3:.0f} kB")
    if size > MOST_BYTES:
        raise SystemExit(f"{name} is larger than {MOST_BYTES / 1e3:.0f} kB")


def main(bundle: str) -> None:
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with server(bundle) as url, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 960})
        page.goto(url)
        ask(page, "1-named.mp4", ["the blue bird", "a yellow boat"], shown_at=0.25)
        write(page.screenshot(), "page_desktop.png")
        page = browser.new_page(viewport={"width": 390, "height": 844}, device_scale_factor=2, color_scheme="dark")
        page.goto(url)
        ask(page, "3-upright.mp4", ["the yellow dog", "the red bus"], shown_at=0.34)
        write(page.screenshot(), "page_phone.png")
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
