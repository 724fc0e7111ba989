"""Video files: the frames are those of a plain decode of the whole file, for any container."""

from __future__ import annotations

from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from bridge_stg.runtime.bundle.spec import FramesSpec, ModelSpec
from bridge_stg.runtime.errors import Interrupted
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.video import file as video
from bridge_stg.runtime.video.decoder import Decoder
from bridge_stg.runtime.video.file import VideoFile
from bridge_stg.runtime.video.open import open_source
from tests.errors import raises
from tests.fakes.clips import GOP, LANGUAGE, SPEC, VISION, Counter, decoded, expect_fine, pictures, scaled, write

FILES: dict[str, tuple[str, dict]] = {
    "long GOP, B-frames": ("mp4", {"options": {"x264-params": "keyint=200:scenecut=0:bframes=3"}}),
    "closed GOP": ("mp4", {"options": {"x264-params": GOP}}),
    "open GOP": ("mp4", {"options": {"x264-params": GOP + ":open-gop=1"}}),
    "open GOP, transport stream": ("ts", {"options": {"x264-params": GOP + ":open-gop=1"}}),
    "intra refresh": ("mkv", {"options": {"x264-params": "keyint=20:intra-refresh=1"}}),
    "program stream": ("mpg", {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}}),
    "avi, B-frames": ("avi", {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}}),
    "elementary stream without times": ("h264", {"options": {"x264-params": GOP}}),
    "HEVC": ("mp4", {"codec": "libx265", "options": {"x265-params": GOP + ":open-gop=1:log-level=none"}}),
    "VP9": ("webm", {"codec": "libvpx-vp9", "options": {"g": "20", "deadline": "realtime", "cpu-used": "8"}}),
    "lossless, all key frames": ("mkv", {"codec": "ffv1"}),
    "variable rate": ("mp4", {"options": {"x264-params": GOP}, "rate": 30, "time_base": Fraction(1, 600)}),
    "variable rate, mkv": ("mkv", {"options": {"x264-params": GOP}, "rate": 30, "time_base": Fraction(1, 1000)}),
    "negative first time": ("mkv", {"options": {"x264-params": GOP}, "time_base": Fraction(1, 25)}),
}


READ_FROM_THE_START = (
    "avi, B-frames",
    "long GOP, B-frames",
    "intra refresh",
    "elementary stream without times",
)  # one key, or no times


@pytest.mark.parametrize("kind", FILES)
def test_fine_frames_are_those_of_a_sequential_decode(kind: str, tmp_path: Path) -> None:
    extension, options = FILES[kind]
    count, options = 90, dict(options)
    if kind.startswith("variable"):
        gaps = np.random.default_rng(1).choice([10, 20, 40, 170], count)
        options["ticks"] = [int(tick) for tick in np.cumsum(gaps) - gaps[0]]
    if kind.startswith("negative"):
        options["ticks"] = list(range(-7, count - 7))
    path = write(tmp_path / f"clip.{extension}", pictures(count), **options)
    reference, times = decoded(path)
    if len(times) < len(reference):
        times = np.arange(len(reference)) / 25
    rng = np.random.default_rng(2)
    with open_source(path, SPEC) as source:
        picked = rng.permutation(len(reference))[:25]
        expect_fine(source, times[picked], reference, times)  # before coarse()
        np.testing.assert_allclose(source.frame_times, times, atol=1e-9)
        shown = np.searchsorted(times, source.fine_grid() + 4e-4, side="right") - 1
        assert isinstance(source, VideoFile) and set(shown) == set(source.kept.frames)
        expect_fine(source, source.fine_grid(), reference, times)
        source.kept.clear()
        expect_fine(source, source.fine_grid(), reference, times)  # decoded again
        expect_fine(source, times[[70, 3]], reference, times)
        assert source.seekable is (kind not in READ_FROM_THE_START)
        coarse = source.coarse()
        shown = [max(np.flatnonzero(times <= time + 4e-4)) for time in coarse.times.reshape(-1)]
        expected = np.stack([scaled(reference[index], coarse.frames.shape[2:4]) for index in shown])
        np.testing.assert_array_equal(coarse.frames.reshape(expected.shape), expected)
        facts = source.facts
    with VideoFile(str(path), SPEC, known=(facts, coarse)) as again:  # what one pass found out, without another pass
        assert again.coarse() is coarse and again.clock == source.clock
        expect_fine(again, times[picked], reference, times)
        np.testing.assert_array_equal(again.fine_grid(), source.fine_grid())


