"""Hostile and damaged uploads: each is rejected within limits, in one paragraph, and leaves nothing."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from bridge_stg.runtime.host.memory import peak_bytes, reset_peak
from tests.bridge_stg.server.conftest import Running, ask, ended, http_error, small_clip, until, upload
from tests.fakes.clips import gif_with_a_huge_frame, pictures, write

MOST_S, MOST_PIXELS = 30.0, 512 * 512
DAMAGED = "video."  # the runtime has several codes for damaged files
WORD = b"a secret word of this machine"


@pytest.fixture(scope="module")
def server() -> object:
    from tests.fakes.chain import fake_grounder

    running = Running(fake_grounder(), max_duration_s=MOST_S, max_pixels=MOST_PIXELS, max_upload_bytes=4 * 2**20)
    yield running
    running.stop()


def sent(server: Running, content: bytes, name: str = "a.mp4") -> tuple[int, str]:
    """Upload bytes, and return status and code of the error; no file remains."""
    with server.client() as client:
        answer = client.post("/v1/videos", files={"file": (name, content)})
        if answer.status_code == 201:
            client.delete(f"/v1/videos/{answer.json()['id']}")
        assert answer.status_code != 201, answer.text
        received = http_error(answer)
    assert WORD.decode() not in answer.text
    assert not list(server.service.store.folder.iterdir()) and server.service.store.stored_bytes == 0
    return received


def mp4(tmp_path: Path, **options: object) -> bytes:
    return small_clip(tmp_path / "whole.mp4", **options).read_bytes()  # type: ignore[arg-type]


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is so large, with a little data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def stated_size(content: bytes, width: int, height: int, *, kind: bytes = b"avc1") -> bytes:
    """An MP4 whose sample description says another size."""
    place = content.index(kind, content.index(b"stsd")) + 4 + 24
    return content[:place] + struct.pack(">HH", width, height) + content[place + 4 :]


def sample_table(samples: int) -> bytes:
    """A short MP4 whose sample table says that it has so many samples of one byte."""

    def box(kind: bytes, *parts: bytes) -> bytes:
        return struct.pack(">I", 8 + sum(map(len, parts))) + kind + b"".join(parts)

    def full(kind: bytes, *numbers: int, data: bytes = b"") -> bytes:
        return box(kind, struct.pack(f">{1 + len(numbers)}I", 0, *numbers), data)

    matrix = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    sizes = struct.pack(">HHIIIH", 16, 16, 0x480000, 0x480000, 0, 1)
    entry = box(b"avc1", bytes(7), b"\1", bytes(16), sizes, bytes(32), struct.pack(">Hh", 24, -1))
    table = box(
        b"stbl", full(b"stsd", 1, data=entry), full(b"stts", 1, samples, 1), full(b"stsc", 1, 1, samples, 1),
        full(b"stsz", 1, samples), full(b"stco", 1, 40),
    )  # fmt: skip
    reference = box(b"dinf", full(b"dref", 1, data=full(b"url ")))
    information = box(b"minf", full(b"vmhd", 0, 0), reference, table)
    handler = full(b"hdlr", 0, data=b"vide" + bytes(12) + b"v\0")
    media = box(b"mdia", full(b"mdhd", 0, 0, 1000, 1000, 0x55C40000), handler, information)
    header = full(b"tkhd", 0, 0, 1, 0, 1000, data=bytes(16) + matrix + struct.pack(">II", 16 << 16, 16 << 16))
    movie = full(b"mvhd", 0, 0, 1000, 1000, 0x10000, 0x1000000, 0, 0, data=matrix + bytes(24) + b"\0\0\0\2")
    return (
        box(b"ftyp", b"isom\0\0\2\0isomavc1")
        + box(b"mdat", bytes(64))
        + box(b"moov", movie, box(b"trak", header, media))
    )


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.mp4", bytes(10_000_000))
    return file.getvalue()


@pytest.mark.parametrize("name", ["a.mp4", "a.png", "a.m3u8", "a"])
@pytest.mark.parametrize(
    "content",
    [
        zipped(),
        b"<!doctype html><html><script>alert(1)</script></html>",
        b"\x7fELF" + bytes(100),
        b"%PDF-1.7" + bytes(100),
        b"plain text\n" * 100,
        zlib.compress(bytes(1000)),
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"P6 300 300 255\n",
        b"RIFF\x00\x00\x00\x00WAVEfmt " + bytes(100),
        bytes(1000),
    ],
    ids=["zip", "html", "elf", "pdf", "text", "zlib", "svg", "ppm", "wav", "zeros"],
)
def test_other_files_are_rejected_whatever_their_name(content: bytes, name: str, server: Running) -> None:
    assert sent(server, content, name) == (415, "video.unsupported_format")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("ffconcat version 1.0\nfile {secret}\nduration 1\n", "concat"),
        ("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n", "hls"),
        ("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n", "hls by http"),
        ('<?xml version="1.0"?><MPD type="static" xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet>'
         '<Representation><BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>', "dash"),
        ("v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n", "sdp"),
        ("RTSPtext\nrtsp://127.0.0.1/{secret}\n", "rtsp"),
    ],
)  # fmt: skip
def test_a_playlist_reads_no_file_and_opens_no_address(text: str, kind: str, server: Running, tmp_path: Path) -> None:
    secret = small_clip(tmp_path / "secret.mp4")
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with HTTPServer(("127.0.0.1", 0), Handler) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        content = text.format(secret=secret, url=f"http://127.0.0.1:{elsewhere.server_port}/a.mp4").encode()
        for name in ("a.mp4", "a.m3u8", "a.mpd", "a.ffconcat", "a.sdp"):
            assert sent(server, content, name) == (415, "video.unsupported_format")
        elsewhere.shutdown()
    assert not asked


def test_a_playlist_after_the_first_bytes_of_a_video_is_rejected(server: Running, tmp_path: Path) -> None:
    secret = small_clip(tmp_path / "secret.mp4")
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n".encode()
    for head in (b"\x00\x00\x00\x18ftypisom" + bytes(12), b"\x1a\x45\xdf\xa3", b"RIFF\x00\x00\x00\x00AVI "):
        assert sent(server, head + hls) in ((422, "video.damaged"), (422, "video.no_stream"))


def test_an_mp4_that_refers_to_another_file_does_not_get_it(server: Running, tmp_path: Path) -> None:
    """Its data reference says that the frames lie in another file, as QuickTime's reference movies do."""
    secret = small_clip(tmp_path / "secret.mp4")
    content = bytearray(secret.read_bytes())
    place = content.index(b"url ", content.index(b"dref"))
    content[place : place + 4] = b"alis"
    content[place + 4 : place + 8] = bytes(4)  # not self-contained
    media = content.index(b"mdat")
    size = struct.unpack(">I", content[media - 4 : media])[0]
    content[media + 4 : media + size - 4] = bytes(size - 8)
    assert sent(server, bytes(content))[0] in (415, 422)


