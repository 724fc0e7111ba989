"""Parse JSON and YAML files of users. Every fault is a ValueError with its cause, to which callers add the file's name.

Knows nothing of the meaning of the values.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, TypeGuard

MOST_BYTES = 32 * 2**20
"""Maximum size of a file of settings or metadata; only annotations and results may be larger."""
MOST_YAML_BYTES = 2**20
MOST_LEVELS = 64
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_LONG_INTEGER = re.compile(r"\d{4301}")  # Python's own limit, whose message does not name the line


def parse_json_file(path: str | os.PathLike[str]) -> Any:
    """Return the value in a JSON file. Raises OSError; ValueError beyond `MOST_BYTES`, or as `parse_json` does."""
    return parse_json(_read(path, MOST_BYTES))


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Return the value of JSON text; bytes are UTF-8, with or without a byte order mark.

    Raises:
        ValueError: the text is not JSON or not UTF-8, repeats a name in an object, has more than `MOST_LEVELS` levels
            or an unpaired surrogate, or, if `finite` is set, NaN or an infinity as a value in an object.
    """
    text = _decode(text)
    try:
        values = json.loads(text, object_pairs_hook=functools.partial(_object, finite=finite))
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if not (found := _LONG_INTEGER.search(text)):
            raise
        line = text.count("\n", 0, found.start()) + 1
        raise ValueError(f"line {line}: an integer has more than 4,300 digits") from error
    if "\\ud" in text or "\\uD" in text:
        json.dumps(values, ensure_ascii=False).encode()
    level = [values]
    for _ in range(MOST_LEVELS + 1):
        level = [value for value in level if isinstance(value, (dict, list))]
        if not level:
            return values
        level = [part for value in level for part in (value.values() if isinstance(value, dict) else value)]
    raise _too_deep()


def parse_yaml_file(path: str | os.PathLike[str]) -> Any:
    """Return the value in a YAML file of at most `MOST_YAML_BYTES`, with YAML's plain types only.

    Raises:
        ValueError: the file is too large, not YAML or not UTF-8, repeats a key, has aliases, a NUL or an unpaired
            surrogate, or is nested too deeply.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc] # pyyaml has no types
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"line {self.peek_event().start_mark.line + 1}: aliases are not supported")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            if repeated := _repeated(str(key.value) for key, _ in node.value):
                raise ValueError(f"line {node.start_mark.line + 1}: {repeated!r} occurs twice")
            return super().construct_mapping(node, deep)

        def construct_scalar(self, node: Any) -> Any:
            if _NO_TEXT.search(node.value if isinstance(node.value, str) else ""):
                raise ValueError(f"line {node.start_mark.line + 1}: {node.value!r:.60} has a NUL or a lone surrogate")
            return super().construct_scalar(node)

    try:
        return yaml.load(_decode(_read(path, MOST_YAML_BYTES)), Loader)
    except RecursionError:
        raise _too_deep() from None
    except (yaml.YAMLError, AttributeError, TypeError, OverflowError) as error:  # also for invalid values
        raise ValueError(" ".join(str(error).split())) from error


def _read(path: str | os.PathLike[str], most: int) -> bytes:
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most // 2**20} MiB")
    return data


def _decode(text: str | bytes) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: it is not UTF-8 text (byte {error.start})") from error


def _object(pairs: list[tuple[str, Any]], *, finite: bool) -> dict[str, Any]:
    """Return an object as a dictionary. Raises ValueError for repeated names and, if `finite`, NaN or infinities."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"{_repeated(name for name, _ in pairs)!r} occurs twice in an object")
    for name, value in pairs:
        if finite and isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name!r} is {value}, which is not a JSON number")
    return values


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {MOST_LEVELS} levels deep")


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number that a float can hold, and no boolean."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # of an integer
        return False


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether a value is a whole number of 1 or more, and no boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
