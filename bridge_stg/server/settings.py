"""The operator's settings of a server and their checks. Knows nothing of HTTP."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bridge_stg.runtime.errors import BridgeError

MB = 10**6
LIVE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MOST_FRAMES_PER_SECOND = 240
LEAST_KEY = 16  # characters of an API key: a shorter one could be guessed


@dataclass(frozen=True)
class MediaLimits:
    """Limits of one file of a client, and of the subprocess that reads it."""

    max_duration_s: float
    max_frames: int
    max_pixels: int
    decode_bytes: int


@dataclass(frozen=True)
class Settings:
    """Limits and addresses of one server."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0 takes a free one
    api_key: str | None = field(default=None, repr=False)  # the key that every call must bring, None for no key
    insecure: bool = False  # whether to listen on other interfaces than the loopback without a key
    allow_hosts: tuple[str, ...] = ()  # further names accepted in the Host header while there is no key
    media: Path | None = None  # folder whose videos clients may name, None for uploads only
    sample: Path | None = None  # a video that the page offers, None for none; its query is in the .txt beside it
    live: Mapping[str, str] = field(default_factory=dict, repr=False)  # sources that clients may watch, by name
    max_upload_bytes: int = 256 * MB  # of one file
    max_storage_bytes: int = 4096 * MB  # of all uploads together
    max_videos: int = 512  # uploads
    max_duration_s: float = 14400.0  # of one video
    max_pixels: int = 4096 * 2304  # of one frame
    decode_bytes: int = 2048 * MB  # memory of a subprocess that reads a file
    max_queue: int = 64  # jobs in the queue
    max_seconds: float = 300.0  # of one job, waiting included
    max_queries: int = 16  # of one job
    max_query_chars: int = 500
    keep_s: float = 3600.0  # time after their last use in which uploads, jobs and results are kept
    workers: int = 2  # videos that are processed at the same time
    open_videos: int = 8  # videos whose prefix is kept for the next query
    open_bytes: int = 1024 * MB  # memory of these videos
    upload_s: float = 300.0  # time for one upload
    idle_s: float = 30.0  # time without data in an upload
    drain_s: float = 10.0  # time that running jobs get at shutdown
    max_connections: int = 256  # requests at the same time, streams included

    def __post_init__(self) -> None:
        if self.api_key is not None and (len(self.api_key) < LEAST_KEY or not self.api_key.isascii()):
            message = (
                f"the API key has {len(self.api_key)} characters; expected {LEAST_KEY} or more, ASCII: make one with "
                "`python -c 'import secrets; print(secrets.token_urlsafe(32))'`"
            )
            raise BridgeError("server.weak_key", message)
        if not is_loopback(self.host) and self.api_key is None and not self.insecure:
            message = (
                f"--host {self.host} can be reached from other machines and no API key is set: pass --api-key-env "
                "NAME, or --insecure if everyone who reaches this port may use it"
            )
            raise BridgeError("server.no_key", message)
        if self.media is not None and not self.media.is_dir():
            raise BridgeError("server.no_media_folder", f"--media {self.media}: expected a folder of videos")
        for name in self.live:
            if not LIVE_NAME.fullmatch(name):
                message = f"--live {name!r}: expected a name of letters, digits, - and _, as in gate=rtsp://camera/1"
                raise BridgeError("server.bad_source_name", message)

    @property
    def media_limits(self) -> MediaLimits:
        """The limits of one file."""
        return MediaLimits(self.max_duration_s, self.max_frames, self.max_pixels, self.decode_bytes)

    @property
    def max_frames(self) -> int:
        """Frames of one video."""
        return max(1, int(self.max_duration_s * MOST_FRAMES_PER_SECOND))

    @property
    def known_hosts(self) -> frozenset[str]:
        """The names accepted in the Host header; see `http.security`."""
        return frozenset({"localhost", "127.0.0.1", "[::1]", self.host.lower(), *map(str.lower, self.allow_hosts)})


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
