"""Read annotation files, and name every fault by file, line or place, and field. Knows nothing of the datasets."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge_stg.runtime.bundle.bundle import file_sha256
from bridge_stg.runtime.errors import AnnotationError
from bridge_stg.runtime.host.failures import host_error
from bridge_stg.runtime.host.parse import is_number, parse_json

BOX = "[x, y, width, height]"


def fault(where: object, what: str, *, code: str = "annotation.bad_file") -> AnnotationError:
    """Return the error for a file or place that is not as its publisher describes."""
    return AnnotationError(code, f"{where}: {what}. Fix it, or fetch the file again from its publisher.")


@dataclass(frozen=True)
class Record:
    """An object of an annotation file, and its place: `file:line`, or `file: [3].captions[0]`."""

    where: str
    values: Mapping[str, Any]

    def fault(self, field: str, expected: str) -> AnnotationError:
        """Return the error for a field that is missing or is not what is `expected`."""
        found = f"is {brief(self.values[field])}" if field in self.values else "is missing"
        return fault(self.where, f"the field {field!r} {found}; expected {expected}", code="annotation.bad_field")

    def text(self, field: str) -> str:
        """Return a string that is not blank."""
        value = self.values.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.fault(field, "a string")
        return value

    def number(self, field: str, *, above: float = -math.inf, least: float = -math.inf) -> float:
        """Return a finite number."""
        value = self.values.get(field)
        if not is_number(value) or value <= above or value < least:
            bound = f" above {above:g}" if above > -math.inf else f", at least {least:g}" if least > -math.inf else ""
            raise self.fault(field, f"a number{bound}")
        return float(value)

    def whole(self, field: str, *, least: int = 0) -> int:
        """Return a whole number; 5.0 counts as one."""
        value = self.values.get(field)
        if not is_number(value) or value != int(value) or value < least:
            raise self.fault(field, f"a whole number, at least {least}")
        return int(value)

    def name(self, field: str) -> str:
        """Return an identifier, which some files write as a number, others as a string."""
        value = self.values.get(field)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
            raise self.fault(field, "an identifier")
        return str(value)

    def numbers(self, field: str, count: int, what: str) -> tuple[float, ...]:
        """Return a list of `count` finite numbers; `what` describes them in the error."""
        value = self.values.get(field)
        if not isinstance(value, (list, tuple)) or len(value) != count or not all(map(is_number, value)):
            raise self.fault(field, what)
        return tuple(map(float, value))

    def size(self) -> tuple[int, int]:
        """Return the fields `width` and `height` in pixels."""
        return self.whole("width", least=1), self.whole("height", least=1)

    def items(self, field: str) -> Sequence[Any]:
        """Return a list."""
        value = self.values.get(field)
        if not isinstance(value, list):
            raise self.fault(field, "a list")
        return value

    def child(self, field: str) -> Record:
        """Return an object inside this one."""
        value = self.values.get(field)
        if not isinstance(value, dict):
            raise self.fault(field, "an object")
        return Record(join(self.where, field), value)

    def children(self, field: str) -> list[Record]:
        """Return the objects of a list inside this one."""
        return records(join(self.where, field), self.items(field))


def records(where: str, values: Iterable[Any]) -> list[Record]:
    """Return the objects of the list at `where`. Raises AnnotationError if one is not an object."""
    made = []
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise fault(f"{where}[{i}]", f"is {brief(value)}; expected an object")
        made.append(Record(f"{where}[{i}]", value))
    return made


def join(where: str, field: str) -> str:
    """Return the name of a field's place: `file: a.b`, `file:3: a`."""
    return f"{where}.{field}" if where.endswith(("]", "}")) or ": " in where else f"{where}: {field}"


def read_json_file(path: Path, kind: type, what: str) -> Any:
    """Return the JSON document in a file, of the `kind` list or dict; `what` describes it in the AnnotationError."""
    try:
        values = parse_json(read_text(path))
    except ValueError as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise fault(f"{path}{line}", f"is not JSON ({error})") from None
    if not isinstance(values, kind) or (kind is dict and not values):
        raise fault(path, f"is not {'a list' if kind is list else 'an object with fields'}; expected {what}")
    return values


def read_text(path: Path) -> str:
    """Return the text of a file, UTF-8 with or without a byte order mark. Raises AnnotationError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise fault(path, f"is not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in a list of names
        if (found := host_error(error)) is not None:
            raise found from None
        message = f"{str(path)[:300]}: {getattr(error, 'strerror', error)}; expected an annotation file. Give its path."
        raise AnnotationError("annotation.not_found", message) from None


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (`file:line`, text) for every line that is not blank; lines may end as on any system."""
    for number, line in enumerate(read_text(path).replace("\r\n", "\n").split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def json_lines(path: Path) -> Iterator[Record]:
    """Yield the object of every line that is not blank. Raises AnnotationError."""
    for where, line in numbered_lines(path):
        try:
            values = parse_json(line)
        except ValueError as error:
            what = f"is not JSON ({error}); expected one object per line"
            raise fault(where, what, code="annotation.bad_line") from None
        if not isinstance(values, dict):
            what = "is not an object; expected one like {'video': …, 'query': …}"
            raise fault(where, what, code="annotation.bad_line")
        yield Record(where, values)


def parse_number(where: str, text: str, name: str = "the value") -> float:
    """Return the finite number in a part of a line. Raises AnnotationError."""
    with suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise fault(where, f"{name} {text.strip()!r} is not a finite number", code="annotation.bad_line")


def digest(*parts: Path | str) -> str:
    """Return a SHA-256 over files (their bytes) and strings, in this order."""
    whole = hashlib.sha256()
    for part in parts:
        one = hashlib.sha256(part.encode()).hexdigest() if isinstance(part, str) else file_sha256(part)
        whole.update(bytes.fromhex(one))
    return whole.hexdigest()


def brief(value: Any) -> str:
    """Return a value as JSON, cut to a length that fits into a message."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}…"
