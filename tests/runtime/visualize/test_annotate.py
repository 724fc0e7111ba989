"""Annotated videos and contact sheets: what is drawn where, and that frame times and sizes are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from bridge_stg.runtime.chain.results import FrameBoxes, Grounding, Tube
from bridge_stg.runtime.errors import BridgeError, VideoError
from bridge_stg.runtime.video.open import open_source
from bridge_stg.runtime.video.playback import play
from bridge_stg.runtime.video.token_budget import CoarseChoice
from bridge_stg.runtime.visualize import fonts
from bridge_stg.runtime.visualize.annotate import annotate, encode_h264
from bridge_stg.runtime.visualize.canvas import COLOURS, TARGET, draw_box, fit_text
from bridge_stg.runtime.visualize.contact_sheet import (
    CURVE_HEIGHT,
    CURVE_TITLE,
    PAGE_WIDTH,
    contact_sheet,
    grid,
    shown_times,
    tick_step,
)
from bridge_stg.runtime.visualize.crop import view_of
from bridge_stg.runtime.visualize.fonts import drawable, font, font_for, missing_letters
from bridge_stg.runtime.visualize.painter import frame_index, marks_at
from tests.errors import raises
from tests.fakes.chain import fake_spec
from tests.fakes.clips import write

SIZE = (96, 64)
TIMES = np.array([0.0, 0.1, 0.2, 0.45, 0.5, 0.9, 1.0, 1.3])
"""Seconds, unevenly spaced."""


def write_clip(path: Path, size: tuple[int, int] = SIZE, times: np.ndarray = TIMES) -> Path:
    encode_h264(((float(time), Image.new("RGB", size, (70, 90, 80))) for time in times), path)
    return path


def found(
    times: np.ndarray, size: tuple[int, int] = SIZE, *, visible: bool = True, query: str = "the dog"
) -> Grounding:
    count = len(times)
    box = np.array([0.25 * size[0], 0.125 * size[1], 0.75 * size[0], 0.5 * size[1]], np.float32)
    tube = Tube(
        times=times,
        boxes=np.tile(box, (count, 1)),
        presence=np.full(count, 0.9 if visible else 0.2, np.float32),
        visible=np.full(count, visible),
    )
    span = (float(times[0]), float(times[-1]) + 0.1)
    return grounding(query, size, span=span, tube=tube, boxes=tube.at(times))


def grounding(query: str, size: tuple[int, int], **parts: object) -> Grounding:
    answer = {"found": bool(parts), "span": None, "tube": None, "boxes": None, **parts}
    scores = {"absent": 0.1, "answer": 0.9, "presence": 0.9}
    coarse = CoarseChoice(fps=2, size=size, groups=1, tokens=4, max_visual_tokens=None)
    fixed = {"answer": "", "named_span": None, "scores": scores, "tokens": {}, "timings": {}, "coarse": coarse}
    return Grounding(query=query, size=size, **fixed, **answer)


def frames_of(path: Path) -> list[tuple[float, np.ndarray]]:
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        return [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def magenta(pixels: np.ndarray) -> np.ndarray:
    """bool [H, W]: near the colour of boxes, as far as H.264 keeps it."""
    red, green, blue = np.moveaxis(pixels.astype(int), -1, 0)
    return (red - green > 60) & (blue - green > 40)


def test_annotated_video_keeps_times_and_shows_the_box_inside_the_span_only(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    annotate(clip, found(TIMES[2:5]), tmp_path / "out.mp4")
    frames = frames_of(tmp_path / "out.mp4")
    np.testing.assert_allclose([time for time, _ in frames], TIMES, atol=1e-4)
    above_strip = [magenta(pixels[:34]).sum() for _, pixels in frames]
    assert [count > 40 for count in above_strip] == [2 <= i < 5 for i in range(len(TIMES))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "out.mp4"]


def test_queries_share_a_picture_in_their_colours(tmp_path: Path) -> None:
    pixels, times = np.full((360, 640, 3), 80, np.uint8), np.zeros(1)
    both = [found(times, (640, 360), query=query) for query in ("the dog", "the dog that barks")]
    for write_picture in (annotate, contact_sheet):
        write_picture(pixels, [*both, grounding("a cat", (640, 360))], tmp_path / "out.png")
        with Image.open(tmp_path / "out.png") as image:
            picture = np.asarray(image)
        counts = [(picture == colour).all(-1).sum() for colour in COLOURS[:4]]
        assert min(counts[:2]) > 1000 and counts[2] > 80 and not counts[3]  # of the absent one, the legend
    annotate(pixels, [], tmp_path / "none.png")
    contact_sheet(pixels, [], tmp_path / "none.png")


def test_last_frame_keeps_its_length(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", times=np.arange(10) / 10)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.duration / av.time_base == pytest.approx(1.0, abs=0.01)


def test_a_single_frame_is_shown_for_a_while(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", times=np.zeros(1))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.duration / av.time_base == pytest.approx(0.04)


@pytest.mark.parametrize("size", [(1, 1), (4, 200), (7, 9), (200, 3)])
def test_tiny_videos(size: tuple[int, int], tmp_path: Path) -> None:
    picture = np.full((size[1], size[0], 3), 90, np.uint8)
    clip = write(tmp_path / "clip.mkv", [picture] * 3, codec="ffv1", pixels="bgr0")
    annotate(clip, [found(np.arange(3) / 25, size), grounding("a cat", size)], tmp_path / "out.mp4")
    assert len(frames_of(tmp_path / "out.mp4")) == 3


def test_odd_sides_gain_one_pixel(tmp_path: Path) -> None:
    frames = [(0.0, np.full((35, 51, 3), 90, np.uint8)), (0.5, np.full((35, 51, 3), 90, np.uint8))]
    annotate(iter(frames), found(np.array([0.0, 0.5]), (51, 35)), tmp_path / "out.mp4")
    assert frames_of(tmp_path / "out.mp4")[0][1].shape == (36, 52, 3)


def test_playback_gives_the_times_that_groundings_use(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with play(clip) as playback, open_source(clip, fake_spec()) as source:
        np.testing.assert_array_equal([time for time, _ in playback.frames], source.frame_times)
    late = ((5.0 + time, np.zeros((8, 8, 3), np.uint8)) for time in (0.0, 0.25))
    with play(late) as playback:
        assert [time for time, _ in playback.frames] == [0.0, 0.25]


def test_playback_finds_the_frames_shown_at_some_times() -> None:
    buffer = np.zeros((8, 8, 3), np.uint8)

    def frames() -> Iterator[tuple[float, np.ndarray]]:
        for index in range(5):
            buffer[:] = index  # the caller's buffer is used again
            yield 3 + index / 4, buffer

    with play(frames()) as playback:
        shown = playback.frames_at([0, 0.2, 0.5, 0.74, 9])
        assert [int(frame[0, 0, 0]) for frame in shown] == [0, 0, 2, 2, 4]
        assert playback.end_s == 1.25
    with raises("video.no_frames"), play([]) as playback:
        playback.frames_at([0])


def test_image_becomes_an_image(tmp_path: Path) -> None:
    pixels = np.full((64, 96, 3), 80, np.uint8)
    for name in ("out.png", "out.jpg"):
        annotate(pixels, found(np.zeros(1)), tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.size == (96, 64)
            assert magenta(np.asarray(image.convert("RGB"))).sum() > 40
    with raises("output.bad_suffix", "out.mp4", ".png"):
        annotate(pixels, found(np.zeros(1)), tmp_path / "out.mp4")
    with raises("output.bad_suffix", "out.png", ".mp4"):
        annotate(iter([(0.0, pixels)]), found(np.zeros(1)), tmp_path / "out.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_progress_ends_with_the_video(tmp_path: Path) -> None:
    seen: list[tuple[str, float, float | None]] = []
    clip = write_clip(tmp_path / "clip.mp4")
    annotate(clip, found(TIMES), tmp_path / "out.mp4", progress=lambda *values: seen.append(values))
    assert [stage for stage, _, _ in seen] == ["annotate"] * len(TIMES)
    assert seen[-1][1] == pytest.approx(TIMES[-1])


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[float, np.ndarray]]:
        yield 0.0, np.zeros((32, 32, 3), np.uint8)
        raise VideoError("video.unreadable", "the camera was unplugged")

    (tmp_path / "out.mp4").write_bytes(b"old")
    with raises("video.unreadable", kind=VideoError):
        annotate(broken(), found(np.zeros(1), (32, 32)), tmp_path / "out.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"old"
    with raises("video.no_frames", kind=VideoError):
        annotate(iter([]), found(np.zeros(1), (32, 32)), tmp_path / "out.mp4")
    with pytest.raises(BridgeError, match="does not exist"):
        annotate(np.zeros((8, 8, 3), np.uint8), found(np.zeros(1), (8, 8)), tmp_path / "nowhere" / "out.png")


def test_sheet_shows_up_to_twelve_frames_and_a_timeline(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", times=np.arange(30) / 10)
    contact_sheet(clip, found(np.arange(5, 25) / 10, query="the dog " * 500), tmp_path / "sheet.png")
    contact_sheet(clip, grounding("the dog", SIZE), tmp_path / "none.png")
    pages = {}
    for name in ("sheet", "none"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.format == "PNG" and image.width == PAGE_WIDTH
            pages[name] = np.asarray(image)
    exact = {name: (page == TARGET).all(-1) for name, page in pages.items()}
    assert exact["sheet"].sum() > 5000 and not exact["none"].any()
    _, (width, height) = grid(12, SIZE)
    pictures = (abs(pages["none"].astype(int) - (70, 90, 80)) < 10).all(-1).sum()
    assert pictures == pytest.approx(12 * width * height, rel=0.02)


@pytest.mark.parametrize("size", [(96, 64), (40, 90), (300, 20), (33, 31)])
def test_sheet_of_any_shape(tmp_path: Path, size: tuple[int, int]) -> None:
    clip = write_clip(tmp_path / "clip.mp4", (size[0] + size[0] % 2, size[1] + size[1] % 2), TIMES[:2])
    for count in (1, 2):
        contact_sheet(clip, found(TIMES[:count], size), tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as page:
            assert page.width == PAGE_WIDTH and page.height < 900


def test_the_curve_does_not_hide_its_label(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with Image.open(contact_sheet(clip, found(TIMES), tmp_path / "sheet.png")) as page:
        above_curve = np.asarray(page)[-147:-135, :110]
    assert (above_curve.max(axis=-1) < 150).sum() > 20


def test_text_heads_have_no_curve_of_presence(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    heights = []
    for heads in ("bridge", "text"):
        with Image.open(
            contact_sheet(clip, dataclasses.replace(found(TIMES), heads=heads), tmp_path / "sheet.png")
        ) as page:
            heights.append(page.height)
    assert heights[0] - heights[1] == CURVE_TITLE + CURVE_HEIGHT


def test_each_query_has_a_frame_on_the_sheet() -> None:
    def boxes(times: np.ndarray) -> FrameBoxes:
        tube = found(times).tube
        assert tube is not None
        return tube.at(times)

    long, short = boxes(np.arange(1000) / 10), boxes(np.array([31.02, 31.03]))
    for both in ([long, short], [short, long]):
        times = shown_times(both)
        assert len(times) <= 12 and 31.03 in times and (np.diff(times) > 0).all() and times[-1] == 99.9
    assert len(shown_times([long])) == 12 and shown_times([short]).tolist() == [31.02, 31.03]


def test_small_targets_are_enlarged_with_the_whole_frame_as_an_inset(tmp_path: Path) -> None:
    size, cell = (1920, 1080), (240, 135)
    small, large = np.array([1860, 10, 1910, 50]), np.array([200, 200, 900, 900])
    left, top, right, bottom = view_of([small], size, cell)
    assert left <= 1860 and right == 1920 and top == 0 and bottom >= 50
    assert (right - left) / (bottom - top) == pytest.approx(16 / 9) and 1920 / (right - left) == 6
    for boxes in ([], [large], [small, large]):
        assert view_of(boxes, size, cell) == (0, 0, *size)
    assert 480 / (view_of([small / 4], (480, 270), cell)[2] - view_of([small / 4], (480, 270), cell)[0]) == 4


def test_sheet_of_an_image_has_no_timeline(tmp_path: Path) -> None:
    heights = []
    for found_it in (found(np.zeros(1)), grounding("the dog", SIZE)):
        contact_sheet(np.full((64, 96, 3), 80, np.uint8), found_it, tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as page:
            heights.append(page.height)
    assert heights[0] == heights[1] < 700


def test_frame_index_takes_the_frame_at_that_time_only() -> None:
    times = np.array([1.0, 1.04, 1.08])
    boxes = FrameBoxes(times, np.zeros((3, 4)), np.ones(3), np.ones(3, bool), np.zeros(3, bool))
    assert [frame_index(boxes, time) for time in (1.0, 1.0404, 1.06, 0.96, 1.08, 1.12)] == [0, 1, None, None, 2, None]


def test_line_runs_around_the_box_and_dashes_have_gaps() -> None:
    counts = {}
    for dashed in (False, True):
        image = Image.new("RGB", (80, 60))
        draw_box(ImageDraw.Draw(image), (20, 15, 60, 45), image.size, thickness=2, dashed=dashed)
        coloured = (np.asarray(image) == TARGET).all(-1)
        assert not coloured[15:45, 20:60].any() and coloured[13:47, 18:62].sum() == coloured.sum()
        counts[dashed] = coloured.sum()
    assert counts[False] == 34 * 44 - 30 * 40
    assert 0.4 * counts[False] < counts[True] < 0.9 * counts[False]


@pytest.mark.parametrize("box", [(-50, -50, -20, -20), (200, 200, 300, 300), (-9, -9, 90, 90), (30, 30, 30, 30)])
@pytest.mark.parametrize("dashed", [False, True])
def test_boxes_outside_the_image_stay_on_its_border(box: tuple[float, ...], dashed: bool) -> None:
    image = Image.new("RGB", (80, 60))
    draw_box(ImageDraw.Draw(image), box, image.size, thickness=3, dashed=dashed)
    assert (np.asarray(image) == TARGET).all(-1).any()


def test_letters_that_the_font_lacks_come_from_an_installed_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Accents:
        def getmask(self, text: str) -> Image.core.ImagingCore:
            return Image.new("L", (1 if ord(text) > 0x400 else ord(text), 1)).im

    def installed(name: str, size: int) -> Accents:
        if name != "accents":
            raise OSError("cannot open resource")
        return Accents()

    monkeypatch.setattr(ImageFont, "truetype", installed)
    monkeypatch.setattr(fonts, "font_files", lambda: ("damaged", "accents"))
    for cached in (fonts.font_file, fonts.installed_font):
        cached.cache_clear()
    try:
        assert font_for("the red car", 20) is font(20)
        assert isinstance(font_for("el niño", 20), Accents)
        assert font_for("日本", 20) is font(20)  # none has these
        assert (missing_letters("el niño"), missing_letters("日本 car")) == ("", "日本")
        assert [drawable(text, "query 2") for text in ("niño", "日本の車", "car 日")] == ["niño", "query 2", "car ?"]
    finally:
        for cached in (fonts.font_file, fonts.installed_font):
            cached.cache_clear()


def test_text_is_cut_to_its_room() -> None:
    small = font(14)
    assert fit_text("the \n red\tcar", small, 500) == "the red car"
    cut = fit_text("word " * 2000, small, 120)
    assert cut.endswith("…") and 90 < small.getlength(cut) <= 120


@pytest.mark.parametrize("duration_s", [0.04, 0.3, 2, 9, 61, 3600, 90000])
def test_ticks_are_few_and_not_none(duration_s: float) -> None:
    assert 0 < duration_s / tick_step(duration_s, room=14) <= 14


def test_the_box_that_a_track_repeats_has_no_score() -> None:
    tracked = dataclasses.replace(found(TIMES), task="track", span=(0.0, 0.5))
    assert [marks_at([tracked], time)[0].score for time in (0.45, 0.9)] == [pytest.approx(0.9), None]
