"""What an operator chooses for a server, and whether it may be served so. Knows nothing of HTTP."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bridge_stg.runtime.errors import BridgeError

MIB = 2**20
LIVE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
LEAST_KEY = 16
"""Characters of an API key: fewer could be guessed."""


@dataclass(frozen=True)
class Settings:
    """Limits and addresses of one server.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        api_key: what every call must bring; None: no key is asked for.
        insecure: whether it may listen beyond this machine without a key.
        allow_hosts: further names that a request's Host header may have while no key is asked for.
        media: folder whose videos clients may name; None: they upload.
        live: the sources that clients may watch, by name.
        max_upload_bytes: of one file.
        max_storage_bytes, max_videos: of all uploads together.
        max_duration_s, max_pixels: of one video: seconds, and pixels of a frame.
        max_queue: jobs that may wait.
        max_seconds: what a job may take, its waiting included.
        max_queries, max_query_chars: of one job, and of one query.
        keep_s: how long an upload, a job and its results stay after they were last asked for.
        workers: jobs of different videos that are worked on at a time.
        open_videos, open_bytes: videos whose prefix is kept for the next query, and what they may hold in memory.
        upload_s, idle_s: what an upload may take, and how long it may be silent.
        drain_s: what running jobs may still take when the server is told to end.
        max_connections: requests at a time, streams included.
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
            raise BridgeError(
                f"the API key has {len(self.api_key)} characters; expected {LEAST_KEY} or more, ASCII: make one with "
                "`python -c 'import secrets; print(secrets.token_urlsafe(32))'`"
            )
        if not is_loopback(self.host) and self.api_key is None and not self.insecure:
            raise BridgeError(
                f"--host {self.host} can be reached from other machines and no API key is set: give --api-key-env "
                "NAME, or --insecure if whoever reaches this port may use it"
            )
        if self.media is not None and not self.media.is_dir():
            raise BridgeError(f"--media {self.media} is no folder; name one that holds videos")
        for name in self.live:
            if not LIVE_NAME.fullmatch(name):
                raise BridgeError(
                    f"--live {name!r}: expected a name of letters, digits, - and _, as in --live gate=rtsp://camera/1"
                )

    @property
    def known_hosts(self) -> frozenset[str]:
        """The names by which a browser on this machine reaches the server; see `security`."""
        return frozenset({"localhost", "127.0.0.1", "[::1]", self.host.lower(), *map(str.lower, self.allow_hosts)})


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
