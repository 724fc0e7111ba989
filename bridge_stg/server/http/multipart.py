"""Parse a multipart/form-data body as it arrives: the file goes to a callback in pieces, other fields to memory.

Knows nothing of where the file is stored. The form parsers of frameworks write the whole file before its size can be
checked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from bridge_stg.server.http.errors import ApiError
from bridge_stg.server.settings import Settings

MOST_FIELDS = 256
FIELD_BYTES = 16_384
PIECE_BYTES = 2**20  # bytes collected in memory before they are written


class Form:
    """A form with a file and fields of known names; its parser calls the methods `_on_…`, which separate them."""

    def __init__(self, known: Collection[str]) -> None:
        self._known = known
        self.filename: str | None = None  # None without a file
        self.fields: list[tuple[str, str]] = []
        self.file, self.ended = bytearray(), False
        self._header, self._value, self._disposition = b"", b"", b""
        self._name, self._data = "", bytearray()

    def values(self, name: str) -> list[str]:
        """Return all values of a field."""
        return [value for key, value in self.fields if key == name]

    def options(self, *, without: str) -> dict[str, Any]:
        """Return the value of each other field, numbers and booleans as in JSON. Raises ApiError if one is repeated."""
        names = [name for name, _ in self.fields if name != without]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ApiError(422, "server.invalid_request", f"The form has several fields {repeated!r}; expected one.")
        return {name: _plain(value) for name, value in self.fields if name != without}

    def parser(self, boundary: bytes) -> MultipartParser:
        """Return the parser that fills this form."""
        callbacks: Any = {name[1:]: getattr(self, name) for name in dir(self) if name.startswith("_on_")}
        return MultipartParser(boundary, callbacks)

    def _on_part_begin(self) -> None:
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name, self._data = options.get(b"name", b"").decode("utf-8", "replace"), bytearray()
        if self._name == "file":
            if self.filename is not None:
                raise ApiError(400, "server.bad_form", "The form has two files; send one video per request.")
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        elif self._name not in self._known:
            names = ", ".join(("file", *self._known))
            message = f"The form has a field {self._name[:40]!r}; expected {names}."
            raise ApiError(422, "server.invalid_request", message)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self.file += data[start:end]
            return
        self._data += data[start:end]
        if len(self._data) > FIELD_BYTES:
            message = f"The field {self._name[:40]!r} is longer than {FIELD_BYTES} bytes."
            raise ApiError(413, "server.field_too_large", message)

    def _on_part_end(self) -> None:
        if self._name == "file":
            return
        if len(self.fields) >= MOST_FIELDS:
            raise ApiError(413, "server.field_too_large", f"The form has more than {MOST_FIELDS} fields.")
        try:
            self.fields.append((self._name, self._data.decode("utf-8")))
        except UnicodeDecodeError as error:
            raise ApiError(400, "server.bad_form", f"The field {self._name[:40]!r} is not UTF-8.") from error

    def _on_end(self) -> None:
        self.ended = True


def _plain(text: str) -> str | float | bool:
    """Return the number or boolean that a text writes as JSON does, or else the text."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, (bool, int, float)) else text


async def read_form(
    request: Request, settings: Settings, write: Callable[[bytes], Awaitable[None]], *, fields: Collection[str]
) -> Form:
    """Parse a body to its end and pass the bytes of the part `file` to `write` in pieces.

    Raises ApiError, also if there is a field of another name than `file` and `fields`.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        message = "Send the video as multipart/form-data, in a field called `file`."
        raise ApiError(415, "server.unsupported_content_type", message)
    form, chunks, loop = Form(fields), request.stream(), asyncio.get_running_loop()
    within_s, idle_s = settings.upload_s, settings.idle_s
    end = loop.time() + within_s
    try:
        parser = form.parser(options[b"boundary"])
        while chunk := await asyncio.wait_for(anext(chunks, None), min(idle_s, end - loop.time())):
            parser.write(chunk)
            if len(form.file) >= PIECE_BYTES:
                piece, form.file = bytes(form.file), bytearray()
                await write(piece)
        parser.finalize()
    except FormParserError as error:
        raise ApiError(400, "server.bad_form", "The body is not a well-formed multipart/form-data form.") from error
    except asyncio.TimeoutError as error:
        message = f"The upload was too slow: at most {within_s:g} s in all, and {idle_s:g} s without data."
        raise ApiError(408, "server.slow_request", message) from error
    if not form.ended:
        raise ApiError(400, "server.bad_form", "The form ends early; send it again.")
    if form.file:
        await write(bytes(form.file))
    return form