# Of other forms, the last frames may be missing without notice.
NEAR_THE_END = [("mp4", 0.9), ("faststart", 0.9), ("faststart", 0.99)]


@pytest.mark.parametrize(
    ("kind", "cut"),
    [*((kind, cut) for kind in ("mp4", "faststart", "mkv", "avi") for cut in (0.1, 0.5)), *NEAR_THE_END],
)
def test_a_truncated_video_is_rejected(kind: str, cut: float, server: Running, tmp_path: Path) -> None:
    path = tmp_path / f"a.{'mp4' if kind == 'faststart' else kind}"
    options = {"movflags": "+faststart"} if kind == "faststart" else {}
    content = write(path, pictures(60), rate=5, container_options=options).read_bytes()
    status, code = sent(server, content[: int(len(content) * cut)])
    assert status == 422 and code.startswith(DAMAGED), code


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_truncated_image_is_rejected(form: str, server: Running) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)).save(file, form)
    status, code = sent(server, file.getvalue()[: len(file.getvalue()) // 2])
    assert (status == 422 and code.startswith(DAMAGED)) or (status, code) == (415, "video.unsupported_format"), code


def test_an_animation_may_break_off_anywhere(server: Running) -> None:
    file, pictures = io.BytesIO(), [Image.new("RGB", (32, 32), (20 * i, 0, 0)) for i in range(8)]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=100)
    for length in range(60, 180):
        with server.client() as client:
            answer = client.post("/v1/videos", files={"file": ("a.gif", file.getvalue()[:length])})
            if answer.status_code == 201:
                client.delete(f"/v1/videos/{answer.json()['id']}")
            else:
                assert http_error(answer)[0] in (415, 422), length


@pytest.mark.parametrize("size", [(30_000, 30_000), (65_000, 65_000), (513, 512), (100_000, 100_000)])
def test_an_image_of_too_many_pixels_is_rejected_by_its_header(size: tuple[int, int], server: Running) -> None:
    reset_peak()
    before = peak_bytes()
    assert sent(server, png_header(*size)) == (413, "video.too_many_pixels")
    assert peak_bytes() - before < 50e6


@pytest.mark.parametrize("size", [(30_000, 30_000), (65_500, 65_500), (1024, 1024)])
@pytest.mark.parametrize("suffix", ["mov", "avi", "mkv"])
def test_a_video_of_too_many_pixels_is_refused_by_its_header(
    suffix: str, size: tuple[int, int], server: Running, tmp_path: Path
) -> None:
    """Motion JPEG, of which each frame's header says so."""
    path = write(tmp_path / f"a.{suffix}", pictures(5), codec="mjpeg", pixels="yuvj420p", rate=5)
    content, start, frames = bytearray(path.read_bytes()), b"\xff\xc0\x00\x11\x08", 0
    place = content.find(start)
    while place >= 0:
        content[place + 5 : place + 9] = struct.pack(">HH", *size)
        frames, place = frames + 1, content.find(start, place + 1)
    assert frames == 5
    if suffix == "mov":
        content = bytearray(stated_size(bytes(content), *size, kind=b"jpeg"))
    reset_peak()
    before = peak_bytes()
    status, code = sent(server, bytes(content))
    assert (status, code) == (413, "video.too_many_pixels") or (status == 422 and code.startswith(DAMAGED)), code
    assert peak_bytes() - before < 50e6


def test_a_container_that_says_another_size_than_its_frames_costs_no_memory(server: Running, tmp_path: Path) -> None:
    content = stated_size(mp4(tmp_path), 30_000, 30_000)
    reset_peak()
    before = peak_bytes()
    with server.client() as client:
        answer = client.post("/v1/videos", files={"file": ("a.mp4", content)})
        if answer.status_code == 201:
            # The stated size is displayed as 64 × 48, so its pixels are 4:3, and those of the frames too.
            assert (answer.json()["width"], answer.json()["height"]) == (85, 48)
            client.delete(f"/v1/videos/{answer.json()['id']}")
        else:
            assert http_error(answer) == (413, "video.too_many_pixels")
    assert peak_bytes() - before < 50e6


def test_a_video_of_many_real_pixels_is_rejected(server: Running, tmp_path: Path) -> None:
    assert sent(server, write(tmp_path / "a.mp4", pictures(2, 1024, 1024)).read_bytes()) == (
        413,
        "video.too_many_pixels",
    )


def test_a_video_whose_frames_grow_beyond_its_header_makes_no_large_frames(server: Running, tmp_path: Path) -> None:
    """Its header says 64 × 48, and from the tenth frame on the stream itself says 2048 × 2048."""
    small = write(tmp_path / "small.h264", pictures(10), options={"x264-params": "annexb=1:repeat-headers=1"})
    large = write(
        tmp_path / "large.h264", pictures(10, 2048, 2048), options={"x264-params": "annexb=1:repeat-headers=1"}
    )
    joined = tmp_path / "joined.mkv"
    with av.open(str(joined), "w") as out:
        stream = None
        for number, path in enumerate((small, large)):
            with av.open(str(path)) as source:
                stream = stream or out.add_stream_from_template(source.streams.video[0])
                for i, packet in enumerate(source.demux(video=0)):
                    if packet.size:
                        packet.stream, packet.time_base = stream, Fraction(1, 25)
                        packet.pts, packet.dts, packet.duration = 10 * number + i, 10 * number + i, 1
                        out.mux(packet)
    with server.client() as client:
        answer = client.post("/v1/videos", files={"file": ("a.mkv", joined.read_bytes())})
        assert answer.status_code == 201, answer.text
        reset_peak()
        before = peak_bytes()
        value = ended(client, ask(client, answer.json()["id"], ["the car"], allow_none=False).json()["id"])
        assert value["status"] == "done" and value["results"][0]["size"] == {"width": 64, "height": 48}
        assert peak_bytes() - before < 60e6  # one such frame in RGB is 12.6 MB, and decoders keep several
        client.delete(f"/v1/videos/{answer.json()['id']}")


def test_an_hours_long_video_is_rejected(server: Running, tmp_path: Path) -> None:
    long = write(
        tmp_path / "a.mp4", pictures(4), ticks=[0, 1, 2, 4 * 3600], time_base=Fraction(1, 1), options={"bf": "0"}
    )
    assert sent(server, long.read_bytes()) == (413, "video.too_long")


def test_a_video_that_hides_its_length_is_rejected(server: Running, tmp_path: Path) -> None:
    """The container says nothing of its length; the packets do."""
    path = write(
        tmp_path / "a.mkv",
        pictures(4),
        ticks=[0, 1, 2, 4000],
        time_base=Fraction(1, 1),
        options={"bf": "0"},
        container_options={"live": "1"},
    )
    with av.open(str(path)) as file:
        assert not file.duration
    assert sent(server, path.read_bytes()) == (413, "video.too_long")


def test_a_video_of_too_many_frames_is_rejected(server: Running, tmp_path: Path) -> None:
    frame = np.zeros((16, 16, 3), np.uint8)
    path = write(tmp_path / "a.mp4", [frame] * 7300, rate=10_000, options={"preset": "ultrafast"})
    assert sent(server, path.read_bytes()) == (413, "video.too_long")


def test_too_many_streams_are_rejected(server: Running, tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        streams = [file.add_stream("libx264", rate=5) for _ in range(20)]
        for stream in streams:
            stream.width = stream.height = 32
            stream.pix_fmt = "yuv420p"
        for i in range(3):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
                frame.pts = i
                file.mux(stream.encode(frame))
        for stream in streams:
            file.mux(stream.encode(None))
    assert sent(server, path.read_bytes()) == (422, "video.too_many_streams")


def test_sound_alone_is_no_video(server: Running, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        file.mux([*stream.encode(frame), *stream.encode(None)])
    assert sent(server, path.read_bytes()) == (422, "video.no_stream")


def test_a_video_without_frames_is_rejected(server: Running, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "frag_keyframe+empty_moov"}) as file:
        stream = file.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        file.start_encoding()
    status, code = sent(server, path.read_bytes())
    assert (status, code) in ((422, "video.no_frames"), (422, "video.damaged"))


def test_an_empty_file_is_rejected(server: Running) -> None:
    assert sent(server, b"") == (422, "video.empty")


def test_an_upload_is_cut_off_at_its_limit_whatever_its_header_says(server: Running) -> None:
    """Sent in chunks, without a length; the connection is answered long before all was sent."""
    host, port = server.url.removeprefix("http://").split(":")
    written = server.service.metrics.registry.get_sample_value("bridge_stg_uploaded_bytes_total")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            f"POST /v1/videos HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode()
        )
        start = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
        connection.sendall(f"{len(start):x}\r\n".encode() + start + b"\r\n")
        answer = b""
        with contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(b"100000\r\n" + bytes(2**20) + b"\r\n")
        with contextlib.suppress(OSError):
            answer = connection.recv(65536)
    after = server.service.metrics.registry.get_sample_value("bridge_stg_uploaded_bytes_total")
    assert after - written <= 4 * 2**20
    assert not answer or b"413" in answer.split(b"\r\n")[0]
    until(lambda: not list(server.service.store.folder.iterdir()))


def test_a_wrong_content_length(server: Running, tmp_path: Path) -> None:
    with server.client() as client:
        answer = client.post("/v1/videos", files={"file": ("a.mp4", bytes(5 * 2**20))})
        assert http_error(answer) == (413, "server.upload_too_large")


def test_a_silent_upload_is_given_up(served: Callable[..., Running]) -> None:
    running = served(idle_s=0.3)
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            f"POST /v1/videos HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n".encode()
        )
        assert b" 408 " in connection.recv(65536)
    until(lambda: not list(running.service.store.folder.iterdir()))


