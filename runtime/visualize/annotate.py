"""Draw groundings into their video: boxes, queries and time on every frame."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.errors import BridgeError, VideoError
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.host.limits import Progress
from bridge_stg.runtime.video.decoder import DEFAULT_FRAME_S
from bridge_stg.runtime.video.frame import BT709
from bridge_stg.runtime.video.playback import Playback, play
from bridge_stg.runtime.visualize.painter import FramePainter, Painter

if TYPE_CHECKING:
    from PIL import Image

TIME_BASE = Fraction(1, 90000)  # fine enough for all common frame rates, so that variable frame times are kept
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def annotate(
    video: Any,
    groundings: Grounding | Sequence[Grounding],
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> Path:
    """Write the whole video with boxes, queries and time as H.264; an image is written as an image.

    `groundings` are those of one or more queries on one video stream; each has its colour. Frame times and size are
    those of the video as it is shown; an odd side gains one pixel, as H.264 requires. A box is dashed if the target is
    probably not visible, thinner if it is interpolated. Sound is left out. `video` and errors are as in
    `contact_sheet`; `out` is a .mp4 file, or .png or .jpg if the video is an image, and is replaced only when complete.
    Progress is reported as progress("annotate", seconds done, seconds in all).
    """
    drawn = (groundings,) if isinstance(groundings, Grounding) else tuple(groundings)
    stream = drawn[0].stream if drawn else None
    with play(video, stream) as source, replacing(out) as temporary:
        check_suffix(source, out)
        painted = paint_frames(source, lambda size: FramePainter(drawn, size, source.duration_s), progress=progress)
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
