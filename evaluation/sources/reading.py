"""The limits within which sources that are no local files are read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """How sources that are no local files are read.

    Attributes:
        seconds: length that is read of a camera or live stream.
        max_bytes: maximum size of a download and of standard input.
        stall_s: longest silence of a server, camera or stream, in seconds.
    """

    seconds: float = 10.0
    max_bytes: int = 4096 * 10**6
    stall_s: float = 10.0
