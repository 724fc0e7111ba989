"""The page in a real browser, before a stand-in of the server whose answers are known: boxes, keys, downloads, errors.

The clips show a white target on black where the answers say that it is, so that what is drawn can be compared both with
the JSON and with the image below it.
"""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bridge_stg.runtime.visualize.canvas import COLOURS
from tests.bridge_stg.server.page.chromium import chromium
from tests.bridge_stg.server.page.measure import MEASURE
from tests.bridge_stg.server.page.page_server import PAGE, Script, serving, true_box
from tests.fakes.clips import write

WIDTH, HEIGHT, RATE, COUNT = 320, 240, 10, 40
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of a target that moves, as H.264, turned by metadata, and in a format that no browser plays."""
    folder = tmp_path_factory.mktemp("clips")
    frames = [scene(index / RATE, WIDTH, HEIGHT) for index in range(COUNT)]
    write(folder / "plain.mp4", frames, rate=RATE)
    write(folder / "unplayable.avi", frames, rate=RATE, codec="mpeg4")
    upright = [np.ascontiguousarray(np.rot90(scene(i / RATE, HEIGHT, WIDTH))) for i in range(COUNT)]
    data = bytearray(write(folder / "turned.mp4", upright, rate=RATE).read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # ISO/IEC 14496-12, 8.3.2, version 0: a quarter turn clockwise
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    (folder / "turned.mp4").write_bytes(data)
    Image.fromarray(frames[0]).save(folder / "image.png")
    (folder / "bad.mp4").write_bytes(b"this is no video" * 64)
    return folder


def scene(time_s: float, width: int, height: int) -> np.ndarray:
    """An image with the first query's target in white."""
    image = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = (round(side) for side in true_box(0, time_s, width, height))
    image[top:bottom, left:right] = 255
    return image


class Visit:
    """One person's look at the page, before a stand-in of their own."""

    def __init__(self, page: Any, script: Script) -> None:
        self.page, self.script = page, script

    def choose(self, path: Path) -> None:
        self.page.set_input_files("#file", str(path))

    def ask(self, *queries: str) -> None:
        for number, query in enumerate(queries, start=1):
            row = self.page.get_by_label(f"Query {number}", exact=True)
            if row.count() == 0:
                self.page.get_by_role("button", name="Add a query").click()
            row.fill(query)
        row.press("Enter")

    def answers(self) -> Any:
        self.page.wait_for_selector(".answer")
        return self.page.locator(".answer")

    def until(self, condition: str) -> None:
        """Wait for a JavaScript expression; the page's policy forbids Playwright's own way, an `eval` in the page."""
        end = time.monotonic() + 60
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, f"waited in vain for {condition}"
            self.page.wait_for_timeout(20)

    def press(self, key: str) -> None:
        """Press a key on the bar below the video, and wait until another frame is shown."""
        bar = self.page.locator("#scrubber")
        before = bar.get_attribute("aria-valuenow")
        bar.press(key)
        self.until(f"document.getElementById('scrubber').getAttribute('aria-valuenow') !== '{before}'")

    def seek_to(self, part: float) -> None:
        """Click on the bar, at a share of its length, and wait for a frame from there."""
        track = self.page.locator("#scrubber .track")
        track.scroll_into_view_if_needed()
        box = track.bounding_box()
        self.page.mouse.click(box["x"] + part * box["width"], box["y"] + box["height"] / 2)
        end = part * COUNT / RATE
        bar = "document.getElementById('scrubber').getAttribute('aria-valuenow')"
        self.until(
            f"Math.abs({bar} - {end}) < {1.5 / RATE} && document.querySelector('#frame > video')?.seeking !== true"
        )
        self.page.wait_for_timeout(100)  # a frame of before may still have been on its way

    def measure(self, *, width: int = WIDTH, height: int = HEIGHT, colour: tuple[int, ...] = (255, 45, 190)) -> Any:
        return self.page.evaluate(MEASURE, [list(colour), {"width": width, "height": height}])


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    """Opens the page. What it complains about in the browser's console fails the test."""
    complaints: list[str] = []
    with ExitStack() as stack:

        def open_page(script: Script | None = None, viewport: dict[str, int] = DESKTOP, **options: Any) -> Visit:
            script = script or Script()
            url = stack.enter_context(serving(script))
            # Without motion nothing moves between the measuring of a place and the click on it.
            context = browser.new_context(viewport=viewport, reduced_motion="reduce", **options)
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(60_000)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
            page.goto(url)
            return Visit(page, script)

        yield open_page
    # The browser itself reports refused requests as errors; those are looked at by the tests that make them.
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []


