"""Frames are converted as players display them: HDR, colour matrices, pixel aspect ratio; nothing is kept of them."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.video.frame import FrameConverter
from bridge_stg.runtime.video.open import open_source
from bridge_stg.runtime.video.playback import play
from tests.fakes.clips import SPEC, TO_BT2020, WHITE, pictures, pq, to_hdr, write, write_hdr


def converter(aspect: Fraction | None = None) -> FrameConverter:
    return FrameConverter(SimpleNamespace(sample_aspect_ratio=aspect))


def gradient(height: int = 96, width: int = 128) -> np.ndarray:
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([255 * rows, 255 * columns, 255 * (1 - rows) * columns], axis=-1).round().astype(np.uint8)


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_hdr_becomes_the_sdr_picture(transfer: str, tmp_path: Path) -> None:
    picture = gradient() // 2 + 60  # no colours at the edge of BT.709, which FFmpeg's table rounds coarsely
    with play(write_hdr(tmp_path / "clip.mp4", [picture] * 3, transfer, rate=8)) as source:
        frames = [frame for _, frame in source.frames]
    error = np.abs(frames[1].astype(int) - picture)
    assert error.mean() < 3  # unconverted, the mean is 10 and more


def test_an_hdr_image(tmp_path: Path) -> None:
    picture, data = gradient() // 2 + 60, io.BytesIO()
    light = (picture / 255.0) ** 2.4 @ TO_BT2020.T * WHITE
    Image.fromarray((pq(light) * 255).round().astype(np.uint8)).save(data, "PNG")
    chunk = b"cICP" + bytes([9, 16, 0, 1])  # PNG, third edition: BT.2020, PQ, RGB, full range
    chunk = struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(data.getvalue()[:33] + chunk + data.getvalue()[33:])
    with play(tmp_path / "a.png") as playback:
        assert playback.is_image
        _, frame = next(playback.frames)
    assert np.abs(frame.astype(int) - picture).mean() < 4


def test_light_above_white_is_clipped() -> None:
    bright = converter().rgb(to_hdr(np.full((16, 16, 3), 255, np.uint8), "pq"))
    assert bright.min() > 250


def test_hdr_without_primaries_and_matrix_is_bt2020() -> None:
    tagged, untagged = to_hdr(gradient(), "hlg"), to_hdr(gradient(), "hlg")
    untagged.color_primaries = untagged.colorspace = 2
    np.testing.assert_array_equal(converter().rgb(untagged), converter().rgb(tagged))


def yuv(size: int = 32) -> av.VideoFrame:
    frame = av.VideoFrame(size, size, "yuv420p")
    rng = np.random.default_rng(0)
    for plane in frame.planes:
        plane.update(rng.integers(16, 236, plane.buffer_size, np.uint8).tobytes())
    return frame


EXACT_KR_KB = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", EXACT_KR_KB)
def test_matrix_and_range_of_a_frame(matrix: int, full: bool) -> None:
    frame = av.VideoFrame(16, 16, "yuv444p")
    for plane, value in zip(frame.planes, (120, 90, 160)):
        plane.update(bytes([value]) * plane.buffer_size)
    frame.colorspace, frame.color_range = matrix, 2 if full else 1
    red, blue = EXACT_KR_KB[matrix]
    luma, cb, cr = (120, -38, 32) if full else (104 * 255 / 219, -38 * 255 / 224, 32 * 255 / 224)
    r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    g = (luma - red * r - blue * b) / (1 - red - blue)
    np.testing.assert_allclose(converter().rgb(frame)[8, 8], [r, g, b], atol=1)


HASHES = {  # of SHA-256; the same on x86-64 and aarch64
    "sdr": "2343254ceb4a60fd",
    "stretched": "41f7f3b3aad0c270",
    "hdr": "bc2c7b95ec899caf",
}


@pytest.mark.parametrize("kind", HASHES)
def test_the_same_bytes_on_every_machine(kind: str) -> None:
    frame = yuv()
    if kind == "hdr":
        frame.color_trc, frame.color_primaries, frame.colorspace = 16, 9, 9
    rgb = converter(Fraction(4, 3) if kind == "stretched" else None).rgb(frame)
    assert hashlib.sha256(rgb.tobytes()).hexdigest()[:16] == HASHES[kind]


@pytest.mark.parametrize(
    ("aspect", "size"),
    [
        ("2/1", (48, 128)),
        ("1/2", (96, 64)),
        ("8/9", (54, 64)),
        ("16/11", (48, 93)),
        ("1000/1", (48, 64)),
        ("1/9", (48, 64)),
    ],
)
def test_pixels_become_square(aspect: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = write_aspect(tmp_path / "clip.mp4", Fraction(aspect))
    with open_source(path, SPEC) as source:
        assert (source.height, source.width) == size
    with play(path) as playback:
        assert {frame.shape[:2] for _, frame in playback.frames} == {size}


def write_aspect(path: Path, aspect: Fraction) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for index, picture in enumerate(pictures(4)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 8)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_motion_jpeg_with_exif(orientation: int, tmp_path: Path) -> None:
    path, picture = tmp_path / "camera.avi", gradient(48, 64)
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", orientation
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for index in range(4):
            data = io.BytesIO()
            Image.fromarray(picture).save(data, "JPEG", quality=95, exif=exif)
            packet = av.Packet(data.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, index, index, Fraction(1, 8)
            packet.is_keyframe = True
            file.mux(packet)
    image = Image.fromarray(picture)
    image.getexif()[0x0112] = orientation
    turned = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    with play(path) as playback:
        frames = [frame for _, frame in playback.frames]
    assert frames[0].shape == turned.shape and np.abs(frames[0] - turned).mean() < 6


def test_raw_motion_jpeg_with_exif_is_a_video(tmp_path: Path) -> None:
    path, exif = tmp_path / "camera.mjpeg", Image.Exif()
    exif[0x010F] = "maker"
    with path.open("wb") as file:
        for index in range(3):
            Image.fromarray(np.roll(gradient(48, 64), 9 * index, axis=1)).save(file, "JPEG", exif=exif)
    with play(path) as playback:
        assert not playback.is_image and len(list(playback.frames)) == 3


def test_an_unsupported_matrix_is_an_error() -> None:
    frame = to_hdr(gradient(), "pq")
    frame.colorspace = 15  # IPT-PQ-C2 of Dolby Vision's profile 5
    with pytest.raises(VideoError) as error:
        converter().rgb(frame)
    assert error.value.code == "video.unsupported_codec"


def test_many_open_videos_share_codec_threads_and_close_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", pictures(30))

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = threads()
    sources = [open_source(path, SPEC) for _ in range(12)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda source: source.fine([0.2, 0.4]), sources))
    assert threads() <= before + 2 * 2 * (os.cpu_count() or 1)
    for source in sources:
        source.close()
    end = time.monotonic() + 10
    while threads() > before and time.monotonic() < end:  # an ended thread is listed for a moment
        time.sleep(0.01)
    assert threads() <= before


def test_a_colour_profile_of_an_image_applies(tmp_path: Path) -> None:
    image = Image.fromarray(np.full((32, 32, 3), (200, 60, 60), np.uint8))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    image.save(tmp_path / "other.png", icc_profile=lab.tobytes())  # for other channels: left out
    image.save(tmp_path / "same.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for name in ("other.png", "same.png"):
        with play(tmp_path / name) as playback:
            _, frame = next(playback.frames)
        assert frame[0, 0].tolist() == [200, 60, 60]
