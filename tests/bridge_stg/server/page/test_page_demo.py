"""The page before the real server on the demo bundle: what is drawn over the clips is what the server's JSON says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.bridge_stg.server.conftest import CLIPS, Running
from tests.bridge_stg.server.page.chromium import chromium
from tests.bridge_stg.server.page.measure import MEASURE
from tests.fakes.clips import decoded, write

pytestmark = pytest.mark.slow

MAGENTA = (255, 45, 190)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Any, demo_server: Running) -> Iterator[Any]:
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, device_scale_factor=2, reduced_motion="reduce"
    )
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(f"{demo_server.url}/")
    yield opened
    context.close()
    assert errors == []


def ask(page: Any, path: Path, query: str, tmp_path: Path) -> dict[str, Any]:
    """Ask about a file as a person does, and return the answer that the page lets them save."""
    page.set_input_files("#file", str(path))
    page.get_by_label("Query 1", exact=True).fill(query)
    page.get_by_label("Query 1", exact=True).press("Enter")
    page.wait_for_selector(".answer")
    with page.expect_download() as download:
        page.get_by_role("button", name="Results as JSON").click()
    download.value.save_as(tmp_path / "results.json")
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert isinstance(result, dict)
    return result


def expect_boxes(page: Any, result: dict[str, Any]) -> None:
    """Walk over the span with the keyboard and compare what is drawn with the JSON."""
    boxes = {box["time_s"]: box["box"] for box in result["boxes"]}
    bar = page.locator("#scrubber")
    seen = set()
    for _ in range(8):
        page.wait_for_timeout(600)
        measured = page.evaluate(MEASURE, [list(MAGENTA), result["size"]])
        time_s = min(boxes, key=lambda known: abs(known - measured["time"]))
        assert abs(time_s - measured["time"]) < 2e-3
        np.testing.assert_allclose(measured["drawn"], boxes[time_s], atol=2)
        seen.add(time_s)
        bar.press("ArrowRight")
    assert len(seen) >= 5


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.stem)
def test_boxes_over_a_clip(clip: Path, page: Any, tmp_path: Path) -> None:
    result = ask(page, clip, clip.with_suffix(".txt").read_text().strip(), tmp_path)
    assert result["found"]
    expect_boxes(page, result)


def test_a_clip_that_no_browser_plays(page: Any, tmp_path: Path) -> None:
    frames, _ = decoded(CLIPS[0])
    clip = write(tmp_path / "clip.avi", frames, codec="mpeg4", rate=8, options={"qscale": "3"})
    result = ask(page, clip, CLIPS[0].with_suffix(".txt").read_text().strip(), tmp_path)
    assert "cannot play this file" in page.locator("#note").inner_text()
    expect_boxes(page, result)


def test_the_annotated_video(page: Any, tmp_path: Path) -> None:
    result = ask(page, CLIPS[0], CLIPS[0].with_suffix(".txt").read_text().strip(), tmp_path)
    with page.expect_download() as download:
        page.get_by_role("button", name="Video with boxes").click()
    download.value.save_as(tmp_path / "drawn.mp4")
    with av.open(str(tmp_path / "drawn.mp4")) as video:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in video.decode(video=0)]
    box = result["boxes"][len(result["boxes"]) // 2]
    image = next(image for time_s, image in frames if abs(time_s - box["time_s"]) < 1e-3)
    left, top, _, bottom = (round(side) for side in box["box"])
    edge = image[(top + bottom) // 2, left - 6 : left + 3].astype(int)  # the line runs around the box
    assert (np.abs(edge - MAGENTA).max(axis=-1) < 70).any(), edge


def test_a_file_that_is_no_video(page: Any) -> None:
    page.set_input_files("#file", str(Path(__file__)))
    failure = page.get_by_role("alert").filter(has_text="cannot be read")
    failure.wait_for()
    assert "test_page_demo.py" in failure.inner_text()
