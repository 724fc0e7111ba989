"""Any container, codec, pixel format, rotation and damage: readable frames are read, errors have codes."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from bridge_stg.runtime.live.source import open_live
from bridge_stg.runtime.video import decoder as container
from bridge_stg.runtime.video.file import VideoFile
from bridge_stg.runtime.video.open import open_source
from bridge_stg.runtime.video.playback import play
from bridge_stg.runtime.visualize.annotate import annotate
from tests.errors import raises
from tests.fakes.chain import fake_grounder
from tests.fakes.clips import GOP, SPEC, decoded, expect_fine, pictures, scaled, to_rgb, two_streams, write

MATRICES = {  # a, b, c, d of the display matrix, and what it does to a picture
    "0": ((1, 0, 0, 1), lambda p: p),
    "90 clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "180": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "270 clockwise": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_rotation_metadata(name: str, tmp_path: Path) -> None:
    (a, b, c, d), turn = MATRICES[name]
    path = write(tmp_path / "clip.mp4", pictures(10))
    reference, _ = decoded(path)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # ISO/IEC 14496-12, 8.3.2, version 0
    one = 1 << 16
    data[matrix : matrix + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    with open_source(path, SPEC) as source:
        expected = turn(reference[5])
        assert (source.height, source.width) == expected.shape[:2]
        samples = source.fine([0.2])
        np.testing.assert_array_equal(
            samples.frames[0], scaled(np.ascontiguousarray(expected), samples.frames.shape[1:3])
        )


COLOURS = np.array([[200, 40, 40], [40, 180, 60], [50, 60, 200], [220, 210, 60]], np.uint8)
PIXELS = {
    "yuv420p": "libx264", "yuv444p": "libx264", "yuv420p10le": "libx264", "yuv422p12le": "ffv1", "gray": "ffv1",
    "gray16le": "ffv1", "rgb24": "qtrle", "bgr0": "ffv1", "argb": "qtrle", "rgba": "png", "gbrp": "libx264rgb",
    "pal8": "png", "yuvj420p": "mjpeg", "yuva420p": "ffv1", "monob": "png", "rgb48be": "png",
}  # fmt: skip


@pytest.mark.parametrize("size", [(48, 64), (45, 63)])
@pytest.mark.parametrize("pixels", PIXELS)
def test_pixel_formats(pixels: str, size: tuple[int, int], tmp_path: Path) -> None:
    codec = PIXELS[pixels]
    if size[0] % 2 and codec.startswith("libx264") and "420" in pixels:
        codec = "ffv1"
    height, width = size
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :] = COLOURS[:2]
    picture[height // 2 :, : width // 2], picture[height // 2 :, width // 2 :] = COLOURS[2:]
    if pixels == "pal8":
        path = tmp_path / "clip.mov"
        write_palette_video(path, picture)
    else:
        pixels = "bgr0" if pixels == "gbrp" else pixels
        pixels = "rgb24" if codec == "libx264rgb" else pixels
        options = {"crf": "4"} if codec.startswith("libx264") else {}
        path = tmp_path / ("clip.mov" if codec in ("qtrle", "png") else "clip.mkv")
        write(path, [picture] * 3, codec=codec, pixels=pixels, options=options)
    with open_source(path, SPEC) as source:
        assert (source.height, source.width) == size
        frame = source.fine([0]).frames[0].astype(int)
    rows, columns = frame.shape[:2]
    middles = frame[[rows // 4, rows // 4, 3 * rows // 4, 3 * rows // 4], [columns // 4, 3 * columns // 4] * 2]
    if pixels == "monob":
        assert 60 < frame.mean() < 200
    elif pixels.startswith("gray"):
        assert np.abs(middles - (COLOURS @ [0.299, 0.587, 0.114])[:, None]).max() < 8
    else:
        assert np.abs(middles - COLOURS).max() < 14


def write_palette_video(path: Path, picture: np.ndarray) -> None:
    """PNG pictures with a palette, remuxed into a movie as they are."""
    image = Image.fromarray(picture).quantize(8)
    image.save(path.with_suffix(".png"))
    with av.open(str(path.with_suffix(".png"))) as pictures_in, av.open(str(path), "w") as file:
        packets = [packet for packet in pictures_in.demux() if packet.size]
        stream = file.add_stream_from_template(pictures_in.streams.video[0])
        packet = packets[0]
        packet.stream, packet.pts, packet.dts = stream, 0, 0
        file.mux(packet)


@pytest.mark.parametrize("size", [(1, 64), (33, 1), (2, 300), (201, 67)])
def test_small_and_narrow_sizes(size: tuple[int, int], tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mov", [np.full((*size, 3), 90, np.uint8)] * 3, codec="png", pixels="rgb24")
    with open_source(path, SPEC) as source:
        assert (source.height, source.width) == size
        assert (source.fine([0]).frames == 90).all()


def test_extreme_aspect_ratios_are_rejected(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mkv", [np.zeros((1, 402, 3), np.uint8)] * 3, codec="ffv1", pixels="bgr0")
    with raises("video.bad_shape", "clip.mkv", "402 × 1"):
        open_source(path, SPEC)


def test_a_cover_picture_is_not_the_video(tmp_path: Path) -> None:
    with_cover = write_with_cover(tmp_path / "clip.mp4", video=True)
    with open_source(with_cover, SPEC) as source:
        assert (source.width, source.height, len(source.frame_times)) == (64, 48, 12)
    with raises("video.no_stream", "found: audio, cover picture"):
        open_source(write_with_cover(tmp_path / "song.mp4", video=False), SPEC)


def write_with_cover(path: Path, *, video: bool) -> Path:
    with av.open(str(path), "w") as file:
        cover = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        sound = file.add_stream("aac", rate=8000, layout="mono")
        moving = file.add_stream("libx264", rate=25) if video else None
        if moving is not None:
            moving.width, moving.height, moving.pix_fmt = 64, 48, "yuv420p"
            for picture in pictures(12):
                file.mux(moving.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")))
            file.mux(moving.encode(None))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 8000
        file.mux(sound.encode(samples))
        file.mux(sound.encode(None))
        green = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 99, np.uint8), format="rgb24")
        file.mux(cover.encode(green.reformat(format="yuvj420p")))
        file.mux(cover.encode(None))
    return path


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        file.mux(stream.encode(samples))
        file.mux(stream.encode(None))
    return path


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda d: d / "none.mp4", "video.not_found"),
    "missing picture": (lambda d: d / "none.jpg", "video.not_found"),
    "below a file": (lambda d: write_audio(d / "a.wav") / "b.mp4", "video.unreadable"),
    "directory": (lambda d: d, "video.not_a_file"),
    "audio": (lambda d: write_audio(d / "a.wav"), "video.no_stream"),
    "text": (lambda d: text(d / "a.txt"), "video.no_stream"),
    "text called mp4": (lambda d: text(d / "a.mp4"), "video.unreadable"),
    "empty": (lambda d: text(d / "a.mp4", ""), "video.empty"),
    "no moov": (lambda d: cut(write(d / "a.mp4", pictures(30)), 0.6), "video.unreadable"),
    "header only": (
        lambda d: cut(write(d / "a.avi", pictures(3), codec="mjpeg", pixels="yuvj420p"), 0.2), "video.unreadable"
    ),
    "zero frames": (lambda d: no_frames(d / "a.mp4"), "video.no_stream"),
    "null in path": (lambda d: Path("a\0b"), "video.unreadable"),
}  # fmt: skip


def text(path: Path, content: str = "not a video\n" * 99) -> Path:
    path.write_text(content)
    return path


def no_frames(path: Path) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        file.start_encoding()
    return path


@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_cannot_be_read(kind: str, tmp_path: Path) -> None:
    make, code = BROKEN[kind]
    path = make(tmp_path)
    with raises(code, "" if "\0" in path.name else path.name):
        open_source(path, SPEC)


def test_no_path() -> None:
    with raises("video.not_found", "''"):
        open_source("", SPEC)


def test_files_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clip.mp4", pictures(3))

    def deny(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(container, "open", deny, raising=False)  # root can read a file of mode 000
    with raises("video.no_permission", "clip.mp4"):
        open_source(path, SPEC)


def test_playlists_open_no_connection(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        with raises("video.playlist", "a.m3u8"):
            open_source(text(tmp_path / "a.m3u8", f"#EXTM3U\n#EXTINF:1,\n{address}\n"), SPEC)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\n{clip}\n#EXT-X-ENDLIST\n"),
        ("a", "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\n{clip}\n#EXT-X-ENDLIST\n"),
        ("a.ffconcat", "ffconcat version 1.0\nfile '{clip}'\n"),
        ("a.sdp", "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"),
        ("a.mpd", '<?xml version="1.0"?>\n<MPD><Period><BaseURL>{clip}</BaseURL></Period></MPD>\n'),
        ("a%d.dpx", "SDPX"),
    ],
)
def test_files_that_name_other_files_are_refused(name: str, content: str, tmp_path: Path) -> None:
    write(tmp_path / "clip.ts", pictures(60))
    path = text(tmp_path / name, content.format(clip="clip.ts"))
    with raises("video.playlist", name):
        open_source(path, SPEC)
    with raises("video.playlist", name), play(path):
        pass
    with raises("video.playlist", name):
        next(open_live(path).frames(threading.Event()))


@pytest.mark.parametrize(
    ("name", "default", "best"), [("a.mkv", 0, 0), ("a.mkv", 1, 1), ("a.mp4", 0, 0), ("a.mp4", 1, 1), ("a.ts", None, 1)]
)
def test_the_best_of_several_video_streams(name: str, default: int | None, best: int, tmp_path: Path) -> None:
    path = two_streams(tmp_path / name, default=default)
    with av.open(str(path)) as file:
        assert file.streams.best("video") is file.streams[best]
    for stream, chosen in ((None, best), (0, 0), (1, 1)):
        with open_source(path, SPEC, stream=stream) as source, play(path, stream) as playback:
            assert source.stream == chosen
            assert (source.width, len(source.frame_times)) == ((96, 18) if chosen else (64, 12))
            assert next(playback.frames)[1].shape[1] == source.width
            source.fine(source.frame_times[::3])


def test_a_stream_that_does_not_exist(tmp_path: Path) -> None:
    path = two_streams(tmp_path / "a.mkv")
    with raises("video.bad_stream", "a.mkv", "stream 7", "0 (h264, 64 × 48)", "1 (h264, 96 × 64)"):
        open_source(path, SPEC, stream=7)
    with raises("video.bad_stream", "stream 0"):
        open_source(pictures(1)[0], SPEC, stream=0)
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    with raises("video.bad_stream", "a.png", "stream 0"):
        open_source(tmp_path / "a.png", SPEC, stream=0)
    with raises("video.bad_stream", "stream 0"):  # a cover picture
        open_source(write_with_cover(tmp_path / "clip.mp4", video=True), SPEC, stream=0)


def test_the_stream_is_named_in_the_result_and_drawn(tmp_path: Path) -> None:
    path, grounder = two_streams(tmp_path / "a.mkv", default=0), fake_grounder()
    for stream, size in ((None, (64, 48)), (1, (96, 64))):
        result = grounder.ground(path, "the car", stream=stream)
        assert (result.stream, result.size) == (stream or 0, size)
        assert result.to_json()["stream"] == (stream or 0)
        with av.open(str(annotate(path, result, tmp_path / "b.mp4"))) as drawn:
            assert (drawn.streams.video[0].width, drawn.streams.video[0].height) == size
    assert grounder.ground(write(tmp_path / "b.mkv", pictures(9)), "the car").stream is None


def test_pipes_are_rejected_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with raises("video.not_a_file", "pipe"):
        open_source(tmp_path / "pipe", SPEC)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip.mp4", {"container_options": {"movflags": "faststart"}, "options": {"x264-params": GOP}}),
        ("clip.mkv", {"options": {"x264-params": GOP}}),
        ("clip.ts", {"options": {"x264-params": GOP}}),
        ("clip.avi", {"codec": "mpeg4"}),
    ],
)
def test_truncated_files_give_the_frames_that_decode(name: str, options: dict, tmp_path: Path) -> None:
    path = cut(write(tmp_path / name, pictures(120), **options), 0.6)
    with open_source(path, SPEC) as source:
        assert 20 < len(source.frame_times) < 115
        assert source.duration_s == pytest.approx(source.frame_times[-1] + 0.04, abs=2e-3)
        fine = source.fine(source.fine_grid())
        assert fine.frames.std() > 20
        assert len(source.coarse().frames)


def test_damage_in_the_middle_is_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.avi", pictures(60), codec="png", pixels="rgb24")
    data = bytearray(path.read_bytes())
    middle = data.index(b"\x89PNG", len(data) // 2)
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)
    with open_source(path, SPEC) as source:
        reference, times = decoded_past_errors(path)
        np.testing.assert_allclose(source.frame_times, times)
        assert 50 < len(times) < 60
        assert isinstance(source, VideoFile) and not source.seekable
        expect_fine(source, times[[5, 40]], reference, times)


def decoded_past_errors(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    frames = []
    with av.open(str(path)) as file:
        for packet in file.demux(video=0):
            with contextlib.suppress(av.FFmpegError):
                frames += [(to_rgb(f), f.time) for f in packet.decode()]
    return [picture for picture, _ in frames], np.array([time for _, time in frames])


class Stamp:
    """A frame as `Timeline` sees it."""

    def __init__(self, pts: int | None) -> None:
        self.pts, self.duration = pts, None


@pytest.mark.parametrize(
    ("stamps", "times", "regular"),
    [
        ([5, 6, 8], [0, 0.1, 0.3], True),
        ([-3, -2, -1], [0, 0.1, 0.2], True),
        ([None, None, None], [0, 0.1, 0.2], False),
        ([0, None, 2, None], [0, 0.1, 0.2, 0.3], False),
        ([None, 7, 8], [0, 0.1, 0.2], False),
        ([0, 1, 1, 2], [0, 0.1, 0.102, 0.2], False),  # a wrong stamp, corrected by the next frame
        ([50, 51, 0, 1], [0, 0.1, 0.2, 0.3], False),  # two joined recordings: the clock restarts
    ],
)
def test_times_increase_for_any_time_stamps(stamps: list[int | None], times: list[float], regular: bool) -> None:
    timeline = container.Timeline(Fraction(1, 10), Fraction(1, 10))
    assert [timeline.add(Stamp(stamp)) for stamp in stamps] == pytest.approx(times)
    assert timeline.regular is regular
    assert timeline.end_s == pytest.approx(times[-1] + 0.1)


def test_joined_transport_streams(tmp_path: Path) -> None:
    first = write(tmp_path / "a.ts", pictures(60), options={"x264-params": GOP})
    joined = tmp_path / "b.ts"
    joined.write_bytes(first.read_bytes() * 2)
    with open_source(joined, SPEC) as source:
        assert len(source.frame_times) >= 118
        assert (np.diff(source.frame_times) > 0).all()
        assert source.duration_s == pytest.approx(4.8, abs=0.2)
        grid = source.fine_grid()
        assert source.fine(grid).frames.shape[0] == len(grid)


def test_names_that_look_like_protocols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.rename(write(tmp_path / "clip.mp4", pictures(3)), "http:clip %d é.mp4")
    with open_source("http:clip %d é.mp4", SPEC) as source:
        assert len(source.frame_times) == 3
