"""Whether an uploaded file may be decoded: told from its headers and packets, then from one frame.

A file's own words are not trusted: its container is taken from its first bytes, its length from its packets. Only
containers are let in that hold their own data: no playlist that names other files or addresses reaches FFmpeg.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.packages import load_package
from bridge_stg.runtime.video.decoder import Decoder, shown_size
from bridge_stg.runtime.video.image import DAMAGE, SHORTEST_FRAME_S, is_animation, open_image, read_rgb
from bridge_stg.server.http.errors import ApiError, api_error

CONTAINERS = {"mov": "video/mp4", "matroska": "video/x-matroska", "webm": "video/webm", "avi": "video/x-msvideo"}
"""What is let in, and how it is served. All of these announce their streams before any frame is decoded."""
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
CODECS = frozenset(
    ("h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "libaom-av1", "mpeg4", "msmpeg4v3",
     "mpeg1video", "mpeg2video", "h263", "mjpeg", "prores", "dnxhd", "ffv1", "theora")
)  # fmt: skip
PICTURES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "BMP": "image/bmp"}
MOST_STREAMS = 16
MOST_FRAMES_A_SECOND = 240
OPEN_S, SCAN_S = 10.0, 20.0
ACCEPTED = "expected MP4, MOV, MKV, WebM or AVI, or a JPEG, PNG, WebP, GIF or BMP picture"


@dataclass(frozen=True)
class FileLimits:
    """What a file may be. Attributes: pixels of a frame; seconds."""

    max_pixels: int
    max_duration_s: float

    @property
    def max_frames(self) -> int:
        """Frames of a video."""
        return max(1, int(self.max_duration_s * MOST_FRAMES_A_SECOND))


@dataclass(frozen=True)
class FileInfo:
    """What a file is.

    Attributes:
        kind: "video" or "image".
        media_type: by which it is served.
        duration_s: its length; 0 of an image.
        width, height: as it is shown, in pixels.
        frames: how many.
    """

    kind: str
    media_type: str
    duration_s: float
    width: int
    height: int
    frames: int


def probe(path: str, name: str, limits: FileLimits) -> FileInfo:
    """Look into a file before anything else does.

    Raises:
        ApiError: 413 if it is too large in pixels, seconds or frames; 415 if it is nothing that is let in; 422 if it is
            damaged or empty. The message calls the file `name`.
    """
    try:
        picture = _open_picture(path, name, limits)
        if picture is not None:
            return _picture(picture, path, name, limits)
        container = _container_of(path)
        if container is None:
            raise ApiError(415, "type", f"{name} is no video or picture that this server reads; {ACCEPTED}.")
        media_type, duration_s, frames = _headers(path, name, container, limits)
        width, height = _first_frame(path)
        _check_pixels(name, width, height, limits)
        return FileInfo("video", media_type, round(duration_s, 6), width, height, frames)
    except VideoError as error:
        raise api_error(error, path=path, name=name) from error


def _open_picture(path: str, name: str, limits: FileLimits) -> Any | None:
    image = load_package("PIL.Image", "pillow")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", image.DecompressionBombWarning)
            picture = open_image(path)
    except VideoError as error:
        if isinstance(error.__cause__, image.DecompressionBombError):
            raise _too_many_pixels(name, "more pixels than any picture", limits) from error
        raise
    if picture is not None and picture.format not in PICTURES:
        picture.close()
        raise ApiError(
            415, "type", f"{name} is a {picture.format} picture, which this server does not read; {ACCEPTED}."
        )
    return picture


def _picture(picture: Any, path: str, name: str, limits: FileLimits) -> FileInfo:
    width, height = picture.size
    media_type, moves = PICTURES[picture.format], is_animation(picture)
    _check_pixels(name, width, height, limits)
    if moves:
        with picture:
            frames, duration_s = _animation(picture, name, limits)
        return FileInfo("video", media_type, duration_s, width, height, frames)
    height, width = read_rgb(picture, path).shape[:2]  # turned as it is shown; a truncated one fails here
    return FileInfo("image", media_type, 0.0, width, height, 1)


def _animation(picture: Any, name: str, limits: FileLimits) -> tuple[int, float]:
    """Count the frames and seconds of an animated picture."""
    began, frames, duration_s = time.monotonic(), 0, 0.0
    while True:
        try:
            picture.seek(frames)
            picture.load()  # WebP says only now how long it is shown
        except DAMAGE:
            break
        shown_s = float(picture.info.get("duration") or 0) / 1000
        frames, duration_s = frames + 1, duration_s + (shown_s if shown_s >= SHORTEST_FRAME_S else 0.1)
        if duration_s > limits.max_duration_s or frames > limits.max_frames or time.monotonic() > began + SCAN_S:
            raise _too_long(name, f"more than {frames - 1} frames", limits)
    if not frames:
        raise ApiError(422, "video", f"{name} holds no frame that can be decoded; save or fetch it again.")
    return frames, round(duration_s, 6)


def _container_of(path: str) -> str | None:
    """Name the container that a file's first bytes are of, None if it is none that is let in."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "webm" if b"webm" in head else "matroska"
    return "avi" if head[:4] == b"RIFF" and head[8:12] == b"AVI " else None


