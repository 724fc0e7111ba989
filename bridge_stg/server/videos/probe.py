"""Decide whether an uploaded file may be decoded, from its headers and packets, then from one frame.

The claims of a file are not trusted: its container is detected from its first bytes, its length from its packets.
Only containers that hold their own data are accepted: no playlist that names other files or addresses reaches FFmpeg.
"""

from __future__ import annotations

import time
import warnings
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.packages import load_package
from bridge_stg.runtime.video.decoder import Decoder, moving_streams
from bridge_stg.runtime.video.image import DAMAGE, bomb_error, frame_seconds, is_animation, open_image, read_rgb
from bridge_stg.server.http.errors import ApiError, api_error
from bridge_stg.server.settings import MediaLimits

CONTAINERS = {"mov": "video/mp4", "matroska": "video/x-matroska", "webm": "video/webm", "avi": "video/x-msvideo"}
"""Accepted containers and their media types. All of them announce their streams before any frame is decoded."""
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
CODECS = frozenset(
    ("h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "libaom-av1", "mpeg4", "msmpeg4v3",
     "mpeg1video", "mpeg2video", "h263", "mjpeg", "prores", "dnxhd", "ffv1", "theora")
)  # fmt: skip
IMAGES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "BMP": "image/bmp"}
MOV_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
MOST_STREAMS = 16
OPEN_S, SCAN_S = 10.0, 20.0
ACCEPTED = "expected MP4, MOV, MKV, WebM or AVI, or a JPEG, PNG, WebP, GIF or BMP image"


@dataclass(frozen=True)
class FileInfo:
    """Properties of a file."""

    kind: str  # "video" or "image"
    media_type: str
    duration_s: float  # length in seconds; 0 for an image
    width: int  # in pixels, as displayed
    height: int
    frames: int


def probe(path: str, name: str, limits: MediaLimits) -> FileInfo:
    """Inspect a file, called `name` in messages, before any other code opens it. Raises ApiError 413, 415 and 422."""
    check = _Check(name, limits)
    try:
        image = check.open_image(path)
        if image is not None:
            return check.image(image, path)
        container = _container_of(path)
        if container is None:
            raise check.unsupported("not a supported video or image")
        duration_s, frames = check.container(path)
        width, height = _first_frame(path)
        check.pixels(width, height)
        return FileInfo("video", CONTAINERS[container], round(duration_s, 6), width, height, frames)
    except VideoError as error:
        raise api_error(error, path=path, name=name) from error


