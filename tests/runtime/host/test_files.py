"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge_stg.runtime.host.files import lock_file, replacing
from tests.errors import raises


def test_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    out.write_text("old")
    with replacing(out) as temporary:
        assert temporary.suffix == ".json" and temporary.parent == tmp_path
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
