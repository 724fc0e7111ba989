"""Convert decoded frames to RGB as players display them, and resize RGB frames.

All decoded frames are converted here, to the same bytes on x86 and ARM. Knows nothing of files and times.
"""

from __future__ import annotations

import threading
import zlib
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any, TypeVar

import numpy as np

from bridge_stg.runtime.device.array import DeviceArray
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.cpus import usable_cpus
from bridge_stg.runtime.host.packages import load_package

Frame = TypeVar("Frame", np.ndarray, DeviceArray)

# Values of ISO/IEC 23091-2 (H.273), as in FFmpeg's libavutil/pixfmt.h.
BT709, BT2020 = 1, 9
UNKNOWN_PRIMARIES, UNKNOWN_MATRICES = (0, 2, 3), (2, 3)
HDR_TRANSFERS = (8, 9, 10, 16, 17, 18)  # linear, logarithmic, PQ, SMPTE ST 428-1, HLG
WIDE_PRIMARIES = (8, 9, 10, 11, 12)  # film, BT.2020, SMPTE ST 428-1, DCI-P3, Display P3
MAX_PIXEL_ASPECT = 8  # a larger ratio than 8:1 is a mistake of the program that wrote the file
TO_BT709 = "out_transfer=bt709:out_primaries=bt709"
HDR_THREADS = 4

# Flags of FFmpeg's libswscale/swscale.h; PyAV 17, the last for Python 3.10, has no names for all of them.
EXACT = 0x40000 | 0x2000 | 0x80000  # SWS_ACCURATE_RND, SWS_FULL_CHR_H_INT, SWS_BITEXACT
BILINEAR, BICUBIC = 2 | EXACT, 4 | EXACT


class FrameConverter:
    """Converts the decoded frames of one stream to RGB as displayed; several threads may use it at once.

    HDR and wide gamut are mapped to BT.709, pixels become square by enlarging the shorter side, display matrices to
    the nearest right angle are applied, and transparent pixels are blended with white.
    """

    def __init__(self, stream: Any) -> None:
        aspect = stream.sample_aspect_ratio or Fraction(1)  # of the container, else of the codec
        self._aspect = aspect if 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT else Fraction(1)
        self._unused: list[Any] = []

    def size(self, frame: Any) -> tuple[int, int]:
        """Return (height, width) of a frame as displayed."""
        width, height = self._square_pixels(frame)
        return (width, height) if _display(frame)[0] else (height, width)

    def rgb(self, frame: Any) -> np.ndarray:
        """Return a frame as displayed, uint8 [height, width, 3]. Raises VideoError if its format is not supported."""
        alpha = not frame.format.has_palette and any(component.is_alpha for component in frame.format.components)
        width, height = self._square_pixels(frame)
        options = {"width": width, "height": height, "format": "rgba" if alpha else "rgb24"}
        try:
            if frame.color_trc in HDR_TRANSFERS or frame.color_primaries in WIDE_PRIMARIES:
                rgb = _to_bt709(frame, options)
            else:
                rgb = self._convert(frame, options)
        except (load_package("av", "av").FFmpegError, ValueError, OSError) as error:
            text = f"pixel format {frame.format.name} cannot be converted to RGB ({error})"
            raise VideoError("video.unsupported_codec", f"{text}; convert the video to H.264") from error
        rgb = over_white(rgb) if alpha else rgb
        transposed, flip_rows, flip_columns = _display(frame)
        rgb = rgb.transpose(1, 0, 2) if transposed else rgb
        return rgb[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]

    def _square_pixels(self, frame: Any) -> tuple[int, int]:
        """Return (width, height) of a frame with square pixels, before its rotation."""
        return round(frame.width * max(self._aspect, 1)), round(frame.height / min(self._aspect, 1))

    def _convert(self, frame: Any, options: dict[str, Any]) -> np.ndarray:
        av = load_package("av.video.reformatter", "av")
        try:
            reformatter = self._unused.pop()
        except IndexError:
            reformatter = av.VideoReformatter()  # frame.reformat keeps a thread pool alive as long as the frame
        rgb: np.ndarray = reformatter.reformat(frame, **options, interpolation=BILINEAR, threads=1).to_ndarray()
        self._unused.append(reformatter)
        return rgb


