"""Parse a multipart/form-data body as it arrives: the file goes to a callback in pieces, other fields to memory.

Knows nothing of where the file is stored. The form parsers of frameworks write the whole file before its size can be
checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from bridge_stg.server.http.errors import ApiError
from bridge_stg.server.settings import Settings

MOST_FIELDS = 256
FIELD_BYTES = 16_384
PIECE_BYTES = 2**20
"""Bytes collected in memory before they are written."""

Write = Callable[[bytes], Awaitable[None]]


@dataclass
class Form:
    """A parsed form."""

    filename: str | None = None  # None without a file
    fields: list[tuple[str, str]] = field(default_factory=list)

    def values(self, name: str) -> list[str]:
        """Return all values of a field."""
        return [value for key, value in self.fields if key == name]


class _Parts:
    """The callbacks of the parser: they separate the file from the fields."""

    def __init__(self) -> None:
        self.form, self.file, self.ended = Form(), bytearray(), False
        self._header, self._value, self._disposition = b"", b"", b""
        self._name, self._data = "", bytearray()

    def on_part_begin(self) -> None:
        self._disposition = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name, self._data = options.get(b"name", b"").decode("utf-8", "replace"), bytearray()
        if self._name == "file":
            if self.form.filename is not None:
                raise ApiError(400, "server.bad_form", "The form has two files; send one video per request.")
            self.form.filename = options.get(b"filename", b"").decode("utf-8", "replace")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self.file += data[start:end]
            return
        self._data += data[start:end]
        if len(self._data) > FIELD_BYTES:
            raise _field_error(f"The field {self._name[:40]!r} is longer than {FIELD_BYTES} bytes.")

    def on_part_end(self) -> None:
        if self._name == "file":
            return
        if len(self.form.fields) >= MOST_FIELDS:
            raise _field_error(f"The form has more than {MOST_FIELDS} fields.")
        try:
            self.form.fields.append((self._name, self._data.decode("utf-8")))
        except UnicodeDecodeError as error:
            raise ApiError(400, "server.bad_form", f"The field {self._name[:40]!r} is not UTF-8.") from error

    def on_end(self) -> None:
        self.ended = True


def _field_error(message: str) -> ApiError:
    return ApiError(413, "server.field_too_large", message)


async def read_form(request: Request, settings: Settings, write: Write) -> Form:
    """Parse a body to its end and pass the bytes of the part `file` to `write` in pieces.

    Raises:
        ApiError: 400 or 415 if the body is not a form, 408 if it is too slow, 413 if a field is too long; and whatever
            `write` raises.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        message = "Send the video as multipart/form-data, in a field called `file`."
        raise ApiError(415, "server.unsupported_content_type", message)
    parts, chunks, loop = _Parts(), request.stream(), asyncio.get_running_loop()
    within_s, idle_s = settings.upload_s, settings.idle_s
    end = loop.time() + within_s
    callbacks: Any = {name: getattr(parts, name) for name in dir(parts) if name.startswith("on_")}
    try:
        parser = MultipartParser(options[b"boundary"], callbacks)
        while chunk := await asyncio.wait_for(anext(chunks, None), min(idle_s, end - loop.time())):
            parser.write(chunk)
            if len(parts.file) >= PIECE_BYTES:
                piece, parts.file = bytes(parts.file), bytearray()
                await write(piece)
        parser.finalize()
    except FormParserError as error:
        raise ApiError(400, "server.bad_form", "The body is not a well-formed multipart/form-data form.") from error
    except asyncio.TimeoutError as error:
        message = f"The upload was too slow: at most {within_s:g} s in all, and {idle_s:g} s without data."
        raise ApiError(408, "server.slow_request", message) from error
    if not parts.ended:
        raise ApiError(400, "server.bad_form", "The form ends early; send it again.")
    if parts.file:
        await write(bytes(parts.file))
    return parts.form
