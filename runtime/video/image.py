"""Still and animated images, read with Pillow: any mode, EXIF orientation applied, converted to RGB."""

from __future__ import annotations

import contextlib
import io
import itertools
import mmap
import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.host.packages import load_package
from bridge_stg.runtime.video.decoder import Decoder
from bridge_stg.runtime.video.frame import over_white, resize
from bridge_stg.runtime.video.sampling import CoarseSampler
from bridge_stg.runtime.video.source import Samples, VideoSource
from bridge_stg.runtime.video.token_budget import Budget

# Pillow's other readers mistake some video files for images (TGA has no signature, MPEG no decoder).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO", "AVIF", "HEIF", "JPEG2000", "ICO")
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
MATROSKA = b"\x1a\x45\xdf\xa3"
BAND_PIXELS = 2**22
SHORTEST_FRAME_S = 0.011

# Raised by Pillow's plugins for damaged files.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, struct.error)


class StillImage(VideoSource):
    """A still image as a video: one frame at time 0 that lasts one coarse sample interval."""

    is_image = True

    def __init__(self, rgb: np.ndarray, spec: ModelSpec, *, name: str, budget: Budget | None = None) -> None:
        super().__init__(spec, width=rgb.shape[1], height=rgb.shape[0], name=name, budget=budget)
        self._picture = resize(rgb, self._plan.size_of(np.zeros(1)) or self._plan.smallest)
        self._fine_picture = resize(rgb, self.fine_size)

    def close(self) -> None:
        """Do nothing: no file is open."""

    def _scan(self, limits: Limits) -> CoarseSampler:
        self._times, self._duration_s = np.zeros(1), 1 / self._spec.frames.coarse_fps
        sampler = CoarseSampler(self._plan, self._spec.frames.coarse_fps, group=1)
        sampler.items.append(self._picture)
        return sampler

    def _fetch(self, times: np.ndarray, limits: Limits) -> Samples:
        return Samples(frames=np.repeat(self._fine_picture[None], len(times), axis=0), times=np.zeros(len(times)))


def read_image(path: str) -> np.ndarray | Animation | None:
    """Read an image, uint8 [H, W, 3], or an animation; None if it is neither. Raises VideoError if it is damaged."""
    picture = open_image(path)
    if picture is None:
        return None
    return Animation(picture, path) if is_animation(picture) else read_rgb(picture, path)


def bomb_error() -> type[Exception]:
    """Return the class of Pillow's error for an image, or a frame of an animation, with too many pixels."""
    error: type[Exception] = load_package("PIL.Image", "pillow").DecompressionBombError
    return error


def open_image(path: str) -> Any | None:
    """Open a file as a `PIL.Image.Image`; None if it is not an image. Raises VideoError if it is damaged."""
    with open(path, "rb") as file:
        head = file.read(12)
    # Recognize videos by their signature, without loading all of Pillow's readers.
    is_picture = head[4:8] == b"ftyp" and head[8:12] in PICTURE_BRANDS
    if not is_picture and (head[4:8] == b"ftyp" or head[:4] == MATROSKA or head[8:] == b"AVI "):
        return None
    image = load_package("PIL.Image", "pillow")
    image.init()
    try:
        opened = image.open(path, formats=[name for name in FORMATS if name in image.OPEN])
        if opened.format != "JPEG" or not _is_motion_jpeg(opened, path):
            return opened
        opened.close()
        return None
    except image.UnidentifiedImageError as error:
        if is_picture:  # FFmpeg would read one tile of it as a video
            text = f"{path}: this build of Pillow cannot read HEIF or AVIF images; convert it to JPEG"
            raise VideoError("video.unsupported_codec", text) from error
        return None
    except (image.DecompressionBombError, *DAMAGE) as error:
        raise _unreadable(path, error) from error


