"""Sources: files, in real time or not; addresses and cameras that are missing, silent or broken."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.live.source import StreamClock, open_live
from bridge_stg.runtime.video.open import open_source
from tests.errors import raises
from tests.fakes.clips import GOP, SPEC, pictures, write
from tests.fakes.live_chain import live_grounder
from tests.fakes.rtsp_camera import camera

SILENT = ("live.stalled", "live.connection_lost")  # whichever of the watch and FFmpeg notices first


def test_a_file_gives_its_frames_and_times(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", pictures(40))
    source = open_live(path)
    frames = [(time_s, picture()) for time_s, picture in source.frames(threading.Event())]
    with open_source(path, SPEC) as video:
        np.testing.assert_allclose([time_s for time_s, _ in frames], video.frame_times, atol=1e-9)
    assert frames[0][1].shape == (48, 64, 3) and not source.keeps_pace


def test_a_file_at_its_own_pace(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", pictures(11))
    source, stop = open_live(path, realtime=True), threading.Event()
    began = time.monotonic()
    arrived = [(time_s, time.monotonic() - began) for time_s, _ in source.frames(stop)]
    assert source.keeps_pace and all(at >= time_s - 1e-3 for time_s, at in arrived)
    stop.set()
    assert len(list(open_live(path, realtime=True).frames(stop))) <= 1


def test_unsupported_sources_fail_before_they_are_opened(tmp_path: Path) -> None:
    for source, code, value in (
        ("nothing.mp4", "video.not_found", "nothing.mp4"),
        ("ftp://host/a.mp4", "live.bad_source", "ftp://"),
        (np.zeros((4, 4, 3), np.uint8), "live.bad_source", "ndarray"),
        (3.5, "live.bad_source", "float"),
        (True, "live.bad_source", "bool"),
    ):
        with raises(code, value):
            open_live(source)  # type: ignore[arg-type]


def first(source: object, **options: float) -> object:
    return next(open_live(source, **options).frames(threading.Event()))  # type: ignore[arg-type]


def test_a_missing_camera() -> None:
    for source in (97, "97", "/dev/video97"):
        with raises("live.no_camera", "/dev/video97"):
            first(source)


def test_errors_of_unreachable_addresses_hide_the_password() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with raises("live.not_reachable", f"127.0.0.1:{port}/stream") as caught:
        first(f"rtsp://me:secret@127.0.0.1:{port}/stream", timeout_s=2.0)
    assert "secret" not in str(caught.value)


@contextmanager
def serving(body: bytes, *, hang: bool, length: int | None = None) -> Iterator[str]:
    """Serve one video over HTTP, once per connection; then close it, or stop sending."""
    listener, done = socket.create_server(("127.0.0.1", 0)), threading.Event()
    listener.settimeout(0.1)

    def serve() -> None:
        while not done.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                connection.recv(65536)
                size = f"Content-Length: {length}\r\n" if length else ""
                head = f"HTTP/1.1 200 OK\r\nContent-Type: video/mp2t\r\n{size}Connection: close\r\n\r\n"
                connection.sendall(head.encode() + body)
                if hang:
                    done.wait(20)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/clip.ts"
    finally:
        done.set()
        thread.join(5)
        listener.close()


def test_a_stream_over_the_network(tmp_path: Path) -> None:
    body = write(tmp_path / "clip.ts", pictures(60)).read_bytes()
    with serving(body, hang=False, length=len(body)) as address:
        frames = [(time_s, picture().shape) for time_s, picture in open_live(address).frames(threading.Event())]
        assert len(frames) == 60 and {shape for _, shape in frames} == {(48, 64, 3)}
        np.testing.assert_allclose([time_s for time_s, _ in frames], np.arange(60) / 25, atol=1e-3)
        with live_grounder().watch(address, ["the car"], window_s=4, latest_wins=False) as watch:
            assert [update.known_s for update in watch] == [1, 2] and watch.stats.ended == "source"


def test_a_camera_over_rtsp(tmp_path: Path) -> None:
    body = write(tmp_path / "clip.ts", pictures(200), options={"x264-params": GOP}).read_bytes()
    with camera(body) as address:
        with live_grounder().watch(address, ["the car"], window_s=4) as watch:
            updates = list(watch)
    stats = watch.stats
    assert stats.ended == "source" and 190 < stats.frames <= 200  # 8 s; the stream's end cuts the last frames off
    assert stats.groups + stats.dropped_groups == 8 == updates[-1].known_s


def test_a_camera_over_rtsp_that_falls_silent(tmp_path: Path) -> None:
    body = write(tmp_path / "clip.ts", pictures(200), options={"x264-params": GOP}).read_bytes()
    with camera(body, hang=True) as address:
        with live_grounder().watch(address, ["the car"], window_s=4, stall_s=1.0) as watch:
            with pytest.raises(VideoError) as caught:
                list(watch)
    assert caught.value.code in SILENT and "1 s" in str(caught.value) and watch.stats.groups > 1


def test_a_stream_that_breaks_off(tmp_path: Path) -> None:
    body = write(tmp_path / "clip.ts", pictures(60)).read_bytes()
    with serving(body, hang=False, length=2 * len(body)) as address:
        with live_grounder().watch(address, ["the car"], window_s=4, latest_wins=False) as watch:
            with raises("live.connection_lost", "clip.ts"):
                list(watch)
    assert watch.stats.answers == 2


def test_a_stream_that_falls_silent(tmp_path: Path) -> None:
    body = write(tmp_path / "clip.ts", pictures(300)).read_bytes()
    with serving(body[: len(body) // 188 // 2 * 188], hang=True) as address:
        with live_grounder().watch(address, ["the car"], window_s=4, latest_wins=False, stall_s=1.0) as watch:
            with pytest.raises(VideoError) as caught:
                list(watch)
        assert caught.value.code in SILENT and "1 s" in str(caught.value)
        assert watch.stats.answers > 1 and watch.stats.ended == "error"


def test_clocks() -> None:
    def times(*stamps: int | None) -> list[float]:
        clock = StreamClock(0.01)
        return [round(clock.add(stamp), 3) for stamp in stamps]

    assert times(500, 510, 540) == [0, 0.1, 0.4]
    for stamps in ((None, None, None), (500, 510, 3), (500, 500, None)):  # missing, or set back: local time
        assert 0 < times(*stamps)[1] < times(*stamps)[2] < 1
    forward = times(500, 510, 999_999, 1_000_009)  # the clock was set forward
    assert forward[1] == 0.1 and 0.1 < forward[2] < 1 and forward[3] == pytest.approx(forward[2] + 0.1, abs=1e-3)