def _to_bt709(frame: Any, options: dict[str, Any]) -> np.ndarray:
    if frame.color_primaries in UNKNOWN_PRIMARIES:
        frame.color_primaries = BT2020
    if frame.colorspace in UNKNOWN_MATRICES:
        frame.colorspace = BT2020
    colors = frame.color_trc, frame.color_primaries, frame.colorspace, frame.color_range
    graph, lock = _bt709_graph((frame.width, frame.height, frame.format.name), colors, **options)
    with lock:
        try:
            graph.push(frame)
            rgb: np.ndarray = graph.pull().to_ndarray()
        except Exception:
            _bt709_graph.cache_clear()  # its state is unknown
            raise
    return rgb


@lru_cache(maxsize=4)
def _bt709_graph(
    source: tuple[int, int, str], colors: tuple[int, ...], *, width: int, height: int, format: str
) -> tuple[Any, threading.Lock]:
    """Return FFmpeg's filter graph for one kind of frame, and its lock; cached, since its table takes seconds."""
    graph = load_package("av.filter", "av").Graph()
    graph.threads = min(usable_cpus(), HDR_THREADS)
    given = dict(zip(("width", "height", "format"), source))
    scale = f"w={width}:h={height}:flags=bicubic+accurate_rnd+full_chroma_int+bitexact:{TO_BT709}"
    nodes = (graph.add(*node) for node in (("scale", scale), ("format", format), ("buffersink",)))
    graph.link_nodes(graph.add_buffer(**given, time_base=Fraction(1, 1000)), *nodes).configure()
    return graph, threading.Lock()


def _display(frame: Any) -> tuple[bool, bool, bool]:
    """Return (transpose, then flip rows, then flip columns) of a frame's display matrix, to the nearest right angle.

    The matrix [[a, b, u], [c, d, v], [x, y, w]], 9 int32, takes a pixel (p, q) to (ap + cq + x, bp + dq + y): FFmpeg's
    libavutil/display.h.
    """
    # Not frame.side_data, which keeps the frame alive until the garbage collector runs.
    matrix = _side_data().SideDataContainer(frame).get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    turned = abs(a) + abs(d) < abs(b) + abs(c)
    return (True, b < 0, c < 0) if turned else (False, d < 0, a < 0)


@cache
def _side_data() -> Any:
    """Return PyAV's module of side data; it has no name for EXIF, and would raise ValueError for a frame with it."""
    module = load_package("av.sidedata.sidedata", "av")
    module.Type._missing_ = classmethod(lambda kinds, _: kinds.PANSCAN)
    return module


def over_white(rgba: np.ndarray) -> np.ndarray:
    """Blend an image with transparency, uint8 [H, W, 4], with white: uint8 [H, W, 3]."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def fingerprint(frame: Any) -> int:
    """Return a checksum of a sample of a frame's pixels (some thousand bytes of its first plane)."""
    plane = frame.planes[0]
    width = min(plane.width, plane.line_size)
    if width <= 0:  # stored bottom up
        return 0
    rows = np.frombuffer(plane, np.uint8)[: plane.height * plane.line_size].reshape(plane.height, plane.line_size)
    return zlib.crc32(rows[:: 1 + plane.height // 64, : width : 1 + width // 64].tobytes())


def resize(rgb: Frame, size: tuple[int, int]) -> Frame:
    """Resize an RGB frame, uint8 [H, W, 3], to `size`, (height, width), with Pillow's bicubic filter.

    A frame on a device stays there, and the result has the same bytes.
    """
    if isinstance(rgb, DeviceArray):
        return rgb.context.resize(rgb, size, resize)
    image = load_package("PIL.Image", "pillow")
    if rgb.shape[:2] == size:
        return np.array(rgb)
    return np.array(image.fromarray(np.ascontiguousarray(rgb)).resize((size[1], size[0]), image.Resampling.BICUBIC))
