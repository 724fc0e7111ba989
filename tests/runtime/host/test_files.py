"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.files import hold, replacing


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


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="is a folder"), replacing(tmp_path):
        pass
    with pytest.raises(BridgeError, match="does not exist"), replacing(tmp_path / "nowhere" / "file"):
        pass


def test_a_held_file_is_refused_until_it_is_closed(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="this system has no such locks")
    path = tmp_path / "held"
    with path.open("w") as first, path.open("r+") as second:
        hold(first.fileno(), otherwise="first")
        with pytest.raises(BridgeError, match="second is told"):
            hold(second.fileno(), otherwise="second is told")
        first.close()
        hold(second.fileno(), otherwise="second")