def _container_of(path: str) -> str | None:
    """Return the container that the first bytes of a file belong to, None if it is not accepted."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head[4:8] in MOV_BOXES:
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "webm" if b"webm" in head else "matroska"
    return "avi" if head[:4] == b"RIFF" and head[8:12] == b"AVI " else None


def _first_frame(path: str) -> tuple[int, int]:
    """Return width and height, as displayed, of the first frame that can be decoded."""
    with closing(Decoder(path)) as decoder:
        frame = next(decoder.frames(), None)
        if frame is None:
            raise decoder.no_frames()
        height, width = decoder.converter.size(frame)
        return width, height


@dataclass(frozen=True)
class _Check:
    """The checks of one file; each raises ApiError."""

    name: str
    limits: MediaLimits

    def pixels(self, width: int, height: int) -> None:
        if width * height > self.limits.max_pixels:
            raise self._too_many_pixels(f"{width} × {height} pixels")

    def open_image(self, path: str) -> Any | None:
        """Return an accepted image, None if the file is not an image."""
        pillow = load_package("PIL.Image", "pillow")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
                image = open_image(path)
        except VideoError as error:
            if isinstance(error.__cause__, pillow.DecompressionBombError):
                raise self._too_many_pixels("more pixels than any image") from error
            raise
        if image is not None and image.format not in IMAGES:
            image.close()
            raise self.unsupported(f"a {image.format} image, which is not supported")
        return image

    def image(self, image: Any, path: str) -> FileInfo:
        """Check a still or animated image."""
        (width, height), media_type = image.size, IMAGES[image.format]
        self.pixels(width, height)
        if is_animation(image):
            with image:
                frames, duration_s = self._animation(image)
            return FileInfo("video", media_type, duration_s, width, height, frames)
        height, width = read_rgb(image, path).shape[:2]  # rotated as displayed; raises if it is truncated
        return FileInfo("image", media_type, 0.0, width, height, 1)

    def _animation(self, image: Any) -> tuple[int, float]:
        """Count the frames and seconds of an animated image."""
        end, frames, duration_s = time.monotonic() + SCAN_S, 0, 0.0
        while True:
            try:
                image.seek(frames)
                image.load()  # WebP knows the duration of a frame only now
            except DAMAGE:
                break
            except bomb_error() as error:
                raise self._too_many_pixels("a frame with more pixels") from error
            frames, duration_s = frames + 1, duration_s + frame_seconds(image)
            self._length(duration_s, frames, end)
        if not frames:
            raise self._no_frames()
        return frames, round(duration_s, 6)

    def container(self, path: str) -> tuple[float, int]:
        """Check what the headers say, then the packets; return seconds and frames."""
        av = load_package("av", "av")
        options = {
            "format_whitelist": DEMUXERS,
            "protocol_whitelist": "file",
            "max_pixels": str(self.limits.max_pixels),
            "max_streams": str(4 * MOST_STREAMS),
        }
        try:
            container = av.open(f"file:{path}", options=options, metadata_errors="replace", timeout=OPEN_S)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise self._damaged(getattr(error, "strerror", None) or "its header cannot be read") from error
        with container:
            if not set(container.format.name.split(",")) & set(CONTAINERS):
                raise self.unsupported(f"a {container.format.name} file")
            stream = self._stream(container)
            stated_s = float(container.duration / av.time_base) if container.duration else 0.0
            self._length(stated_s, stream.frames)
            try:
                return self._packets(container, stream, stated_s)
            except av.FFmpegError as error:
                raise self._damaged(getattr(error, "strerror", None) or "its packets cannot be read") from error

    def _stream(self, container: Any) -> Any:
        count = len(container.streams)
        if count > MOST_STREAMS:
            message = f"{self.name} has {count} streams; expected at most {MOST_STREAMS}, one of them video."
            raise ApiError(422, "video.too_many_streams", message)
        videos = [stream for stream in container.streams if stream.type == "video"]
        if not videos:
            raise ApiError(422, "video.no_stream", f"{self.name} has no video stream; {ACCEPTED}.")
        for stream in videos:
            codec = stream.codec_context
            if codec is None or (
                codec.name not in CODECS and codec.codec.canonical_name not in {*CODECS, "png", "bmp"}
            ):
                found = "an unknown codec" if codec is None else codec.name
                message = f"{self.name} is encoded with {found}, which is not supported; use H.264."
                raise ApiError(415, "video.unsupported_codec", message)
            self.pixels(codec.width, codec.height)
        return (moving_streams(container) or videos)[0]

    def _packets(self, container: Any, stream: Any, stated_s: float) -> tuple[float, int]:
        """Read all packets without decoding: count the frames, measure the length, detect truncation."""
        end, count, broken = time.monotonic() + SCAN_S, 0, False
        first_s, last_s, reached_s = None, 0.0, 0.0
        for packet in container.demux():
            if packet.size == 0:
                continue
            broken = broken or packet.is_corrupt
            stamp = packet.pts if packet.pts is not None else packet.dts
            end_s = 0.0 if stamp is None else float((stamp + (packet.duration or 0)) * packet.time_base)
            reached_s = max(reached_s, end_s)
            if packet.stream.index != stream.index:
                continue
            count += 1
            if stamp is not None and not packet.is_discard:  # discarded: before the start in an edit list
                start_s = float(stamp * packet.time_base)
                first_s = start_s if first_s is None else min(first_s, start_s)
                last_s = max(last_s, end_s)
            self._length(last_s - (first_s or 0.0), count, end)
        if not count:
            raise self._no_frames()
        whole = "avi" in container.format.name and reached_s > 0.95 * stated_s  # an AVI counts pauses as frames
        if broken or (count < stream.frames and not whole) or (stated_s and reached_s < 0.8 * stated_s - 1):
            frames = stream.frames
            raise self._damaged(f"it has {count} of {max(frames, count)} frames" if frames else "it ends early")
        return (last_s - (first_s or 0.0)) or stated_s, count

    def _length(self, duration_s: float, frames: int, end: float | None = None) -> None:
        """Check seconds and frames, and that counting them ends in time."""
        limits = self.limits
        if duration_s > limits.max_duration_s:
            found = f"{duration_s:.0f} s or more"
        elif frames > limits.max_frames or (end is not None and time.monotonic() > end):
            found = f"{frames} frames or more"
        else:
            return
        message = (
            f"{self.name} has {found}; this server accepts at most {limits.max_duration_s:g} s and "
            f"{limits.max_frames} frames. Cut it to the relevant part."
        )
        raise ApiError(413, "video.too_long", message)

    def unsupported(self, found: str) -> ApiError:
        return ApiError(415, "video.unsupported_format", f"{self.name} is {found}; {ACCEPTED}.")

    def _no_frames(self) -> ApiError:
        message = f"{self.name} has no frames that can be decoded; record, save or export it again."
        return ApiError(422, "video.no_frames", message)

    def _too_many_pixels(self, found: str) -> ApiError:
        message = f"{self.name} has {found}; this server accepts at most {self.limits.max_pixels} per frame. Resize it."
        return ApiError(413, "video.too_many_pixels", message)

    def _damaged(self, reason: str) -> ApiError:
        message = f"{self.name} is truncated or damaged ({reason}); copy, record or export it again."
        return ApiError(422, "video.damaged", message)
