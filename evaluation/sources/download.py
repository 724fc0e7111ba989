"""Fetch a file by http or https with urllib, with limits of size and silence, or copy it from standard input."""

from __future__ import annotations

import base64
import http.client
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.limits import Limits

MIB = 2**20
HANDLERS = (
    urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
    urllib.request.HTTPRedirectHandler, urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor,
    urllib.request.UnknownHandler,
)  # fmt: skip
"""What opens an address: a redirection to another protocol, such as ftp, is an error."""


@dataclass(frozen=True)
class Reading:
    """How sources that are no local files are read.

    Attributes:
        seconds: length that is read of a camera or live stream.
        max_bytes: maximum size of a download and of standard input.
        stall_s: longest silence of a server, camera or stream, in seconds.
    """

    seconds: float = 10.0
    max_bytes: int = 4096 * MIB
    stall_s: float = 10.0


def download(url: str, path: Path, *, name: str, reading: Reading, limits: Limits) -> None:
    """Write the file at an http or https address to `path`.

    Args:
        url: the address; a user name and a password in it are sent as basic authentication, to this host only.
        path: the file to write.
        name: the address for messages, without its password.
        reading: its `max_bytes`, and its `stall_s`, which limits the time to connect, too.
        limits: deadline and progress, in bytes, of the stage `download`.

    Raises:
        VideoError: the server cannot be reached, answers with an error, sends nothing for `stall_s` seconds, sends
            less than it announced or more than `max_bytes`, or sends a stream without an end.
        Interrupted: the deadline passed.
    """
    opener = urllib.request.OpenerDirector()
    for handler in HANDLERS:
        opener.add_handler(handler())
    try:
        with opener.open(_request(url), timeout=reading.stall_s) as answer:
            kind = answer.headers.get_content_type()
            if kind.startswith("multipart/"):
                text = f"{name} is a live stream ({kind}), not a file; use `watch` for it"
                raise VideoError("video.is_stream", text)
            length = answer.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
            done = copy(answer, path, name=name, max_bytes=reading.max_bytes, total=total, limits=limits)
        if total is not None and done < total:
            raise VideoError("video.download_failed", f"{name}: the server sent {done} of {total} bytes; try again")
    except urllib.error.HTTPError as error:
        text = f"{name}: the server answers {error.code} {error.reason}; check the address"
        raise VideoError("video.download_failed", text) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, OSError) and error.filename:  # of the file that is written, such as a full disk
            raise
        reason = getattr(error, "reason", error)
        text = f"{name} cannot be downloaded ({getattr(reason, 'strerror', None) or reason or type(error).__name__})"
        raise VideoError("video.download_failed", f"{text}; is the address right, and the server reachable?") from None


def copy(
    stream: IO[bytes] | Any, path: Path, *, name: str, max_bytes: int, total: int | None = None, limits: Limits
) -> int:
    """Write what can be read from a binary stream to `path`, and return the number of bytes; errors as `download`."""
    done = 0
    with limits.stage("download"), open(path, "wb") as file:
        while block := stream.read(MIB):
            done += len(block)
            if max(done, total or 0) > max_bytes:
                text = f"{name} has more than {max_bytes // MIB} MiB; a higher --max-download-mb allows more"
                raise VideoError("video.too_large", text)
            try:
                file.write(block)
            except OSError as error:
                error.filename = os.fspath(path)
                raise
            limits.report(done, total)
    return done


def _request(url: str) -> urllib.request.Request:
    from bridge_stg import __version__

    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    address = parts._replace(netloc=host, fragment="").geturl()
    request = urllib.request.Request(address, headers={"User-Agent": f"bridge-stg/{__version__}"})
    if user:
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request