def expected_box(results: list[dict[str, Any]], index: int, time_s: float) -> list[float] | None:
    """The box that the JSON holds for the frame shown at a time: the last one that began before."""
    shown = [box for box in results[index]["boxes"] if -1 / RATE < box["time_s"] - time_s < 2e-3]
    return shown[-1]["box"] if shown else None


def saved_json(seen: Visit, tmp_path: Path) -> list[dict[str, Any]]:
    with seen.page.expect_download() as download:
        seen.page.get_by_role("button", name="Results as JSON").click()
    download.value.save_as(tmp_path / "results.json")
    results: list[dict[str, Any]] = json.loads((tmp_path / "results.json").read_text())["results"]
    return results


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", ["plain.mp4", "plain.mp4 without word of frames", "turned.mp4", "unplayable.avi"])
def test_the_box_is_where_the_json_says(
    name: str, viewport: dict[str, int], visit: Callable[..., Visit], clips: Path, tmp_path: Path
) -> None:
    name, _, without_frames = name.partition(" ")
    width, height = (HEIGHT, WIDTH) if name == "turned.mp4" else (WIDTH, HEIGHT)
    seen = visit(viewport=viewport, device_scale_factor=2 if viewport is PHONE else 1)
    if without_frames:  # as in browsers that do not tell which frame they show
        seen.page.add_init_script("delete HTMLVideoElement.prototype.requestVideoFrameCallback")
        seen.page.reload()
    seen.choose(clips / name)
    seen.ask("the target", "another", "an absent one")
    assert seen.answers().count() == 3
    results = saved_json(seen, tmp_path)
    with_box = 0
    for part in (0.02, 0.28, 0.5, 0.66, 0.72, 0.9):
        seen.seek_to(part)
        measured = seen.measure(width=width, height=height)
        expected = expected_box(results, 0, measured["time"])
        assert (measured["drawn"] is None) == (expected is None), measured
        if expected is None:
            continue
        with_box += 1
        np.testing.assert_allclose(measured["drawn"], expected, atol=2)
        np.testing.assert_allclose(measured["drawn"], measured["target"], atol=3)  # coded frames blur edges
        second = seen.measure(width=width, height=height, colour=(25, 200, 255))["drawn"]
        np.testing.assert_allclose(second, expected_box(results, 1, measured["time"]), atol=2)
    assert with_box == 4
    note = seen.page.locator("#note")
    assert note.is_visible() == (name == "unplayable.avi")
    if name == "unplayable.avi":
        assert "cannot play this file" in note.inner_text()


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_sample_is_opened_with_its_query_and_queries_stay_above_answers(
    viewport: dict[str, int], visit: Callable[..., Visit], clips: Path
) -> None:
    about = {"sample": {"name": "plain.mp4", "query": "the target"}}
    seen = visit(Script(sample=clips / "plain.mp4", about=about), viewport)
    seen.page.get_by_role("button", name="Try the sample video").click()
    seen.page.wait_for_selector("#file-card:not([hidden])")
    assert seen.page.locator("#file-name").inner_text() == "plain.mp4"
    row = seen.page.get_by_label("Query 1", exact=True)
    assert row.input_value() == "the target"
    row.press("Enter")
    answers = seen.answers().first.bounding_box()
    assert row.bounding_box()["y"] < answers["y"]
    assert (row.bounding_box()["x"] < answers["x"] + answers["width"]) == (viewport is PHONE)


