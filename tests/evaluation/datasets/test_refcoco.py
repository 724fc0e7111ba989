"""The converter reads refs written by any protocol, and runs nothing, whatever the file asks for."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from bridge_stg.evaluation.datasets.refcoco_pickle import convert_refs, read_plain_pickle
from bridge_stg.runtime.errors import AnnotationError
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
    assert pickle.loads(PYTHON_2[protocol], encoding="utf-8") is not None  # it is a pickle
    assert read_plain_pickle(path) == WRITTEN


class Harmful:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_executed(tmp_path: Path, protocol: int) -> None:
    path, target = tmp_path / "refs.p", tmp_path / "made"
    path.write_bytes(pickle.dumps([{"sentences": [Harmful(target)]}], protocol=protocol))
    with pytest.raises(AnnotationError, match="holds the opcode (GLOBAL|STACK_GLOBAL) at byte"):
        convert_refs(path, tmp_path / "refs.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["refs.p"]


def test_what_unfolds_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "refs.p"
    nested: list[Any] = []
    for _ in range(60):
        nested = [nested, nested]
    path.write_bytes(pickle.dumps(nested))
    with pytest.raises(AnnotationError, match="hold each other over and over"):
        read_plain_pickle(path)
    circle: list[Any] = []
    circle.append(circle)
    path.write_bytes(pickle.dumps(circle))
    with pytest.raises(AnnotationError, match="hold each other over and over"):
        read_plain_pickle(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no whole pickle"),
        (pickle.dumps(refs())[:-20], "is no whole pickle"),
        (b"\x80\x02U", "is no whole pickle"),
        (b"just text\n", "is no whole pickle|the opcode"),
        (b"\x80\x02h\x05.", "is no whole pickle"),
        (b"\x80\x02a.", "is no whole pickle"),
        (b"\x80\x02K\x01K\x02.", "2 values where one is expected"),
        (pickle.dumps({1: 2}, 2), "a dictionary's key that is a int"),
        (pickle.dumps({"refs": []}), "holds no list of refs"),
        (pickle.dumps([1, 2]), "holds no list of refs"),
    ],
)
def test_what_is_no_pickle_of_refs(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(data)
    with pytest.raises(AnnotationError, match=message):
        convert_refs(path, tmp_path / "refs.json")
    assert not (tmp_path / "refs.json").exists()
