"""Small test videos, and a plain decoder to compare with."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from bridge_stg.runtime.bundle.spec import FramesSpec, LanguageSpec, ModelSpec, VisionSpec
from bridge_stg.runtime.video.frame import BILINEAR
from bridge_stg.runtime.video.source import VideoSource

VISION = VisionSpec("qwen3_vl", 8, 2, 2, 32, 16, 1, 8)
LANGUAGE = LanguageSpec(32, 2, 1, 16, 100, 1000, 2, (1,))
FRAMES = FramesSpec(
    coarse_fps=2, coarse_max_pixels=32 * 32, coarse_min_pixels=256, max_coarse_groups=8, fine_fps=5,
    fine_max_pixels=64 * 64, fine_min_pixels=256,
)  # fmt: skip
SPEC = ModelSpec(VISION, LANGUAGE, FRAMES)
GOP = "keyint=20:min-keyint=20:scenecut=0:bframes=3"

# HDR by ITU-R BT.2100-2 (tables 4 and 5), BT.2087 (primaries) and BT.2408 (white at 203 cd/m²).
WHITE, PEAK = 203.0, 1000.0  # cd/m²
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
LUMA = np.array([0.2627, 0.6780, 0.0593])
TRANSFERS = {"pq": 16, "hlg": 18}  # ISO/IEC 23091-2
BT2020 = 9


def pictures(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Return distinct frames: moving smooth noise with the index as a bar code."""
    rng = np.random.default_rng(0)
    noise = rng.integers(40, 200, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    noise = np.kron(noise, np.ones((8, 8, 1), np.uint8))[:height, :width]
    made = []
    for index in range(count):
        picture = np.roll(noise, index * 3, axis=1).copy()
        for bit in range(8):
            picture[: height // 4, bit * width // 8 : (bit + 1) * width // 8] = 230 if index >> bit & 1 else 20
        made.append(picture)
    return made


def write(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rate: int = 25,
    ticks: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    with av.open(str(path), "w", options=container_options or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        clock = time_base or Fraction(1, rate)
        if time_base is not None:
            stream.codec_context.time_base = time_base
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = (index if ticks is None else ticks[index]), clock
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def two_streams(path: Path, *, default: int | None = None) -> Path:
    """Write streams 0 and 1, of 12 frames of 64 × 48 and of 18 frames of 96 × 64 pixels, the second with more bits."""
    with av.open(str(path), "w") as file:
        streams = [file.add_stream("libx264", rate=25) for _ in range(2)]
        for index, stream in enumerate(streams):
            stream.width, stream.height, stream.pix_fmt = (96, 64, "yuv420p") if index else (64, 48, "yuv420p")
            if index == default:
                stream.disposition = av.stream.Disposition.default.value
        for index, stream in enumerate(streams):
            for picture in pictures(18 if index else 12, stream.height, stream.width):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                file.mux(stream.encode(frame.reformat(format="yuv420p")))
            file.mux(stream.encode(None))
    return path


def decoded(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Decode a whole file; return its frames in RGB and their times."""
    with av.open(str(path)) as file:
        frames = list(file.decode(video=0))
        times = [(f.pts - frames[0].pts) * float(file.streams.video[0].time_base) for f in frames if f.pts is not None]
        return [to_rgb(frame) for frame in frames], np.array(times)


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """Return a frame, which is SDR and has square pixels, in RGB, uint8 [H, W, 3]."""
    return frame.reformat(format="rgb24", interpolation=BILINEAR, threads=1).to_ndarray()


def scaled(rgb: np.ndarray, size: Sequence[int]) -> np.ndarray:
    return np.array(Image.fromarray(rgb).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def pq(light: np.ndarray) -> np.ndarray:
    """Return the PQ signal, 0..1, for light in cd/m²."""
    power = (light / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(light: np.ndarray) -> np.ndarray:
    """Return the HLG signal, 0..1, for light in cd/m² on a display with a peak of 1000 cd/m² (gamma 1.2)."""
    luma = (light @ LUMA)[..., None] / PEAK
    scene = light / PEAK * np.maximum(luma, 1e-9) ** ((1 - 1.2) / 1.2)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


def to_hdr(rgb: np.ndarray, transfer: str) -> av.VideoFrame:
    """Return a picture, uint8 [H, W, 3] in BT.709, as an HDR frame of 10 bits whose white is 203 cd/m²."""
    light = (rgb / 255.0) ** 2.4 @ TO_BT2020.T * WHITE
    signal = (pq if transfer == "pq" else hlg)(light)
    luma = signal @ LUMA
    blue, red = (signal[..., 2] - luma) / 1.8814, (signal[..., 0] - luma) / 1.4746
    planes = [64 + 876 * luma, 512 + 896 * blue, 512 + 896 * red]
    frame = av.VideoFrame(rgb.shape[1], rgb.shape[0], "yuv444p10le")
    for plane, values in zip(frame.planes, planes):
        rows = np.zeros((plane.height, plane.line_size // 2), np.uint16)
        rows[:, : plane.width] = values.round().clip(0, 1023)
        plane.update(rows.tobytes())
    frame.color_trc, frame.color_primaries, frame.colorspace = TRANSFERS[transfer], BT2020, BT2020
    return frame


def write_hdr(path: Path, pictures: Sequence[np.ndarray], transfer: str, *, rate: int) -> Path:
    """Write pictures as an HDR clip, as phones do: 10 bits, H.265."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx265", rate=rate, options={"crf": "8", "x265-params": "log-level=error"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p10le"
        codec = stream.codec_context
        codec.color_trc, codec.color_primaries, codec.colorspace = TRANSFERS[transfer], BT2020, BT2020
        for index, picture in enumerate(pictures):
            frame = to_hdr(picture, transfer).reformat(format="yuv420p10le", threads=1)
            frame.pts, frame.time_base = index, Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


class Counter:
    """Cancel signal that counts its checks, and cancels at check number `stop_at`."""

    def __init__(self, stop_at: int = 0) -> None:
        self.count, self.stop_at = 0, stop_at

    def __call__(self) -> bool:
        self.count += 1
        return self.count == self.stop_at


def expect_fine(source: VideoSource, times: np.ndarray, reference: list[np.ndarray], frame_times: np.ndarray) -> None:
    shown = np.array([max(np.flatnonzero(frame_times <= time + 4e-4), default=0) for time in times])
    samples = source.fine(times)
    np.testing.assert_allclose(samples.times, frame_times[shown], atol=1e-9)
    expected = np.stack([scaled(reference[index], samples.frames.shape[1:3]) for index in shown])
    np.testing.assert_array_equal(samples.frames, expected)


def gif_with_a_huge_frame(number: int) -> bytes:
    """Return an animation of ten frames, one of which says that it has 65535 × 65535 pixels."""
    file = io.BytesIO()
    images = [Image.fromarray(np.full((48, 64, 3), 20 * i, np.uint8)) for i in range(10)]
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=100)
    content = bytearray(file.getvalue())
    place = -1
    for _ in range(number + 1):  # a frame's extension, then its descriptor: left, top, width, height
        place = content.index(b"\x21\xf9\x04", place + 1)
    assert content[place + 8] == 0x2C
    content[place + 13 : place + 17] = b"\xff\xff\xff\xff"
    return bytes(content)
