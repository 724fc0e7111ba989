"""The converter reads refs written by any protocol, and runs nothing, whatever the file holds."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from bridge_stg.evaluation.datasets.refcoco import convert_refs
from tests.errors import raises
from tests.evaluation.official import refs, refs_pickle

# What Python 2's cPickle wrote: byte strings, memo by number; protocol 0 in text, protocol 2 in binary.
PYTHON_2 = {
    0: b"(lp1\n(dp2\nS'ann_id'\np3\nI1719310\nsS'area'\nF1.5\nsS'sentences'\np4\n(lp5\n(dp6\nS'sent'\np7\n"
    b"S'caf\\xc3\\xa9'\np8\nsS'raw'\nVCAF\\u00c9\np9\nsasS'sent_ids'\n(lp10\nI0\naL7L\nas"
    b"S'box'\n(I1\nI2\ntsS'again'\ng8\nsS'iscrowd'\nI00\nsS'none'\nNsa.",
    2: b"\x80\x02]q\x01}q\x02(U\x06ann_idq\x03J\x0e<\x1a\x00U\x04areaG?\xf8\x00\x00\x00\x00\x00\x00"
    b"U\tsentencesq\x04]q\x05}q\x06(U\x04sentq\x07U\x05caf\xc3\xa9q\x08U\x03rawX\x05\x00\x00\x00CAF\xc3\x89uaU\x08sent_ids]q\x0a(K\x00K\x07e"
    b"U\x03boxK\x01K\x02\x86U\x05againh\x08U\x07iscrowd\x89U\x04noneNua.",
}
WRITTEN = [
    {"ann_id": 1719310, "area": 1.5, "sentences": [{"sent": "café", "raw": "CAFÉ"}], "sent_ids": [0, 7],
     "box": [1, 2], "again": "café", "iscrowd": False, "none": None}
]  # fmt: skip


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(tmp_path: Path, protocol: int) -> None:
    path = refs_pickle(tmp_path / "refs(unc).p", protocol=protocol)
    assert convert_refs(path, tmp_path / "refs(unc).json") == 2
    assert json.loads((tmp_path / "refs(unc).json").read_text(encoding="utf-8")) == refs()


@pytest.mark.parametrize("protocol", PYTHON_2)
def test_files_of_python_2(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(PYTHON_2[protocol])
    assert convert_refs(path, tmp_path / "refs.json") == 1
    assert json.loads((tmp_path / "refs.json").read_text(encoding="utf-8")) == WRITTEN


def test_texts_that_are_not_utf_8_are_latin_1(tmp_path: Path) -> None:
    (tmp_path / "refs.p").write_bytes(PYTHON_2[2].replace(b"caf\xc3\xa9", b"caf\xe9s"))
    convert_refs(tmp_path / "refs.p", tmp_path / "refs.json")
    (ref,) = json.loads((tmp_path / "refs.json").read_text(encoding="utf-8"))
    assert ref["sentences"][0]["sent"] == "cafés"


class Harmful:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_executed(tmp_path: Path, protocol: int) -> None:
    path, target = tmp_path / "refs.p", tmp_path / "made"
    path.write_bytes(pickle.dumps([{"sentences": [Harmful(target)]}], protocol=protocol))
    with raises("annotation.unsafe_pickle", path, "mkdir"):
        convert_refs(path, tmp_path / "refs.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["refs.p"]


def refs_of(value: Any) -> bytes:
    return pickle.dumps([{"sentences": value}])


def nested() -> list[Any]:
    """Return a small object that is huge as JSON."""
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]
    return value


def circle() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (refs_of(nested()), "annotation.unsafe_pickle"),
        (refs_of(circle()), "annotation.unsafe_pickle"),
        (refs_of(b"bytes"), "annotation.unsafe_pickle"),
        (refs_of({1, 2}), "annotation.unsafe_pickle"),
        (b"", "annotation.unsafe_pickle"),
        (pickle.dumps(refs())[:-20], "annotation.unsafe_pickle"),
        (b"\x80\x02U", "annotation.unsafe_pickle"),
        (b"just text\n", "annotation.unsafe_pickle"),
        (b"\x80\x02h\x05.", "annotation.unsafe_pickle"),  # a value that was never stored
        (b"\x80\x02a.", "annotation.unsafe_pickle"),  # the stack is empty
        (b"\x80\x02]R.", "annotation.unsafe_pickle"),  # a call without a function
        (b"\x80\x02]}U\x01aK\x01sb.", "annotation.unsafe_pickle"),  # the state of a list
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x00.", "annotation.unsafe_pickle"),  # 2**56 bytes
        (b"\x80\x02\x82\x01.", "annotation.unsafe_pickle"),  # an entry of copyreg's table
        (pickle.dumps({"refs": []}), "annotation.bad_file"),
        (pickle.dumps([1, 2]), "annotation.bad_file"),
    ],
)
def test_files_that_are_not_a_pickle_of_refs(tmp_path: Path, data: bytes, code: str) -> None:
    path, out = tmp_path / "refs.p", tmp_path / "refs.json"
    path.write_bytes(data)
    with raises(code, path):
        convert_refs(path, out)
    assert not out.exists()


def test_a_large_index_of_the_memo_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "refs.p").write_bytes(b"\x80\x02]r\xff\xff\xff\xff.")
    assert convert_refs(tmp_path / "refs.p", tmp_path / "refs.json") == 0


def test_a_pickle_that_does_not_exist(tmp_path: Path) -> None:
    with raises("annotation.not_found", tmp_path / "refs.p"):
        convert_refs(tmp_path / "refs.p", tmp_path / "refs.json")