def test_coarse_reads_every_frame_once_and_samples_evenly(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", pictures(60))
    check, reports = Counter(), []
    with open_source(path, SPEC) as source:
        coarse = source.coarse(Limits(cancel=check, progress=lambda _, done, total: reports.append((done, total))))
        assert source.coarse() is coarse
    assert check.count == 60
    assert [done for done, _ in reports] == pytest.approx(np.arange(60) / 25)
    assert [total for _, total in reports] == pytest.approx([2.4] * 60)
    assert (source.width, source.height, source.duration_s) == (64, 48, pytest.approx(2.4))
    assert not source.is_image
    np.testing.assert_array_equal(coarse.times, [[0, 0.5], [1, 1.5], [2, 2]])
    assert coarse.frames.shape == (3, 2, 16, 32, 3)
    assert (coarse.interval_s, coarse.duration_s) == (0.5, pytest.approx(2.4))
    np.testing.assert_array_equal(coarse.group_times, [0.25, 1.25, 2])
    np.testing.assert_array_equal(coarse.frames[2, 0], coarse.frames[2, 1])
    np.testing.assert_allclose(source.fine_grid(), np.arange(12) / 5)


def test_long_videos_are_sampled_more_sparsely(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mkv", pictures(100), rate=5)  # 20 s: 40 samples, 8 groups of 2 may be kept
    with open_source(path, SPEC) as source:
        coarse = source.coarse()
    assert coarse.interval_s == 2
    np.testing.assert_array_equal(coarse.times.reshape(-1), np.arange(10) * 2)
    reference, _ = decoded(path)
    np.testing.assert_array_equal(coarse.frames[1, 1], scaled(reference[30], (16, 32)))


def test_fine_decodes_only_around_the_requested_times(tmp_path: Path) -> None:
    for name in ("clip.mp4", "clip.ts"):
        path = write(tmp_path / name, pictures(240), options={"x264-params": GOP})
        check = Counter()
        with open_source(path, SPEC) as source:
            source.coarse()
            source.fine([8.0, 8.2], Limits(cancel=check))
            assert 0 < check.count < 60, name
            check.count = 0
            source.fine([0.2, 8.0], Limits(cancel=check))
            assert 0 < check.count < 80, name
            check.count = 0
            source.fine(np.arange(8.0, 8.4, 0.04), Limits(cancel=check))
            assert 0 < check.count < 60, name


def test_late_seeks_fall_back_to_reading_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clip.mp4", pictures(90), options={"x264-params": GOP})
    reference, times = decoded(path)
    seek = Decoder.frames_from
    monkeypatch.setattr(Decoder, "frames_from", lambda self, pts: seek(self, pts + 45 * 512))
    with open_source(path, SPEC) as source:
        expect_fine(source, times[[30, 62, 85]], reference, times)


def test_frames_before_the_first_key_frame_after_a_seek_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "clip.mp4", pictures(90), options={"x264-params": GOP})
    reference, times = decoded(path)
    damaged = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 99, np.uint8), format="rgb24").reformat(format="yuv420p")
    damaged.pts = 62 * 512
    seek = Decoder.frames_from
    monkeypatch.setattr(Decoder, "frames_from", lambda self, pts: chain([damaged], seek(self, pts)))
    with open_source(path, SPEC) as source:
        expect_fine(source, times[[62]], reference, times)
        assert isinstance(source, VideoFile) and source.seekable


def test_seeks_to_other_pixels_fall_back_to_reading_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "clip.mp4", pictures(90), options={"x264-params": GOP})
    reference, times = decoded(path)
    inverted = [255 - picture for picture in pictures(90)]
    other, seek = Decoder(str(write(tmp_path / "b.mp4", inverted, options={"x264-params": GOP}))), Decoder.frames_from
    monkeypatch.setattr(Decoder, "frames_from", lambda self, pts: seek(other, pts))
    with open_source(path, SPEC) as source:
        source.coarse()
        assert isinstance(source, VideoFile) and source.seekable
        source.kept.clear()
        expect_fine(source, times[[50]], reference, times)
        assert not source.seekable
    other.close()


def test_a_file_that_has_become_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clip.mp4", pictures(90))
    with open_source(path, SPEC) as source:
        source.coarse()
        assert isinstance(source, VideoFile)
        source.kept.clear()
        frames = Decoder.frames
        monkeypatch.setattr(Decoder, "frames", lambda self: islice(frames(self), 20))
        with raises("video.changed", "clip.mp4", "3.000 s"):
            source.fine([3.0])


