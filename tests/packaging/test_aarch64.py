"""`make aarch64-test` where it cannot run, and how it compares the answers of two machines."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.packaging.aarch64 import differences


def test_missing_programs_are_named_and_nothing_is_made(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.packaging.aarch64", "--folder", str(tmp_path / "made")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode == 2 and "apt-get install" in done.stderr and "debootstrap" in done.stderr
    assert not (tmp_path / "made").exists()


ANSWER: dict[str, Any] = {
    "bundle": {"name": "demo", "fingerprint": "b6"},
    "results": [
        {
            "answer": "<2 seconds> to <3 seconds>", "span": {"start_s": 2.0}, "named_span": {"start_s": 2.0},
            "tokens": {"coarse": 270}, "coarse": {"fps": 2.0}, "size": {"width": 480},
            "tube": [{"time_s": 2.0, "box": [10.0, 10.0, 110.0, 110.0]}, {"time_s": 2.5, "box": [0.0, 0.0, 9.0, 9.0]}],
        }
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda document: None, []),
        (lambda document: document["results"][0]["tube"][0]["box"].__setitem__(0, 10.05), []),
        (lambda document: document["results"][0]["tube"][0]["box"].__setitem__(0, 11.0), ["boxes"]),
        (lambda document: document["results"][0]["tube"].pop(), ["times"]),
        (lambda document: document["results"][0]["tokens"].update(coarse=271), ["tokens"]),
        (lambda document: document["bundle"].update(fingerprint="c7"), ["bundle"]),
    ],
)
def test_what_counts_as_a_difference(change: Any, differs: list[str]) -> None:
    other = copy.deepcopy(ANSWER)
    change(other)
    found, _ = differences(other, ANSWER)
    assert [words.split()[0] for words in found] == differs
