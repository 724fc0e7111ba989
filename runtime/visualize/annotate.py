"""Draw a grounding into its video: box, query and time on every frame."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bridge_stg.runtime.chain.results import FrameBoxes, Grounding
from bridge_stg.runtime.errors import BridgeError, VideoError
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.host.limits import Progress
from bridge_stg.runtime.video.decoder import DEFAULT_FRAME_S
from bridge_stg.runtime.video.frame import BT709
from bridge_stg.runtime.video.playback import Playback, play
from bridge_stg.runtime.visualize.canvas import TARGET, WHITE, draw_box, fit_text, font_for, shade

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

TIME_BASE = Fraction(1, 90000)  # fine enough for all common frame rates, so that variable frame times are kept
SAME_FRAME_S = 1e-3
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


class Painter(Protocol):
    """Draws on frames of one size."""

    size: tuple[int, int]

    def paint(self, image: Image.Image, time_s: float) -> None:
        """Draw on the frame shown at `time_s`, in place."""


class FramePainter:
    """Draws box, query, time and a progress bar on frames of `size` (width, height).

    Without the video's length (None) no bar is drawn, and for an image (0) no time either.
    """

    def __init__(self, grounding: Grounding, size: tuple[int, int], duration_s: float | None) -> None:
        self.grounding, self.size, self.duration_s = grounding, size, duration_s
        side = min(size)
        text_size = max(11, round(side / 22))
        self.font = font_for(grounding.query, text_size)
        self.thickness = max(2, round(side / 90))
        self.margin = max(3, text_size // 2)
        self.bar = max(3, text_size // 4) if duration_s and size[0] > 2 * self.margin else 0
        strip_height = round(1.2 * text_size) + (2 if self.bar else 1) * self.margin + self.bar
        self.strip_top = max(0, size[1] - strip_height - self.margin // 2)
        room = size[0] - 3 * self.margin - self.font.getlength("0000.00 s")
        text = grounding.query if grounding.found else f"not in this video: {grounding.query}"
        self.text = fit_text(text, self.font, room)

    def paint(self, image: Image.Image, time_s: float) -> None:
        """Draw on the frame shown at `time_s`, in place."""
        from PIL import ImageDraw

        shade(image, (0, self.strip_top, *self.size), 0.65)
        draw = ImageDraw.Draw(image)
        boxes = self.grounding.boxes
        index = None if boxes is None else frame_index(boxes, time_s)
        if boxes is not None and index is not None:
            thinner = self.thickness // 3 if boxes.interpolated[index] else 0
            dashed = not boxes.visible[index]
            draw_box(draw, boxes.boxes[index], self.size, thickness=self.thickness - thinner, dashed=dashed)
        baseline = self.strip_top + self.margin // 2
        draw.text((self.margin, baseline), self.text, WHITE, self.font)
        if self.duration_s != 0:
            draw.text((self.size[0] - self.margin, baseline), f"{time_s:.2f} s", WHITE, self.font, anchor="ra")
        if self.bar and self.duration_s:
            self._paint_bar(draw, time_s, self.duration_s)

    def _paint_bar(self, draw: ImageDraw.ImageDraw, time_s: float, duration_s: float) -> None:
        left, right, bottom = self.margin, self.size[0] - self.margin, self.size[1] - self.margin
        top = bottom - self.bar

        def x(time_s: float) -> float:
            return left + (right - left) * min(max(time_s / duration_s, 0.0), 1.0)

        draw.rectangle((left, top, right, bottom), fill=(110, 114, 120))
        if self.grounding.span is not None:
            start, end = self.grounding.span
            draw.rectangle((x(start), top, x(end), bottom), fill=TARGET)
        half = max(1, self.bar // 3)
        draw.rectangle((x(time_s) - half, top - self.bar // 2, x(time_s) + half, bottom + self.bar // 2), fill=WHITE)


def frame_index(boxes: FrameBoxes, time_s: float) -> int | None:
    """Return the index of the box of the frame shown at `time_s`; None if it has no box."""
    index = int(np.searchsorted(boxes.times, time_s - SAME_FRAME_S))
    return index if index < len(boxes) and abs(boxes.times[index] - time_s) <= SAME_FRAME_S else None


def annotate(
    video: Any, grounding: Grounding, out: str | os.PathLike[str], *, progress: Progress | None = None
) -> Path:
    """Write the whole video with box, query and time as H.264; an image is written as an image.

    Frame times and size are those of the video as it is shown; an odd side gains one pixel, as H.264 requires. A box is
    dashed if the target is probably not visible, thinner if it is interpolated. Sound is left out. `video` and errors
    are as in `contact_sheet`; `out` is a .mp4 file, or .png or .jpg if the video is an image, and is replaced only when
    complete. Progress is reported as progress("annotate", seconds done, seconds in all).
    """
    with play(video, grounding.stream) as source, replacing(out) as temporary:
        check_suffix(source, out)
        painted = paint_frames(source, lambda size: FramePainter(grounding, size, source.duration_s), progress=progress)
        if source.is_image:
            next(painted)[1].save(temporary, quality=95)
        else:
            encode_h264(painted, temporary, source.last_end_s)
    return Path(out)


def check_suffix(source: Playback, out: str | os.PathLike[str]) -> None:
    """Raise BridgeError if the output file has a suffix for another kind of video."""
    expected = IMAGE_SUFFIXES if source.is_image else (".mp4",)
    if Path(out).suffix.lower() not in expected:
        kind = "image" if source.is_image else "video"
        raise BridgeError("output.bad_suffix", f"{out}: expected the suffix {' or '.join(expected)} for this {kind}")


def paint_frames(
    source: Playback, painter_for: Callable[[tuple[int, int]], Painter], *, progress: Progress | None = None
) -> Iterator[tuple[float, Image.Image]]:
    """Yield (time_s, painted image) for every frame; all have the size of the first, for which the painter is made."""
    from PIL import Image

    painter: Painter | None = None
    for time_s, frame in source.frames:
        image = Image.fromarray(np.ascontiguousarray(frame))
        painter = painter or painter_for(image.size)
        if image.size != painter.size:
            image = image.resize(painter.size)
        painter.paint(image, time_s)
        yield time_s, image
        if progress is not None:
            progress("annotate", time_s, source.duration_s)


def encode_h264(
    frames: Iterable[tuple[float, Image.Image]], out: Path, end_s: Callable[[], float | None] = lambda: None
) -> None:
    """Encode (time_s, image) pairs with strictly increasing times, keeping the times and the `end_s` of the last."""
    import av

    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise VideoError("video.no_frames", "the video has no frames to draw on; expected at least one")
    with av.open(str(out), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        try:
            stream: Any = container.add_stream("libx264", rate=30, options={"crf": "18", "preset": "veryfast"})
        except av.error.FFmpegError as error:
            raise BridgeError("output.no_encoder", 'PyAV cannot write H.264: pip install "av>=17.1"') from error
        stream.width, stream.height = (side + side % 2 for side in first[1].size)
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.color_primaries = codec.color_trc = codec.colorspace = BT709
        codec.time_base = TIME_BASE
        previous, gap = -1, round(DEFAULT_FRAME_S / TIME_BASE)
        for time_s, image in itertools.chain([first], frames):
            frame = av.VideoFrame.from_ndarray(_even_sides(np.asarray(image)), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=BT709, threads=1)
            ticks = max(previous + 1, round(time_s / TIME_BASE))
            frame.pts, frame.time_base = ticks, TIME_BASE
            gap, previous = gap if previous < 0 else ticks - previous, ticks
            container.mux(stream.encode(frame))
        if (last := end_s()) is not None:
            gap = max(1, round(last / TIME_BASE) - previous)
        for packet in stream.encode(None):
            packet.duration = (
                gap  # the file's length includes the last frame; by default it is as long as the one before
            )
            container.mux(packet)


def _even_sides(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") if height % 2 or width % 2 else pixels
