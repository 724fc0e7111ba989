"""Files that appear whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bridge_stg.runtime.host.files import (
    LineFile,
    lock_file,
    replace_folder,
    replacing,
    require_space,
    temporary_sibling,
)
from tests.errors import raises

ROOT = Path(__file__).resolve().parents[3]


def test_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    out.write_text("old")
    with replacing(out) as temporary:
        assert temporary.name == "result.json" and temporary.is_relative_to(tmp_path)
        temporary.write_text("new")
        assert out.read_text() == "old"
    assert out.read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_the_longest_name_that_a_file_can_have(tmp_path: Path) -> None:
    out = tmp_path / f"{'é' * 125}.json"  # 255 bytes
    with replacing(out) as temporary:
        temporary.write_text("new")
    assert out.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_block_that_fails(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), replacing(tmp_path / "result.json") as temporary:
        temporary.write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, pathlib, signal, sys
from bridge_stg.runtime.host.files import replace_folder, temporary_sibling
with temporary_sibling(pathlib.Path(sys.argv[1])) as temporary:
    temporary.mkdir()
    (temporary / "half").touch()
    if sys.argv[2] == "replacing":
        os.rename, rename = lambda *names: (rename(*names), os.kill(os.getpid(), signal.SIGKILL)), os.rename
        replace_folder(temporary, pathlib.Path(sys.argv[1]))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["building", "replacing"])
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, moment: str) -> None:
    pytest.importorskip("fcntl", reason="this system has no such locks")
    out = tmp_path / "[bundle]"
    out.mkdir()
    (out / "old").touch()
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), moment], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.glob(".*.partial"))) == 1
    assert out.exists() == (moment == "building")
    with temporary_sibling(out) as temporary:
        assert [path.name for path in out.iterdir()] == ["old"]  # moved back, if it was moved away
        temporary.mkdir()
        replace_folder(temporary, out)
    assert list(tmp_path.iterdir()) == [out] and not list(out.iterdir())


def test_folders_of_running_processes_and_of_others_stay(tmp_path: Path) -> None:
    others = [tmp_path / ".out.partial", tmp_path / ".out.01234567.partial", tmp_path / ".output.01234567.partial"]
    for folder in others:
        folder.mkdir()
    with temporary_sibling(tmp_path / "out") as first, temporary_sibling(tmp_path / "out") as second:
        first.write_text("1")
        second.write_text("2")
        assert first.read_text() == "1"
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_system_errors_name_the_output(tmp_path: Path) -> None:
    for raised in (OSError(28, "full"), OSError(5, "failed", None)):
        with pytest.raises(OSError) as caught, replacing(tmp_path / "result.json"):
            raise raised
        assert caught.value.filename == str(tmp_path / "result.json")
    for other in (OSError(5, "failed", "an input"), OSError("only a text")):
        text = str(other)
        with pytest.raises(OSError) as caught, replacing(tmp_path / "result.json"):
            raise other
        assert str(caught.value) == text


def test_a_full_disk_is_detected(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there", 1, purpose="nothing")
    with raises("output.disk_full", tmp_path, "1000000000.0 GB"):
        require_space(tmp_path / "out", 10**18, purpose="everything")


def test_a_folder_is_rejected(tmp_path: Path) -> None:
    with raises("output.is_folder", tmp_path), replacing(tmp_path):
        pass
    with raises("output.no_folder", tmp_path / "nowhere"), replacing(tmp_path / "nowhere" / "file"):
        pass


def test_a_locked_file_is_rejected_until_it_is_closed(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="this system has no such locks")
    path = tmp_path / "held"
    with path.open("w") as first, path.open("r+") as second:
        lock_file(first.fileno(), message="first")
        with raises("output.in_use", "second"):
            lock_file(second.fileno(), message="second")
        first.close()
        lock_file(second.fileno(), message="second")


def test_a_file_of_lines_is_removed_again_if_an_error_comes_before_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(ValueError), LineFile(path, in_use="in use") as file:
        file.read({"header": 1})
        raise ValueError
    assert not path.exists()
    with LineFile(path, in_use="in use") as file:
        file.read({"header": 1})
    with pytest.raises(ValueError), LineFile(path, in_use="in use"):
        raise ValueError
    assert path.read_text() == '{"header": 1}\n'
