"""Read annotation files: every fault is named by file, line or place, and field.

Knows nothing of benchmarks; they say what a field is called and what it must hold.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from bridge_stg.runtime.errors import AnnotationError

ADVICE = "Mend it, or fetch the file again from its publisher"


@dataclass(frozen=True)
class Record:
    """An object of an annotation file, and where it stands: `file:line`, or `file: [3].captions[0]`."""

    where: str
    values: Mapping[str, Any]

    def fault(self, field: str, expected: str) -> AnnotationError:
        """Return the error for a field that is missing or holds something else than `expected`."""
        found = f"is {brief(self.values[field])}" if field in self.values else "is missing"
        return AnnotationError(f"{self.where}: the field {field!r} {found}; expected {expected}. {ADVICE}.")

    def text(self, field: str) -> str:
        """Return a string that is not blank."""
        value = self.values.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.fault(field, "a text")
        return value

    def number(self, field: str, *, above: float = -math.inf, least: float = -math.inf) -> float:
        """Return a finite number."""
        value = self.values.get(field)
        if not is_number(value) or value <= above or value < least:
            bound = f" above {above:g}" if above > -math.inf else f", {least:g} or more" if least > -math.inf else ""
            raise self.fault(field, f"a number{bound}")
        return float(value)

    def whole(self, field: str, *, least: int = 0) -> int:
        """Return a whole number; 5.0 counts as one."""
        value = self.values.get(field)
        if not is_number(value) or value != int(value) or value < least:
            raise self.fault(field, f"a whole number, {least} or more")
        return int(value)

    def name(self, field: str) -> str:
        """Return an identifier, which some files write as a number and some as a text."""
        value = self.values.get(field)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
            raise self.fault(field, "an identifier")
        return str(value)

    def numbers(self, field: str, count: int, what: str) -> tuple[float, ...]:
        """Return a list of `count` finite numbers."""
        value = self.values.get(field)
        if not isinstance(value, (list, tuple)) or len(value) != count or not all(map(is_number, value)):
            raise self.fault(field, what)
        return tuple(map(float, value))

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
    """Return the objects of a list that stands at `where`."""
    made = []
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise AnnotationError(f"{where}[{i}] is {brief(value)}; expected an object. {ADVICE}.")
        made.append(Record(f"{where}[{i}]", value))
    return made


def join(where: str, field: str) -> str:
    """Return the name of a field's place: `file: a.b`, `file:3: a`."""
    return f"{where}.{field}" if where.endswith(("]", "}")) or ": " in where else f"{where}: {field}"


def read_json_file(path: Path) -> Any:
    """Return the JSON document in a file.

    Raises:
        AnnotationError: there is no such file, or it is no JSON; the message names the line.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}:{error.lineno}: is no JSON ({error.msg}). {ADVICE}.") from None
    except RecursionError:
        raise AnnotationError(f"{path}: is nested too deeply to be an annotation file. {ADVICE}.") from None


def read_text(path: Path) -> str:
    """Return the text of a file, UTF-8 with or without a byte order mark.

    Raises:
        AnnotationError: there is no such file, or it is no text.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise AnnotationError(f"{path}: no such file; expected an annotation file. Give its path.") from None
    except IsADirectoryError:
        raise AnnotationError(f"{path} is a folder; expected an annotation file. Name the file inside it.") from None
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path}: is no UTF-8 text (byte {error.start}). {ADVICE}.") from None


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (`file:line`, text) for every line that is not blank; lines may end as on any system."""
    for number, line in enumerate(read_text(path).replace("\r\n", "\n").split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def json_lines(path: Path) -> Iterator[Record]:
    """Yield the object of every line that is not blank. Raises AnnotationError."""
    for where, line in numbered_lines(path):
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise AnnotationError(f"{where}: is no JSON ({error}); expected one object a line. {ADVICE}.") from None
        if not isinstance(values, dict):
            raise AnnotationError(f"{where}: is no object; expected one like {{'video': …, 'query': …}}. {ADVICE}.")
        yield Record(where, values)


def digest(*parts: Path | str) -> str:
    """Return a SHA-256 over files (their bytes) and strings, in this order."""
    whole = hashlib.sha256()
    for part in parts:
        one = hashlib.sha256()
        if isinstance(part, str):
            one.update(part.encode())
        else:
            with open(part, "rb") as file:
                while block := file.read(2**20):
                    one.update(block)
        whole.update(one.digest())
    return whole.hexdigest()


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def brief(value: Any) -> str:
    """Return a value as JSON, cut to a length that fits into a message."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}…"