def test_one_frame_and_slow_videos(tmp_path: Path) -> None:
    with open_source(write(tmp_path / "one.mp4", pictures(1)), SPEC) as source:
        coarse = source.coarse()
        assert coarse.frames.shape[:2] == (1, 2) and not coarse.times.any()
        assert source.duration_s == pytest.approx(0.04)
        np.testing.assert_array_equal(source.fine_grid(), [0])
    with open_source(write(tmp_path / "slow.mp4", pictures(3), rate=1), SPEC) as source:
        np.testing.assert_array_equal(source.coarse().times.reshape(-1), np.arange(6) / 2)
        np.testing.assert_array_equal(source.fine([0.2, 0.9, 1.0, 2.5, 99, -1]).times, [0, 0, 1, 2, 2, 0])
        assert source.fine([]).frames.shape == (0, 48, 64, 3)
        with raises("video.bad_time", "nan"):
            source.fine([0.0, float("nan")])


def test_groups_never_print_as_the_same_time(tmp_path: Path) -> None:
    frames = FramesSpec(coarse_fps=16, coarse_max_pixels=1024, coarse_min_pixels=256, max_coarse_groups=64, fine_fps=4)
    path = write(tmp_path / "clip.mkv", pictures(9), codec="ffv1", pixels="bgr0", rate=32)
    with open_source(path, ModelSpec(VISION, LANGUAGE, frames)) as source:
        coarse = source.coarse()
    printed = [f"{time:.1f}" for time in coarse.group_times]
    assert len(set(printed)) == len(printed)
    assert coarse.interval_s == 0.125


def test_an_interrupted_pass_can_be_repeated(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", pictures(30))
    with open_source(path, SPEC) as source:
        with pytest.raises(Interrupted):
            source.coarse(Limits(cancel=Counter(stop_at=10)))
        assert len(source.frame_times) == 30
        with pytest.raises(Interrupted):
            source.fine(source.fine_grid(), Limits(cancel=Counter(stop_at=3)))
        assert len(source.fine(source.fine_grid()).times) == 6
    with raises("video.closed", "clip.mp4"):
        source.fine([0.0])


def test_frames_of_the_fine_grid_are_decoded_once_while_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "clip.mp4", pictures(90), options={"x264-params": GOP})
    opened: list[str] = []
    decoder = Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", lambda self, *given: (opened.append(given), decoder(self, *given))[1])
    seeks: list[int] = []
    seek = Decoder.frames_from
    monkeypatch.setattr(Decoder, "frames_from", lambda self, pts: (seeks.append(pts), seek(self, pts))[1])
    answers = []
    a_frame = 64 * 48 * 3 // 2
    for most in (2**26, 5 * a_frame):
        monkeypatch.setattr(video, "KEPT_BYTES", most)
        with open_source(path, SPEC) as source:
            answers.append(source.fine(source.fine_grid()).frames)
            assert isinstance(source, VideoFile)
            kept = sum(plane.buffer_size for frame in source.kept.frames.values() for plane in frame.planes)
        again = len(opened) + len(seeks) > 1
        assert (kept > 0, again) == ((True, False) if most == 2**26 else (False, True))
        assert source.kept.frames == {}
    np.testing.assert_array_equal(*answers)


def test_coarse_samples_do_not_depend_on_how_many_are_resized_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "clip.mp4", pictures(150, 120, 160), options={"x264-params": GOP})
    decoder = Decoder.__init__

    def without_duration(self: Decoder, *given: Any) -> None:
        decoder(self, *given)
        self.duration_s = None  # so that the samples' size shrinks while the file is read

    monkeypatch.setattr(Decoder, "__init__", without_duration)
    frames = FramesSpec(coarse_fps=25.0, max_coarse_groups=16, max_visual_tokens=150)
    for spec in (SPEC, ModelSpec(VISION, LANGUAGE, frames)):
        found = []
        for together in (1, 3, 16):
            monkeypatch.setattr(video, "RESIZED_TOGETHER", together)
            with open_source(path, spec) as source:
                found.append(source.coarse())
        for other in found[1:]:
            np.testing.assert_array_equal(other.frames, found[0].frames)
            np.testing.assert_array_equal(other.times, found[0].times)


def test_a_time_stamp_far_in_the_future_takes_no_time_to_count(tmp_path: Path) -> None:
    ticks = [0, 1000, 2000, 2 * 10**12]
    path = write(tmp_path / "a.mkv", pictures(4), rate=1, ticks=ticks, time_base=Fraction(1, 1000), options={"bf": "0"})
    with open_source(path, SPEC) as source, raises("video.too_long", "a.mkv"):
        assert source.frame_times.tolist() == [0, 1, 2, 2e9]
        source.coarse()
        source.fine_grid()