def test_all_occurrences_are_drawn_and_listed(visit: Callable[..., Visit], clips: Path) -> None:
    duration_s = COUNT / RATE
    first, last = (0.0, 0.1 * duration_s), (0.85 * duration_s, 0.95 * duration_s)
    seen = visit(Script(occurrences=(last, first)))
    seen.choose(clips / "plain.mp4")
    seen.ask("the target")
    assert seen.answers().count() == 1
    for part, there in ((0.05, True), (0.15, False), (0.5, True), (0.8, False), (0.9, True)):
        seen.seek_to(part)
        measured = seen.measure()
        assert (measured["drawn"] is not None) == there, part
        if there:
            np.testing.assert_allclose(measured["drawn"], measured["target"], atol=3)
    seen.page.get_by_text("2 more").click()
    others = seen.page.locator(".others li")
    starts = [float(text.split(" s")[0]) for text in others.all_inner_texts()]
    assert starts == pytest.approx([first[0], last[0]], abs=0.005)
    others.nth(1).get_by_role("button").first.click()
    seen.until(f"document.getElementById('scrubber').getAttribute('aria-valuenow') > {0.8 * duration_s}")


def test_without_a_sample_none_is_offered(visit: Callable[..., Visit]) -> None:
    seen = visit(Script(about={"sample": None}))
    seen.page.wait_for_selector("#server")
    assert not seen.page.locator("#sample").is_visible()


@pytest.mark.parametrize("name", ["plain.mp4", "unplayable.avi"])
def test_boxes_follow_the_playing_video(name: str, visit: Callable[..., Visit], clips: Path) -> None:
    seen = visit()
    seen.choose(clips / name)
    seen.ask("the target")
    seen.answers()
    play = seen.page.get_by_role("button", name="Play")
    drawn: dict[float, dict[str, Any]] = {}
    for _ in range(200):
        if play.count():  # at the start, and after the end if too few frames were seen on a busy machine
            play.click()
        measured = seen.measure()
        if measured["drawn"]:
            drawn[measured["time"]] = measured
        if len(drawn) >= 5 and measured["time"] > 2.9:
            break
        seen.page.wait_for_timeout(30)
    assert len(drawn) >= 5
    step = true_box(0, 1 / RATE, WIDTH, HEIGHT)[0] - true_box(0, 0, WIDTH, HEIGHT)[0]
    for at, frame in drawn.items():
        assert frame["drawn"] == pytest.approx(true_box(0, at, WIDTH, HEIGHT), abs=2)
    # The browser may compose a frame more, or several on a busy machine, between two looks of the test.
    late = [np.abs(np.subtract(frame["drawn"], frame["target"])).max() for frame in drawn.values()]
    assert np.median(late) <= step + 3


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_says_what_the_model_is_and_which_words_it_does_not_know(
    viewport: dict[str, int], visit: Callable[..., Visit], clips: Path
) -> None:
    knows = "This model knows 10 drawn things (car, bus, dog, cat, ball, airplane, bicycle, tree, bird, boat)."
    seen = visit(Script(about={"trained": False, "knows": knows}), viewport)
    seen.until("!document.getElementById('untrained').hidden")
    assert "untrained" in seen.page.locator("#untrained").inner_text()
    assert seen.page.locator("#knows").inner_text() == knows
    seen.choose(clips / "plain.mp4")
    seen.ask("the target", "an unknownman and unknowncat")
    assert seen.answers().nth(0).locator(".quiet").count() == 0
    assert seen.answers().nth(1).locator(".quiet").inner_text().endswith("not know: unknownman, unknowncat")
    assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("about", [{}, {"trained": True, "knows": None}])
def test_a_trained_model_without_a_vocabulary_gets_no_note(about: dict[str, Any], visit: Callable[..., Visit]) -> None:
    seen = visit(Script(about=about))
    seen.until("document.getElementById('server').textContent.includes('demo')")
    assert not seen.page.locator("#untrained").is_visible() and not seen.page.locator("#knows").is_visible()