def test_the_disks_share_is_bounded(served: Callable[..., Running], tmp_path: Path) -> None:
    paths = [small_clip(tmp_path / f"{i}.mp4", number=i) for i in range(4)]
    size = max(path.stat().st_size for path in paths)
    running = served(max_storage_bytes=2 * size + 100, max_videos=3)
    with running.client() as client:
        videos = [upload(client, path)["id"] for path in paths[:2]]
        answer = client.post("/v1/videos", files={"file": paths[2].read_bytes()})
        assert http_error(answer) == (503, "server.storage_full") and answer.headers["retry-after"]
        client.delete(f"/v1/videos/{videos[0]}")
        upload(client, paths[2])
        assert running.service.store.stored_bytes <= 2 * size + 100


def test_names_of_files_are_only_shown(served: Callable[..., Running], tmp_path: Path) -> None:
    running = served()
    content = small_clip(tmp_path / "a.mp4").read_bytes()
    with running.client() as client:
        for name, shown in (
            ("../../etc/passwd", "passwd"),
            ("C:\\clips\\a.mp4", "a.mp4"),
            ("a\x1b[31m.mp4", "a[31m.mp4"),
            ('a".mp4', None),
            ("x" * 500 + ".mp4", "x" * 116 + ".mp4"),
        ):
            answer = client.post("/v1/videos", files={"file": (name, content)})
            assert answer.status_code == 201, answer.text
            video = answer.json()
            assert shown is None or video["name"] == shown
            assert client.get(f"/v1/videos/{video['id']}/content").status_code == 200
        files = list(running.service.store.folder.iterdir())
    assert len(files) == 1 and len(files[0].name) == 32 and not files[0].suffix
    assert os.stat(files[0]).st_mode & 0o077 == 0 and os.stat(running.service.store.folder).st_mode & 0o077 == 0


