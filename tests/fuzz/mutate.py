"""Seeded damage of files: bits, cut ends, moved pieces, wrong lengths, and other values in text formats."""

from __future__ import annotations

import re
import struct

import numpy as np

TEXT = (".json", ".jsonl", ".yaml", ".csv", ".txt", ".form")
NUMBERS = (
    b"0", b"-1", b"1", b"2", b"0.5", b"1e308", b"1e999", b"NaN", b"-Infinity", b"1000000000", b"9223372036854775808",
    b"1" * 5000, b'"x"', b'""', b"null", b"[]", b"{}", b"true", b"[1, 2]", b'"\\ud800"', b'"\\u0000"', b'"../x"',
)  # fmt: skip
LENGTHS = (0, 1, 7, 8, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
FOURCC = re.compile(rb"[a-zA-Z]{3}[a-zA-Z0-9 ]|IHDR|fcTL|acTL|VP8X|ANMF|\x21\xf9\x04")
VALUE = re.compile(rb'-?\d+(?:\.\d+)?(?:e-?\d+)?|"(?:[^"\\\n]|\\.)*"|true|false|null')


def mutate(data: bytes, random: np.random.Generator, suffix: str) -> bytes:
    """Return damaged content of a file with this suffix."""
    for _ in range(random.integers(1, 4)):
        text = suffix in TEXT and random.random() < 0.75
        changes = (
            (_value, _value, _value, _drop_line, _nest) if text else (_bits, _cut, _splice, _length, _length, _fill)
        )
        data = changes[random.integers(len(changes))](data, random) or data
    return data


def _at(data: bytes, random: np.random.Generator) -> int:
    return int(random.integers(len(data))) if data else 0


def _bits(data: bytes, random: np.random.Generator) -> bytes:
    found = bytearray(data)
    for place in random.integers(0, max(len(data), 1), random.integers(1, 20)):
        found[place : place + 1] = bytes([random.integers(256)])
    return bytes(found)


def _cut(data: bytes, random: np.random.Generator) -> bytes:
    return data[: _at(data, random)]


def _splice(data: bytes, random: np.random.Generator) -> bytes:
    start, place, count = _at(data, random), _at(data, random), int(random.integers(1, 200))
    return data[:place] + data[start : start + count] + data[place + int(random.integers(2)) * count :]


def _fill(data: bytes, random: np.random.Generator) -> bytes:
    place, count = _at(data, random), int(random.integers(1, 500))
    return data[:place] + bytes([random.choice([0, 255, 65])]) * count + data[place + count :]


def _length(data: bytes, random: np.random.Generator) -> bytes:
    """Change a number of 4 or 2 bytes, mostly close to a box's or chunk's name."""
    names = [match.start() for match in FOURCC.finditer(data)]
    place = int(names[random.integers(len(names))] + 4 * random.integers(-1, 8)) if names else _at(data, random)
    form = ("<" if random.random() < 0.3 else ">") + ("I" if random.random() < 0.8 else "H")
    number = int(LENGTHS[random.integers(len(LENGTHS))]) if random.random() < 0.7 else int(random.integers(2**32))
    packed = struct.pack(form, number & (0xFFFFFFFF if form[1] == "I" else 0xFFFF))
    place = max(place, 0)
    return data[:place] + packed + data[place + len(packed) :]


def _value(data: bytes, random: np.random.Generator) -> bytes:
    """Replace a number, text or constant."""
    found = list(VALUE.finditer(data))
    if not found:
        return _bits(data, random)
    match = found[random.integers(len(found))]
    return data[: match.start()] + NUMBERS[random.integers(len(NUMBERS))] + data[match.end() :]


def _drop_line(data: bytes, random: np.random.Generator) -> bytes:
    """Remove or repeat a line, or a part between commas."""
    separator = b"\n" if data.count(b"\n") > 3 and random.random() < 0.5 else b","
    parts = data.split(separator)
    place = int(random.integers(len(parts)))
    return separator.join(parts[:place] + parts[place : place + 1] * 2 * int(random.integers(2)) + parts[place + 1 :])


def _nest(data: bytes, random: np.random.Generator) -> bytes:
    depth = int(random.choice([100, 5000, 200_000]))
    place = _at(data, random) if random.random() < 0.5 else 0
    opening = [b"[", b'{"a":', b"- "][random.integers(3)]
    return data[:place] + opening * depth + data[place:]