def test_keyboard_alone(visit: Callable[..., Visit], clips: Path) -> None:
    seen = visit()
    page = seen.page
    choosers: list[Any] = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))  # noqa: PLW0108 - Playwright takes no builtins

    def tab_to(name: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            focused = page.evaluate(
                """(() => {
                  const e = document.activeElement, { outlineStyle, outlineWidth } = getComputedStyle(e);
                  return [e.id || e.textContent.trim(), outlineStyle !== "none" && parseFloat(outlineWidth) >= 2];
                })()"""
            )
            assert focused[1], f"the focus on {focused[0]} cannot be seen"
            if focused[0] == name:
                return
        raise AssertionError(f"{name} was never reached")

    tab_to("choose")
    page.keyboard.press("Enter")
    while not choosers:
        page.wait_for_timeout(20)
    choosers[0].set_files(str(clips / "plain.mp4"))
    seen.until("document.activeElement.getAttribute('aria-label') === 'Query 1'")
    page.keyboard.type("the target")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("too much")
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Backspace")
    page.keyboard.press("Enter")
    assert seen.answers().count() == 2
    assert page.locator("#status").inner_text() == "Found 2 of 2."
    page.evaluate("document.activeElement.blur()")
    tab_to("scrubber")
    bar = page.locator("#scrubber")
    assert float(bar.get_attribute("aria-valuenow")) == pytest.approx(0.8, abs=1e-3)  # the first span's first frame
    for key, time_s in [
        ("ArrowRight", 0.9), ("ArrowRight", 1.0), ("ArrowLeft", 0.9), ("Shift+ArrowRight", 1.9), ("]", 2.9), ("[", 1.0),
        ("[", 0.8), ("End", 3.9), ("Home", 0.0),
    ]:  # fmt: skip
        seen.press(key)
        assert float(bar.get_attribute("aria-valuenow")) == pytest.approx(time_s, abs=2e-3), key
    seen.press("]")
    assert "in view: the target" in bar.get_attribute("aria-valuetext")
    tab_to("2.90 s" if page.locator(".go").nth(1).inner_text() == "2.90 s" else "3.00 s")
    page.keyboard.press("Enter")
    seen.until("Math.abs(document.getElementById('scrubber').getAttribute('aria-valuenow') - 2.9) < 2e-3")
    page.locator("#play").focus()
    page.keyboard.press("Space")
    seen.until("!document.querySelector('video').paused")
    page.locator("#scrubber").press("Space")
    seen.until("document.querySelector('video').paused")


def test_downloads(visit: Callable[..., Visit], clips: Path, tmp_path: Path) -> None:
    seen = visit()
    seen.choose(clips / "plain.mp4")
    seen.ask("the target", "an absent one")
    seen.answers()
    results = saved_json(seen, tmp_path)
    assert [result["found"] for result in results] == [True, False]
    with seen.page.expect_download() as download:
        seen.page.get_by_role("button", name="Video with boxes").click()
    assert download.value.suggested_filename == "plain-boxes.mp4"
    download.value.save_as(tmp_path / "drawn.mp4")
    assert (tmp_path / "drawn.mp4").read_bytes() == (clips / "plain.mp4").read_bytes()  # what the stand-in sends


def test_an_image(visit: Callable[..., Visit], clips: Path, tmp_path: Path) -> None:
    seen = visit()
    seen.choose(clips / "image.png")
    seen.ask("the target")
    assert "found" in seen.answers().inner_text()
    assert seen.page.locator("#scrubber").is_hidden()
    np.testing.assert_allclose(seen.measure()["drawn"], true_box(0, 0, WIDTH, HEIGHT), atol=2)
    with seen.page.expect_download() as download:
        seen.page.get_by_role("button", name="Image with boxes").click()
    download.value.save_as(tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert drawn.size == (WIDTH, HEIGHT)
        assert (np.abs(np.asarray(drawn.convert("RGB")).astype(int) - (255, 45, 190)).max(axis=-1) < 40).sum() > 100


def test_only_when(visit: Callable[..., Visit], clips: Path) -> None:
    seen = visit()
    seen.choose(clips / "plain.mp4")
    seen.page.get_by_text("Options").click()
    seen.page.get_by_label("Only when, without boxes").check()
    seen.page.get_by_label("It may not be in the video at all").uncheck()
    seen.ask("the target")
    assert "0.80 s" in seen.answers().inner_text()
    assert seen.script.asked[0]["task"] == "span" and seen.script.asked[0]["allow_none"] is False
    assert seen.measure()["drawn"] is None


def test_a_box_can_be_hidden(visit: Callable[..., Visit], clips: Path) -> None:
    seen = visit()
    seen.choose(clips / "plain.mp4")
    seen.ask("the target")
    seen.answers()
    seen.press("]")
    assert seen.measure()["drawn"] is not None
    seen.page.get_by_role("button", name="Box of query 1: shown").click()
    assert seen.measure()["drawn"] is None
    seen.page.get_by_role("button", name="Box of query 1: hidden").click()
    assert seen.measure()["drawn"] is not None


def test_the_error_of_a_bad_file_is_shown(visit: Callable[..., Visit], clips: Path) -> None:
    seen = visit()
    seen.choose(clips / "bad.mp4")
    failure = seen.page.get_by_role("alert").filter(has_text="cannot be read")
    failure.wait_for()
    assert "bad.mp4 is no video that can be read here." in failure.inner_text()
    assert seen.page.get_by_role("button", name="Choose a video or image").is_visible()
    seen.choose(clips / "plain.mp4")
    seen.ask("the target")
    assert seen.answers().count() == 1
    assert failure.count() == 0 or failure.is_hidden()


def test_an_answer_of_text_heads_says_how_it_was_written(visit: Callable[..., Visit], clips: Path) -> None:
    seen = visit()
    seen.choose(clips / "plain.mp4")
    seen.ask("the car in text", "the dog")
    details = [seen.answers().nth(index).locator(".scores") for index in (0, 1)]
    text = re.sub(r"\s+", " ", details[0].inner_text())
    assert "mode joint" in text and "calls 7" in text and "calls" not in details[1].inner_text()
    assert "presence" not in text and "presence" in details[1].inner_text()


def test_an_absent_target(visit: Callable[..., Visit], clips: Path) -> None:
    seen = visit()
    seen.choose(clips / "plain.mp4")
    seen.ask("an absent one")
    assert "not in this video" in seen.answers().inner_text()
    assert seen.page.locator("#answers-title").inner_text() == "It is not in this video"
    assert seen.measure()["drawn"] is None


def test_a_key_is_requested_and_kept(visit: Callable[..., Visit], clips: Path) -> None:
    seen = visit(Script(key="right"))
    page = seen.page
    seen.choose(clips / "plain.mp4")
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("API key").fill("wrong")
    dialog.get_by_role("button", name="Use it").click()
    page.get_by_role("heading", name="The server did not accept this key").wait_for()
    page.get_by_label("API key").fill("right")
    page.get_by_label("API key").press("Enter")
    seen.ask("the target")
    assert seen.answers().count() == 1
    page.reload()
    seen.choose(clips / "plain.mp4")
    seen.ask("the target")
    assert seen.answers().count() == 1
    assert dialog.count() == 0 or dialog.is_hidden()
    assert page.evaluate("localStorage.length") == 0 and "right" not in page.url


def test_without_a_key_nothing_goes_on(visit: Callable[..., Visit], clips: Path) -> None:
    seen = visit(Script(key="right"))
    seen.choose(clips / "plain.mp4")
    seen.page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    seen.page.get_by_role("heading", name="The server needs an API key").wait_for()
    seen.page.get_by_role("button", name="Try again").click()
    seen.page.get_by_role("textbox", name="API key").fill("right")
    seen.page.get_by_role("textbox", name="API key").press("Enter")
    seen.page.get_by_text(f"{WIDTH} × {HEIGHT}").wait_for()


def test_a_request_to_a_busy_server_is_repeated(visit: Callable[..., Visit], clips: Path) -> None:
    seen = visit(Script(busy=1))
    seen.choose(clips / "plain.mp4")
    seen.ask("the target")
    seen.page.get_by_text("busy, again in").wait_for()
    assert seen.answers().count() == 1
    assert sum(request == "POST /v1/jobs" for request in seen.script.seen) == 2


def test_cancel_stops_the_job(visit: Callable[..., Visit], clips: Path) -> None:
    seen = visit(Script(stage_s=1.0))
    seen.choose(clips / "plain.mp4")
    seen.ask("the target")
    seen.page.locator("[aria-current=step]").filter(has_text="Looking at it").wait_for()
    assert seen.page.get_by_role("button", name="Find").is_disabled()
    seen.page.get_by_role("button", name="Cancel").click()
    seen.until("document.getElementById('status').textContent === 'Cancelled.'")
    assert seen.page.get_by_role("button", name="Find").is_enabled()
    seen.page.wait_for_timeout(100)
    assert seen.script.cancelled == {"job0"}


def test_a_lost_connection_is_taken_up_again(visit: Callable[..., Visit], clips: Path) -> None:
    seen = visit(Script(lose=2))
    seen.choose(clips / "plain.mp4")
    seen.ask("the target")
    assert seen.answers().count() == 1
    assert sum(request.endswith("/events") for request in seen.script.seen) == 3


def test_the_error_of_a_job_is_shown(visit: Callable[..., Visit], clips: Path) -> None:
    seen = visit(Script(fail="The query has 4000 characters; at most 300 are taken."))
    seen.choose(clips / "plain.mp4")
    seen.ask("the target")
    seen.page.get_by_text("at most 300 are taken").wait_for()
    assert seen.page.locator(".answer").count() == 0


def test_several_lines_become_several_queries(visit: Callable[..., Visit]) -> None:
    seen = visit()
    seen.page.get_by_label("Query 1", exact=True).focus()
    seen.page.evaluate(
        """() => {
          const clipboardData = new DataTransfer();
          clipboardData.setData("text", "one\\n\\n two \\r\\nthree");
          const paste = new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true });
          document.activeElement.dispatchEvent(paste);
        }"""
    )
    rows = seen.page.locator(".query input")
    assert [rows.nth(i).input_value() for i in range(rows.count())] == ["one", "two", "three"]
    seen.page.get_by_role("button", name="Remove query 2").click()
    assert [rows.nth(i).input_value() for i in range(rows.count())] == ["one", "three"]


def test_a_dropped_file_is_taken(visit: Callable[..., Visit], clips: Path) -> None:
    seen = visit()
    data = seen.page.evaluate_handle(
        """async (bytes) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "plain.mp4", { type: "video/mp4" }));
          return data;
        }""",
        list((clips / "plain.mp4").read_bytes()),
    )
    seen.page.dispatch_event("body", "dragenter", {"dataTransfer": data})
    seen.page.get_by_text("Drop the file to open it").wait_for()
    seen.page.dispatch_event("body", "drop", {"dataTransfer": data})
    seen.page.get_by_text(f"{WIDTH} × {HEIGHT}").wait_for()
    assert seen.page.get_by_text("Drop the file to open it").is_hidden()


def test_a_video_that_is_put_away_is_deleted(visit: Callable[..., Visit], clips: Path) -> None:
    seen = visit()
    for name in ("plain.mp4", "image.png"):
        seen.choose(clips / name)
        seen.page.get_by_text(f"{WIDTH} × {HEIGHT}").wait_for()
    seen.page.wait_for_timeout(100)
    assert "DELETE /v1/videos/video0" in seen.script.seen


def live_update(time_s: float, events: list[str]) -> dict[str, Any]:
    box = true_box(0, time_s, WIDTH, HEIGHT)
    at = {"time_s": time_s, "box": box, "presence": 0.9, "visible": True, "interpolated": False}
    grounding = {
        "query": "the dog", "found": True, "span": {"start_s": 0.0, "end_s": time_s},
        "size": {"width": WIDTH, "height": HEIGHT},
        "scores": {"absent": 0.1, "answer": 0.8, "presence": 0.9}, "boxes": [at],
    }  # fmt: skip
    told = [{"event": kind, "query": "the dog", "time_s": time_s, "box": box} for kind in events]
    return {"known_s": time_s, "groundings": [grounding], "events": told}


def test_a_live_source_is_watched(visit: Callable[..., Visit]) -> None:
    updates = [live_update(1.0, ["appeared"]), live_update(2.0, []), live_update(3.0, ["moved"])]
    seen = visit(Script(live=updates, stage_s=0.3))
    seen.page.get_by_role("button", name="door").click()
    seen.ask("the dog")
    seen.page.get_by_text("moved").wait_for()
    events = seen.page.locator("#events li")
    assert [re.sub(r"\s+", " ", events.nth(i).inner_text()) for i in range(2)] == [
        "1 the dog moved 3.00 s",
        "1 the dog appeared 1.00 s",
    ]
    drawn = seen.measure()["drawn"]
    np.testing.assert_allclose(drawn, true_box(0, 3.0, WIDTH, HEIGHT), atol=2)


def test_boxes_are_drawn_in_their_live_frame(visit: Callable[..., Visit]) -> None:
    updates = []
    for i in range(1, 46):
        update = live_update(0.1 * i, [])
        at = update["groundings"][0]["boxes"][0]
        before = [0.1 * k for k in range(i)]
        boxes = [{**at, "time_s": time_s, "box": true_box(0, time_s, WIDTH, HEIGHT)} for time_s in before]
        update["groundings"][0]["boxes"] = [*boxes, at]
        updates.append(update)
    image = partial(scene, width=WIDTH, height=HEIGHT)
    seen = visit(Script(live=updates, stage_s=0.15, image=image, ahead_s=0.7))
    seen.page.get_by_role("button", name="door").click()
    seen.ask("the dog")
    seen.until("document.getElementById('answers-title').textContent.includes('2.')")
    compared = 0
    while "4.50 s" not in seen.page.locator("#answers-title").inner_text():
        found = seen.measure()
        if found["drawn"] and found["target"]:
            np.testing.assert_allclose(found["drawn"], found["target"], atol=3)
            compared += 1
    assert compared > 3


def test_nothing_is_wider_than_the_page(visit: Callable[..., Visit], clips: Path) -> None:
    seen = visit(Script(stage_s=0.5))

    def check(state: str) -> None:
        for width in (320, 360, 768, 1024, 1440):
            seen.page.set_viewport_size({"width": width, "height": 740})
            check_width(f"{state} at {width} pixels")

    def check_width(state: str) -> None:
        cut = seen.page.evaluate(
            """() => [...document.querySelectorAll("main *, header *")].filter((e) => {
              const { left, right } = e.getBoundingClientRect();
              return e.checkVisibility() && e.id !== "status" && (right > innerWidth || left < 0);
            }).map((e) => e.outerHTML)"""
        )
        assert cut == [], state
        wide = seen.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide[0] <= wide[1], state
        small = seen.page.evaluate(
            """() => [...document.querySelectorAll("button, summary, input:not([type=file]):not([type=checkbox])")]
              .filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 24).map((e) => e.outerHTML)"""
        )
        assert small == [], f"{state}: too small for a finger"
        name = seen.page.evaluate("document.querySelector('h1').getBoundingClientRect().height")
        assert name < 40, f"{state}: the name in two lines"

    check("empty")
    seen.choose(clips / "plain.mp4")
    seen.ask(
        "the target", "a" * 120, "an absent one with a name of several words that do not fit into one line of a phone"
    )
    seen.page.locator("[aria-current=step]").wait_for()
    check("working")
    seen.answers()
    seen.page.get_by_text("Keys", exact=True).click()
    seen.page.get_by_text("Options", exact=True).click()
    check("done")
    seen.choose(clips / "bad.mp4")
    seen.page.get_by_text("bad.mp4 is no video").wait_for()
    check("error")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(scheme: str, visit: Callable[..., Visit], clips: Path) -> None:
    """Every text has the contrast to its ground that WCAG 2.2 (1.4.3) asks for."""
    seen = visit(color_scheme=scheme)
    seen.choose(clips / "plain.mp4")
    seen.ask("the target", "an absent one")
    seen.answers()
    weak = seen.page.evaluate(
        """() => {
          const parse = (text) => {
            const numbers = text.match(/[\\d.]+/g).map(Number);
            return [...numbers.slice(0, 3), numbers[3] ?? 1];
          };
          const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const ground = (e) => { for (; e; e = e.parentElement) {
            const c = parse(getComputedStyle(e).backgroundColor); if (c[3] === 1) return c; } return [255, 255, 255]; };
          return [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.disabled &&
              [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())).map((e) => {
            const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
            return [(a + 0.05) / (b + 0.05), e.textContent.trim().slice(0, 40)];
          }).filter(([ratio]) => ratio < 4.5);
        }"""
    )
    assert weak == []


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for path in PAGE.iterdir():
        text = path.read_text()
        foreign = [url for url in re.findall(r"https?://[^\s\"'<>)]+", text) if "www.w3.org/2000/svg" not in url]
        assert foreign == [], path
        assert not re.search(r"\sstyle=|\son\w+=\"|<style|innerHTML|\beval\(", text), path


def test_one_palette() -> None:
    text = (PAGE / "palette.js").read_text()
    colours = [tuple(map(int, found)) for found in re.findall(r"\[(\d+), (\d+), (\d+)\]", text)]
    assert colours == list(COLOURS)