@pytest.mark.parametrize("samples", [20_000_000, 60_000_000])
def test_a_sample_table_of_millions_takes_no_memory_here(server: Running, samples: int) -> None:
    """Some hundred bytes say that there are so many samples; FFmpeg takes 40 bytes for each."""
    reset_peak()
    before = peak_bytes()
    assert sent(server, sample_table(samples)) == (413, "video.too_long")
    assert peak_bytes() - before < 2**25


@pytest.mark.parametrize("number", [0, 1, 5])
def test_an_animation_with_a_huge_frame(server: Running, number: int) -> None:
    assert sent(server, gif_with_a_huge_frame(number)) == (413, "video.too_many_pixels")


def test_random_damage_is_handled(server: Running, tmp_path: Path) -> None:
    """Whatever is flipped in a file, the server answers, and answers the next one."""
    content, random = bytearray(mp4(tmp_path, seconds=2)), np.random.default_rng(0)
    began = time.monotonic()
    with server.client() as client:
        for _ in range(25):
            damaged = bytearray(content)
            for place in random.integers(0, len(content), 20):
                damaged[place] = random.integers(0, 256)
            answer = client.post("/v1/videos", files={"file": ("a.mp4", bytes(damaged))})
            if answer.status_code == 201:
                job = ended(client, ask(client, answer.json()["id"], ["the car"]).json()["id"])
                assert job["status"] in ("done", "failed") and (job["code"] or "video.").startswith(DAMAGED)
                client.delete(f"/v1/videos/{answer.json()['id']}")
            else:
                assert http_error(answer)[0] in (413, 415, 422)
    assert time.monotonic() - began < 60
