"""Reading a multipart/form-data body as it arrives: one file to a sink, the other fields to memory, both within limits.

Form parsers that come with frameworks write the file first and are asked about its size later.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from bridge_stg.server.http.errors import ApiError

MOST_FIELDS = 256
FIELD_BYTES = 16_384
PIECE_BYTES = 2**20
"""What is collected before it is written: so much a connection holds in memory."""

Write = Callable[[bytes], Awaitable[None]]


@dataclass
class Form:
    """What a body held: the file's name as the client says it, None without a file; and the fields in order."""

    filename: str | None = None
    fields: list[tuple[str, str]] = field(default_factory=list)

    def values(self, name: str) -> list[str]:
        """Return all values of a field."""
        return [value for key, value in self.fields if key == name]

    def value(self, name: str) -> str | None:
        """Return the last value of a field, None if it was not given."""
        return (self.values(name) or [None])[-1]  # type: ignore[list-item]


class _Parts:
    """Callbacks of the parser: sorts its bytes into the file and the fields."""

    def __init__(self) -> None:
        self.form = Form()
        self.file = bytearray()
        self.ended = False
        self._header, self._value, self._headers = b"", b"", {"": b""}
        self._name, self._is_file, self._data = "", False, bytearray()

    def on_part_begin(self) -> None:
        self._headers = {}

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._header.decode("latin-1").lower()] = self._value
        self._header, self._value = b"", b""

    def on_headers_finished(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(self._headers.get("content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._is_file, self._data = self._name == "file", bytearray()
        if self._is_file:
            if self.form.filename is not None:
                raise ApiError(400, "form", "The form holds two files; send one video a request.")
            self.form.filename = options.get(b"filename", b"").decode("utf-8", "replace")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.file += data[start:end]
            return
        self._data += data[start:end]
        if len(self._data) > FIELD_BYTES:
            raise ApiError(413, "field", f"The field {self._name[:40]!r} is longer than {FIELD_BYTES} bytes.")

    def on_part_end(self) -> None:
        if self._is_file:
            return
        if len(self.form.fields) >= MOST_FIELDS:
            raise ApiError(413, "field", f"The form has more than {MOST_FIELDS} fields.")
        try:
            self.form.fields.append((self._name, bytes(self._data).decode("utf-8")))
        except UnicodeDecodeError as error:
            raise ApiError(400, "form", f"The field {self._name[:40]!r} is not UTF-8.") from error

    def on_end(self) -> None:
        self.ended = True


async def read_form(
    chunks: AsyncIterator[bytes], content_type: str, write: Write, *, within_s: float, idle_s: float
) -> Form:
    """Read a body to its end, handing the bytes of the part `file` to `write`.

    Args:
        chunks: the body.
        content_type: of the request, with the boundary.
        write: takes the file in pieces; raises to stop.
        within_s, idle_s: seconds for all of it, and for the next chunk.

    Raises:
        ApiError: 400 or 415 if it is no form, 408 if it takes too long, 413 if a field is too long; what `write` raises.
    """
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ApiError(415, "content_type", "Send the video as multipart/form-data, in a field called `file`.")
    parts, loop = _Parts(), asyncio.get_running_loop()
    end = loop.time() + within_s
    callbacks: Any = {name: getattr(parts, name) for name in dir(parts) if name.startswith("on_")}
    try:
        parser = MultipartParser(options[b"boundary"], callbacks)
        iterator = chunks.__aiter__()
        while True:
            try:
                chunk = await asyncio.wait_for(iterator.__anext__(), min(idle_s, end - loop.time()))
            except StopAsyncIteration:
                break
            parser.write(chunk)
            if len(parts.file) >= PIECE_BYTES:
                piece, parts.file = bytes(parts.file), bytearray()
                await write(piece)
        parser.finalize()
    except FormParserError as error:
        raise ApiError(400, "form", "The body is not a well-formed multipart/form-data form.") from error
    except asyncio.TimeoutError as error:
        raise ApiError(
            408, "slow", f"The upload took too long: {within_s:g} s in all, {idle_s:g} s of silence."
        ) from error
    if not parts.ended:
        raise ApiError(400, "form", "The form ends early; send it again.")
    if parts.file:
        await write(bytes(parts.file))
    return parts.form