def _is_motion_jpeg(picture: Any, path: str) -> bool:
    """Return whether a JPEG is followed by one of equal size, so a video: previews are smaller, and MPO is excluded."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        after = data.find(b"\xff\xd9\xff\xd8\xff") + 2
        if after < 2 or "mpoffset" in picture.info:
            return False
        with contextlib.suppress(*DAMAGE):
            head = io.BytesIO(data[after : after + 2**20])
            return bool(load_package("PIL.Image", "pillow").open(head, formats=["JPEG"]).size == picture.size)
    return False


def is_animation(picture: Any) -> bool:
    """Return whether an image is animated; pages of a TIFF and thumbnails of an MPO do not count."""
    try:
        return picture.format in ANIMATED and getattr(picture, "is_animated", False)
    except DAMAGE:  # a damaged second frame of a GIF; the first one is intact
        return False
    except bomb_error():  # raised again when the frame is read
        return True


def read_rgb(picture: Any, path: str) -> np.ndarray:
    """Return an image as shown, uint8 [H, W, 3], blended with white. Raises VideoError if it is damaged."""
    operations = load_package("PIL.ImageOps", "pillow")
    try:
        with picture:
            picture.load()
            if (hdr := _hdr_rgb(path)) is not None:
                return hdr
            with contextlib.suppress(*DAMAGE):  # the EXIF block may be damaged in an intact image
                operations.exif_transpose(picture, in_place=True)
            return _rgb(picture)
    except DAMAGE as error:
        raise _unreadable(path, error) from error


def frame_seconds(picture: Any) -> float:
    """Return how long browsers show the loaded frame of an animation: if 10 ms or less are requested, 100 ms."""
    seconds = float(picture.info.get("duration") or 0) / 1000
    return seconds if seconds >= SHORTEST_FRAME_S else 0.1


class Animation:
    """The frames of an animated image as (time in seconds, RGB frame), up to the first damaged one, to be read once.

    `end_s` is the end of the newest frame. Raises VideoError if the first frame is damaged or any is too large.
    """

    def __init__(self, picture: Any, path: str) -> None:
        self._picture, self._path, self.end_s = picture, path, 0.0

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        with self._picture as picture:
            for index in itertools.count():
                try:
                    picture.seek(index)
                    picture.load()
                    rgb = _rgb(picture)
                except DAMAGE as error:  # EOFError after the last frame
                    if index == 0 and not isinstance(error, EOFError):
                        raise _unreadable(self._path, error) from error
                    return
                except bomb_error() as error:
                    raise _unreadable(self._path, error) from error
                time = self.end_s
                self.end_s += frame_seconds(picture)
                yield time, rgb


def _rgb(picture: Any) -> np.ndarray:
    """Convert an image to RGB in bands of rows, since intermediate arrays take many bytes per pixel."""
    width, height = picture.size
    rows = max(1, BAND_PIXELS // width)
    boxes = [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]
    unit = picture.mode == "F" and max(_floats(picture.crop(box)).max() for box in boxes) <= 1
    rgb = np.empty((height, width, 3), np.uint8)
    for box in boxes:
        rgb[box[1] : box[3]] = _band_rgb(picture.crop(box), unit=unit)
    return rgb


def _floats(picture: Any) -> np.ndarray:
    return np.nan_to_num(np.asarray(picture).astype(np.float64), nan=0.0, posinf=255.0, neginf=0.0)


def _band_rgb(picture: Any, *, unit: bool) -> np.ndarray:
    picture = _to_srgb(picture)
    if picture.mode.startswith("I;16") or picture.mode == "I":  # Pillow's mode I holds 16-bit files too
        values = np.asarray(picture).astype(np.float64).clip(0, 65535) / 257
    elif picture.mode == "F":
        values = (_floats(picture) * (255 if unit else 1)).clip(0, 255)
    elif picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        return over_white(np.asarray(picture.convert("RGBA")))
    else:
        return np.array(picture.convert("RGB"))
    return np.repeat(values.round().astype(np.uint8)[..., None], 3, axis=-1)


def _hdr_rgb(path: str) -> np.ndarray | None:
    """Return an image that its file marks as PQ or HLG, which Pillow ignores, by FFmpeg; None for any other."""
    with open(path, "rb") as file:
        head = file.read(2**16)
    if not re.search(rb"cICP.[\x10\x12]|nclx..\x00[\x10\x12]", head, re.DOTALL):  # of PNG, and of AVIF and HEIF
        return None
    with contextlib.closing(Decoder(path)) as decoder:
        frame = next(decoder.frames(), None)
        if frame is None:
            raise decoder.no_frames()
        return decoder.converter.rgb(frame)


def _to_srgb(picture: Any) -> Any:
    """Return an image with an embedded colour profile, such as Display P3, in sRGB."""
    profile = picture.info.get("icc_profile")
    if not profile or b"sRGB" in profile or picture.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return picture
    colors = load_package("PIL.ImageCms", "pillow")
    try:
        source, mode = io.BytesIO(profile), "RGBA" if picture.mode == "RGBA" else "RGB"
        return colors.profileToProfile(picture, source, colors.createProfile("sRGB"), outputMode=mode)
    except (colors.PyCMSError, OSError):  # a damaged profile, or one for other channels, in an intact image
        return picture


def _unreadable(path: str, error: Exception) -> VideoError:
    return VideoError("video.unreadable", f"{path} is a truncated, damaged or too large image ({error}); copy it again")
