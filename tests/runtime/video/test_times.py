"""Times of frames: from time stamps, the order of decoding or the codec's rate, the same for every reader of a file."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from bridge_stg.runtime import Grounder
from bridge_stg.runtime.chain.boxes import box_iou
from bridge_stg.runtime.live.source import open_live
from bridge_stg.runtime.video.file import VideoFile
from bridge_stg.runtime.video.open import open_source
from bridge_stg.runtime.video.playback import play
from bridge_stg.runtime.visualize.annotate import annotate
from tests.fakes.chain import fake_grounder
from tests.fakes.clips import GOP, SPEC, decoded, expect_fine, pictures, write

COUNT, RATE = 60, 8
SHIFTS = np.cumsum(np.random.default_rng(1).choice([1, 1, 1, 2, 5], COUNT))
TICKS = [int(tick - SHIFTS[0]) for tick in SHIFTS]


def coded(name: str, codec: str = "libx264", **options: str) -> Callable[[Path], Path]:
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    options = {"x264-params": GOP} if codec == "libx264" and not options else options
    rate = 25 if codec == "mpeg2video" else RATE
    return lambda folder: write(folder / name, pictures(COUNT), codec=codec, pixels=pixels, rate=rate, options=options)


def uneven(folder: Path) -> Path:
    return write(folder / "uneven.avi", pictures(COUNT), rate=RATE, ticks=TICKS, options={"bf": "0"})


def copied(name: str, *, shift: int = 0) -> Callable[[Path], Path]:
    """Copy the packets of an AVI file, whose presentation times are those of the coded order, or shift them."""

    def make(folder: Path) -> Path:
        source, target = coded("a.mp4" if shift else "a.avi")(folder), folder / name
        with av.open(str(source)) as old, av.open(str(target), "w") as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.dts is not None and packet.pts is not None:
                    step = round(1 / RATE / packet.time_base) if packet.time_base else 0
                    packet.pts, packet.dts, packet.stream = packet.pts - shift * step, packet.dts - shift * step, stream
                    new.mux(packet)
        return target

    return make


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "AVI": (coded("a.avi"), "frame_rate"),  # the last frames come out of the decoder without a time stamp
    "AVI, open GOP": (coded("a.avi", **{"x264-params": GOP + ":open-gop=1"}), "frame_rate"),
    "AVI without B-frames": (uneven, "timestamps"),
    "AVI, MPEG-4": (coded("a.avi", "mpeg4", bf="2", g="12"), "frame_rate"),
    "AVI, Motion-JPEG": (coded("a.avi", "mjpeg"), "timestamps"),
    "copied to MKV": (copied("b.mkv"), "frame_rate"),
    "copied to MP4": (copied("b.mp4"), "frame_rate"),
    "edit list": (copied("b.mp4", shift=7), "timestamps"),
    "ASF": (coded("a.asf"), "frame_rate"),
    "H.264": (coded("a.h264"), "frame_rate"),
    "HEVC": (coded("a.hevc", "libx265", **{"x265-params": "log-level=none"}), "frame_rate"),
    "MPEG-2": (coded("a.m2v", "mpeg2video", bf="2", g="12"), "frame_rate"),
    "Motion-JPEG": (coded("a.mjpeg", "mjpeg"), "guessed"),
    "program stream": (coded("a.mpg"), "frame_rate"),  # time stamps of some frames only
    "VOB": (coded("a.vob", "mpeg2video", bf="2", g="12"), "timestamps"),
}


@pytest.mark.parametrize("kind", FILES)
def test_times_are_those_of_the_recording(kind: str, tmp_path: Path) -> None:
    make, clock = FILES[kind]
    path = make(tmp_path)
    reference, _ = decoded(path)
    rate = 25 if kind in ("MPEG-2", "VOB", "Motion-JPEG") else RATE
    times = np.asarray(TICKS) / rate if make is uneven else np.arange(len(reference)) / rate
    with open_source(path, SPEC) as source:
        np.testing.assert_allclose(source.frame_times, times, atol=1e-3)
        assert source.clock == clock
        assert source.duration_s == pytest.approx(times[-1] + 1 / rate, abs=2e-3)
        assert isinstance(source, VideoFile)
        source.kept.clear()
        expect_fine(source, times[[3, 50, 20, 31]] + 2e-3, reference, source.frame_times)  # sought, or read again
        with play(path) as playback:
            np.testing.assert_allclose([time for time, _ in playback.pictures], source.frame_times)
        with contextlib.closing(open_live(path).frames(threading.Event())) as frames:  # type: ignore[type-var]
            np.testing.assert_allclose([time for time, _ in frames], source.frame_times)


def test_a_guessed_clock_is_named_in_the_result(tmp_path: Path) -> None:
    grounder = fake_grounder()
    for kind in ("Motion-JPEG", "H.264", "AVI, Motion-JPEG"):
        make, clock = FILES[kind]
        result = grounder.ground(make(tmp_path), "the car")
        assert result.clock == result.to_json()["clock"] == clock


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_delays_of_animations(name: str, tmp_path: Path) -> None:
    images = [Image.fromarray(picture) for picture in pictures(6)]
    delays = [100, 300, 50, 100, 200, 3000]
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=delays)
    ends = np.cumsum(delays) / 1000
    with open_source(tmp_path / name, SPEC) as source:
        np.testing.assert_allclose(source.frame_times, [0, *ends[:-1]])
        assert source.duration_s == pytest.approx(ends[-1])
    result = fake_grounder().ground(tmp_path / name, "the car")
    with av.open(str(annotate(tmp_path / name, result, tmp_path / "copy.mp4"))) as file:
        frames = list(file.decode(video=0))
        np.testing.assert_allclose([frame.time for frame in frames], [0, *ends[:-1]], atol=1e-4)
        assert file.duration is not None and file.duration / av.time_base == pytest.approx(ends[-1], abs=1e-3)


def test_a_photo_with_a_preview_after_it_is_one_picture(tmp_path: Path) -> None:
    photo, preview = io.BytesIO(), io.BytesIO()
    Image.fromarray(pictures(1)[0]).save(photo, "JPEG", exif=Image.Exif().tobytes() or b"Exif\0\0")
    Image.fromarray(pictures(2)[1]).resize((32, 24)).save(preview, "JPEG")
    (tmp_path / "a.jpg").write_bytes(photo.getvalue() + preview.getvalue())
    with open_source(tmp_path / "a.jpg", SPEC) as source:
        assert source.is_image


@pytest.mark.slow
def test_copies_of_a_demo_clip_answer_like_the_original(demo_bundle: Path, tmp_path: Path) -> None:
    original = Path(__file__).parents[3] / "assets" / "demo" / "clips" / "2-moving.mp4"
    frames, _ = decoded(original)
    with Grounder.load(demo_bundle) as grounder:
        expected = grounder.ground(original, "the white dog")
        assert expected.boxes is not None and len(expected.boxes) == 35
        for name, codec in (("b.avi", "libx264"), ("a.h264", "libx264"), ("a.hevc", "libx265"), ("a.mpg", "libx264")):
            options = {"x265-params": "crf=10:log-level=none"} if codec == "libx265" else {"crf": "10", "bf": "3"}
            copy = write(tmp_path / name, frames, codec=codec, rate=RATE, options=options)
            result = grounder.ground(copy, "the white dog")
            assert result.boxes is not None and (result.span, len(result.boxes)) == (expected.span, 35), name
            assert box_iou(result.boxes.boxes, expected.boxes.boxes).mean() >= 0.97, name
