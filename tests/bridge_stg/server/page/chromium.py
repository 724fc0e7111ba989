"""The browser that the page is tested in: the machine's own Chromium, driven through Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ELSEWHERE = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
MISSING = (
    "the page is tested in Chromium, and there is none on this machine: install it (Debian and Ubuntu: "
    "apt install chromium), or name the program in the environment variable CHROMIUM"
)


def find_chromium() -> str | None:
    """Return the path of a Chromium or Chrome, None if there is none."""
    named = os.environ.get("CHROMIUM")
    found = [shutil.which(name) for name in ((named,) if named else NAMES)]
    found += [path for path in ELSEWHERE if not named and Path(path).exists()]
    return next((path for path in found if path), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a browser without a window; the test is left out where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason='the page is tested with: pip install ".[dev]"')
    program = find_chromium()
    if program is None:
        pytest.skip(MISSING)
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    # Chromium refuses its sandbox to root, as whom containers run tests.
    arguments = ["--autoplay-policy=no-user-gesture-required", "--mute-audio", *(["--no-sandbox"] if root else [])]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=arguments)
        try:
            yield browser
        finally:
            browser.close()
