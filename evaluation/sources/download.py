"""Fetch a file by http or https with urllib, with limits of size and silence, or copy it from standard input."""

from __future__ import annotations

import base64
import http.client
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from bridge_stg.evaluation.sources.reading import Reading
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.limits import Limits

_log = logging.getLogger(__name__)
MB, BLOCK_BYTES = 10**6, 2**20
TRIES, PAUSE_S = 5, 0.1  # connections in a row that may bring nothing new; half of the first pause between them
RANGE_NOT_SATISFIABLE = 416
HANDLERS = (
    urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
    urllib.request.HTTPRedirectHandler, urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor,
    urllib.request.UnknownHandler,
)  # fmt: skip
"""What opens an address: a redirection to another protocol, such as ftp, is an error."""


def download(url: str, path: Path, *, name: str, reading: Reading, limits: Limits) -> None:
    """Write the file at an http or https address to `path`.

    After an interruption, the rest is fetched in another connection, if the server says that the file is still the same
    one (RFC 9110, `If-Range`); otherwise the download begins again. `TRIES` connections may bring nothing new.

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
    most = failures = 0
    with limits.stage("download"), open(path, "wb") as file:
        part = _Part(file, name, reading.max_bytes, limits)
        while True:
            try:
                with opener.open(_request(url, part), timeout=reading.stall_s) as answer:
                    part.begin(answer)
                    part.append(answer.read1)
                    return
            except urllib.error.HTTPError as error:
                if not part.begun or (error.code < 500 and error.code != RANGE_NOT_SATISFIABLE):
                    text = f"{name}: the server answers {error.code} {error.reason}; check the address"
                    raise VideoError("video.download_failed", text) from None
                part.validator = part.validator if error.code >= 500 else None
                reason = f"{error.code} {error.reason}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(error, OSError) and error.filename:  # of the file that is written, such as a full disk
                    raise
                cause = getattr(error, "reason", error)
                reason = getattr(cause, "strerror", None) or str(cause) or type(error).__name__
                if not part.begun:
                    text = f"{name} cannot be downloaded ({reason}); is the address right, and the server reachable?"
                    raise VideoError("video.download_failed", text) from None
            failures = 1 if part.done > most else failures + 1
            most = max(most, part.done)
            if failures > TRIES:
                text = f"{name}: the server sent {most} of {part.total or 'unknown'} bytes ({reason}); try again"
                raise VideoError("video.download_failed", text)
            _log.info("%s: interrupted at byte %d (%s)", name, part.done, reason)
            end = limits.elapsed_s + PAUSE_S * 2**failures
            while limits.elapsed_s < end:
                limits.check()
                time.sleep(min(PAUSE_S, 0.1))


def copy(stream: IO[bytes], path: Path, *, name: str, max_bytes: int, limits: Limits) -> None:
    """Write what can be read from a binary stream to `path`; errors as `download`."""
    with limits.stage("download"), open(path, "wb") as file:
        _Part(file, name, max_bytes, limits).append(stream.read)


@dataclass
class _Part:
    """What has been received of a file."""

    file: IO[bytes]
    name: str
    max_bytes: int
    limits: Limits
    done: int = 0
    total: int | None = None
    validator: str | None = None
    """Value of `If-Range` that identifies the content; None: only the whole file can be requested."""
    begun: bool = False

    def begin(self, answer: http.client.HTTPResponse) -> None:
        """Read the headers of an answer with the whole file, or its rest. Raises ConnectionError for another part."""
        kind = answer.headers.get_content_type()
        if kind.startswith("multipart/"):
            text = f"{self.name} is a live stream ({kind}), not a file; use `watch` for it"
            raise VideoError("video.is_stream", text)
        if answer.status == http.client.PARTIAL_CONTENT:
            start = f"bytes {self.done}-"
            if not answer.headers.get("Content-Range", "").startswith(start):
                self.validator = None
                raise ConnectionError("the server sent another part of the file")
            return
        self.file.seek(0)
        self.file.truncate()
        length = answer.headers.get("Content-Length", "")
        self.done, self.total = 0, int(length) if length.isdecimal() else None
        self.validator, self.begun = _validator(answer.headers), True

    def append(self, read: Callable[[int], bytes]) -> None:
        """Write what `read` returns, up to the end. Raises ConnectionError if it ends early."""
        while self.done != self.total and (block := read(BLOCK_BYTES)):
            self.done += len(block)
            if max(self.done, self.total or 0) > self.max_bytes:
                text = f"{self.name} has more than {self.max_bytes // MB} MB; a higher --max-download-mb allows more"
                raise VideoError("video.too_large", text)
            try:
                self.file.write(block)
            except OSError as error:
                error.filename = os.fspath(self.file.name)
                raise
            self.limits.report(self.done, self.total)
        if self.total is not None and self.done < self.total:
            raise ConnectionError("the server closed the connection")


def _validator(headers: Message) -> str | None:
    """Return a strong validator of the content: the entity tag, or a date of change that is a minute old."""
    if (tag := headers.get("ETag", "")).startswith('"'):
        return str(tag)
    try:
        changed, now = (parsedate_to_datetime(headers[name]) for name in ("Last-Modified", "Date"))
        return str(headers["Last-Modified"]) if (now - changed).total_seconds() >= 60 else None
    except (TypeError, ValueError):
        return None


def _request(url: str, part: _Part) -> urllib.request.Request:
    from bridge_stg import __version__

    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    address = parts._replace(netloc=host, fragment="").geturl()
    request = urllib.request.Request(address, headers={"User-Agent": f"bridge-stg/{__version__}"})
    if user:
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    if part.done and part.validator is not None:
        request.add_header("Range", f"bytes={part.done}-")
        request.add_header("If-Range", part.validator)
    return request
