"""The operator's settings of a server and their checks. Knows nothing of HTTP."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bridge_stg.runtime.errors import BridgeError

MIB = 2**20
LIVE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MOST_FRAMES_PER_SECOND = 240
LEAST_KEY = 16
"""Characters of an API key: a shorter one could be guessed."""


@dataclass(frozen=True)
class Settings:
    """Limits and addresses of one server.

    Attributes:
        host, port: address to listen on; port 0 takes a free one.
        api_key: key that every call must bring, None for no key.
        insecure: whether to listen on other interfaces than the loopback without a key.
        allow_hosts: further names accepted in the Host header while there is no key.
        media: folder whose videos clients may name, None for uploads only.
        live: sources that clients may watch, by name.
        max_upload_bytes: bytes of one file.
        max_storage_bytes, max_videos: bytes and number of all uploads together.
        max_duration_s, max_pixels: seconds of one video, and pixels of one frame.
        max_queue: jobs in the queue.
        max_seconds: seconds of one job, waiting included.
        max_queries, max_query_chars: queries of one job, and characters of one query.
        keep_s: seconds for which an upload, a job and its results are kept after their last use.
        workers: videos that are processed at the same time.
        open_videos, open_bytes: number and memory of the videos whose prefix is kept for the next query.
        upload_s, idle_s: seconds of one upload, and seconds without data in it.
        drain_s: seconds that running jobs get at shutdown.
        max_connections: requests at the same time, streams included.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    insecure: bool = False
    allow_hosts: tuple[str, ...] = ()
    media: Path | None = None
    live: Mapping[str, str] = field(default_factory=dict, repr=False)
    max_upload_bytes: int = 256 * MIB
    max_storage_bytes: int = 4096 * MIB
    max_videos: int = 512
    max_duration_s: float = 600.0
    max_pixels: int = 4096 * 2304
    max_queue: int = 64
    max_seconds: float = 300.0
    max_queries: int = 16
    max_query_chars: int = 500
    keep_s: float = 3600.0
    workers: int = 2
    open_videos: int = 8
    open_bytes: int = 1024 * MIB
    upload_s: float = 300.0
    idle_s: float = 30.0
    drain_s: float = 10.0
    max_connections: int = 256

    def __post_init__(self) -> None:
        if self.api_key is not None and (len(self.api_key) < LEAST_KEY or not self.api_key.isascii()):
            message = (
                f"the API key has {len(self.api_key)} characters; expected {LEAST_KEY} or more, ASCII: make one with "
                "`python -c 'import secrets; print(secrets.token_urlsafe(32))'`"
            )
            raise BridgeError("server.weak_key", message)
        if not is_loopback(self.host) and self.api_key is None and not self.insecure:
            message = (
                f"--host {self.host} can be reached from other machines and no API key is set: give --api-key-env "
                "NAME, or --insecure if everyone who reaches this port may use it"
            )
            raise BridgeError("server.no_key", message)
        if self.media is not None and not self.media.is_dir():
            raise BridgeError("server.no_media_folder", f"--media {self.media}: expected a folder that holds videos")
        for name in self.live:
            if not LIVE_NAME.fullmatch(name):
                message = f"--live {name!r}: expected a name of letters, digits, - and _, as in gate=rtsp://camera/1"
                raise BridgeError("server.bad_source_name", message)

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