def _headers(path: str, name: str, kind: str, limits: FileLimits) -> tuple[str, float, int]:
    """Check what the headers say, then what the packets are; return media type, seconds and frames."""
    av = load_package("av", "av")
    options = {
        "format_whitelist": DEMUXERS,
        "protocol_whitelist": "file",
        "max_pixels": str(limits.max_pixels),
        "max_streams": str(4 * MOST_STREAMS),
    }
    try:
        container = av.open(f"file:{path}", options=options, metadata_errors="replace", timeout=OPEN_S)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _damaged(name, getattr(error, "strerror", None) or "its header cannot be read") from error
    with container:
        if not set(container.format.name.split(",")) & set(CONTAINERS):
            raise ApiError(415, "type", f"{name} is a {container.format.name} file; {ACCEPTED}.")
        stream = _video_stream(container, name, limits)
        stated = float(container.duration / av.time_base) if container.duration else 0.0
        if stated > limits.max_duration_s:
            raise _too_long(name, f"{stated:.0f} s", limits)
        if stream.frames > limits.max_frames:
            raise _too_long(name, f"{stream.frames} frames", limits)
        duration_s, frames = _packets(container, stream, name, stated, limits)
    return CONTAINERS[kind], duration_s, frames


def _video_stream(container: Any, name: str, limits: FileLimits) -> Any:
    if len(container.streams) > MOST_STREAMS:
        raise ApiError(
            422,
            "streams",
            f"{name} holds {len(container.streams)} streams; expected {MOST_STREAMS} at most, one video.",
        )
    videos = [stream for stream in container.streams if stream.type == "video"]
    if not videos:
        raise ApiError(422, "no_video", f"{name} has no video stream; {ACCEPTED}.")
    for stream in videos:
        codec = stream.codec_context
        if codec is None or (codec.name not in CODECS and codec.codec.canonical_name not in (*CODECS, "png", "bmp")):
            what = "an unknown codec" if codec is None else codec.name
            raise ApiError(415, "codec", f"{name}: its video is {what}, which this server does not decode; use H.264.")
        _check_pixels(name, codec.width, codec.height, limits)
    return next((stream for stream in videos if stream.disposition & 1), videos[0])


def _packets(container: Any, stream: Any, name: str, stated: float, limits: FileLimits) -> tuple[float, int]:
    """Walk over all packets without decoding: count the frames, measure the length, find what is cut off."""
    av = load_package("av", "av")
    began, count, broken = time.monotonic(), 0, False
    first, last, reached = None, 0.0, 0.0
    try:
        for packet in container.demux():
            if packet.size == 0:
                continue
            broken = broken or packet.is_corrupt
            stamp = packet.pts if packet.pts is not None else packet.dts
            end_s = 0.0 if stamp is None else float((stamp + (packet.duration or 0)) * packet.time_base)
            reached = max(reached, end_s)
            if packet.stream.index != stream.index:
                continue
            count += 1
            if stamp is not None:
                first = (
                    float(stamp * packet.time_base) if first is None else min(first, float(stamp * packet.time_base))
                )
                last = max(last, end_s)
            length_s = last - (first or 0.0)
            if length_s > limits.max_duration_s:
                raise _too_long(name, f"{length_s:.0f} s or more", limits)
            if count > limits.max_frames or time.monotonic() > began + SCAN_S:
                raise _too_long(name, f"more than {count - 1} frames", limits)
    except av.FFmpegError as error:
        raise _damaged(name, getattr(error, "strerror", None) or "its packets cannot be read") from error
    if not count:
        raise ApiError(422, "no_frames", f"{name}: its video stream holds no frames; record or export it again.")
    missing = count < stream.frames and not ("avi" in container.format.name and reached > 0.95 * stated)
    if broken or missing or (stated and reached < 0.8 * stated - 1):  # an AVI counts pauses as frames
        raise _damaged(
            name, f"it holds {count} of {max(stream.frames, count)} frames" if stream.frames else "it ends early"
        )
    return (last - (first or 0.0)) or stated, count


def _first_frame(path: str) -> tuple[int, int]:
    """Return width and height, as shown, of the first frame that can be decoded."""
    decoder = Decoder(path)
    try:
        frame = next(decoder.frames(), None)
        if frame is None:
            raise decoder.no_frames()
        height, width = shown_size(frame)
        return width, height
    finally:
        decoder.close()


def _check_pixels(name: str, width: int, height: int, limits: FileLimits) -> None:
    if width * height > limits.max_pixels:
        raise _too_many_pixels(name, f"{width} × {height} pixels", limits)


def _too_many_pixels(name: str, found: str, limits: FileLimits) -> ApiError:
    return ApiError(
        413, "pixels", f"{name} has {found}; this server takes {limits.max_pixels} a frame at most. Scale it down."
    )


def _too_long(name: str, found: str, limits: FileLimits) -> ApiError:
    return ApiError(
        413,
        "duration",
        f"{name} has {found}; this server takes {limits.max_duration_s:g} s and {limits.max_frames} frames at most. "
        "Cut out the part that matters.",
    )


def _damaged(name: str, reason: str) -> ApiError:
    return ApiError(422, "damaged", f"{name} is truncated or damaged ({reason}); copy, record or export it again.")
