"""JSON and YAML of users: what is accepted, and every fault as one ValueError with its place."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from bridge_stg.runtime.host import parse

GOOD = [
    (b'{"a": [1, 2.5, null, true, "x"]}', {"a": [1, 2.5, None, True, "x"]}),
    ("\ufeff{}".encode(), {}),
    (b'"\\ud83d\\ude00"', "\U0001f600"),
    (b"[" * 64 + b"]" * 64, None),
]
BAD = [
    (b"{", "line 1"),
    (b'{\n"a": }', "line 2"),
    (b"[" * 65 + b"]" * 65, "64 levels"),
    (b"[" * 100_000, "64 levels"),
    (b'{"a":' * 900 + b"1" + b"}" * 900, "64 levels"),
    (b'{"a": 1,\n"n": ' + b"7" * 5000 + b"}", "line 2"),
    (b'{"a": NaN}', "'a'"),
    (b'{"rate": -Infinity}', "'rate'"),
    (b'{"rate": 1e999}', "'rate'"),
    (b'{"a": 1, "b": 2, "a": 3}', "'a'"),
    (b'{"a": "\\ud800"}', "surrogate"),
    (b'{\n"a": "\xff"}', "line 2"),
    ("{}".encode("utf-16"), "UTF-8"),
    (b"\x80\x04K\x01.", "UTF-8"),
    (b"", "line 1"),
]


@pytest.mark.parametrize(("text", "value"), GOOD)
def test_json_is_read(text: bytes, value: object, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text)
    found = parse.parse_json_file(tmp_path / "a.json")
    assert value is None or found == value


@pytest.mark.parametrize(("text", "named"), BAD)
def test_every_fault_of_json_is_a_value_error(text: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=named):
        parse.parse_json_file(tmp_path / "a.json")


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path) -> None:
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(2**40)
    for read in (parse.parse_json_file, parse.parse_yaml_file):
        with pytest.raises(ValueError, match="MiB"):
            read(tmp_path / "a.json")


def test_a_repeated_name_among_many_is_found_at_once() -> None:
    text = "{" + ",".join(f'"{i % 99_999}": 1' for i in range(100_000)) + "}"
    with pytest.raises(ValueError, match="'0'"):
        parse.parse_json(text)


def test_yaml_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("capacity: 64\nlist: [1, a]\nnested: {a: 0.5}\n")
    assert parse.parse_yaml_file(tmp_path / "a.yaml") == {"capacity": 64, "list": [1, "a"], "nested": {"a": 0.5}}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: [1", "line 1"),
        ("a: &x [1]\nb: [*x, *x]", "line 2"),
        ("a: 1\nb: 2\na: 3", "'a'"),
        ("[" * 20_000, "64 levels"),
        ("a: 2001-99-99", "month"),
        ("a: !!python/object/apply:os.system [true]", "python"),
        ("a: \x00", "unacceptable|not allowed"),
        ("? [a, b]\n: 1", "unhashable"),
    ],
)
def test_every_fault_of_yaml_is_a_value_error(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=named):
        parse.parse_yaml_file(tmp_path / "a.yaml")


def test_numbers_and_counts() -> None:
    numbers = (-1.5, 0, 1, 10**300, np.float32(2), np.int64(3))
    others = (math.nan, -math.inf, 10**400, True, np.True_, "1", None, 1j, [1])
    assert [value for value in (*numbers, *others) if parse.is_number(value)] == list(numbers)
    assert [value for value in (*numbers, *others) if parse.is_count(value)] == [1, 10**300, 3, 10**400]
