"""Decoded frames on disk: the same batches with and without them, read again where they are damaged."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from bridge_stg.runtime.errors import BridgeError
from bridge_stg.training.data import clips as clips_module
from bridge_stg.training.data.micro_batch import MicroBatch
from bridge_stg.training.recipe import Source
from tests.bridge_stg.training.data.conftest import Make
from tests.bridge_stg.training.data.test_clips import equal, made

AUGMENT = {"flip": 0.5, "colour": 0.5, "crop": 0.2, "scale": 0.2, "time": 0.2}


@pytest.fixture
def sources(published: dict[str, Source]) -> list[Source]:
    return [published[name] for name in ("vidstg", "got-10k", "refcoco", "jsonl")]


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which every opened medium is added from now on."""
    found, original = [], clips_module.open_clip

    def count(clip: Any, *args: Any, **options: Any) -> Any:
        found.append(clip.name)
        return original(clip, *args, **options)

    monkeypatch.setattr(clips_module, "open_clip", count)
    return found


def test_batches_are_equal_with_and_without_a_cache(
    make: Make, sources: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, cached = make(*sources, augment=AUGMENT), make(*sources, augment=AUGMENT, frame_cache=str(tmp_path))
    expected = [made(plain, place).batch for place in range(16)]
    for _ in range(2):
        assert all(equal(batch, made(cached, place).batch) for place, batch in enumerate(expected))
    flipped = make(*sources, augment={"flip": 1.0, "colour": 1.0}, frame_cache=str(tmp_path))
    first = [made(flipped, place) for place in range(16)]
    read = opened(monkeypatch)
    assert all(equal(one.batch, made(flipped, place).batch) for place, one in enumerate(first))
    assert not read
    made(make(*sources, augment={"crop": 1.0}, frame_cache=str(tmp_path)), 0)
    assert read


def test_a_damaged_entry_is_decoded_again(
    make: Make, published: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = make(published["hc-stvg-v1"], frame_cache=str(tmp_path))
    batch = made(batches, 0).batch
    (entry,) = tmp_path.rglob("*.zip")
    content, read = entry.read_bytes(), opened(monkeypatch)
    with zipfile.ZipFile(entry) as archive:
        first = archive.getinfo("coarse/0.png").header_offset + 100
    spoiled = content[:first] + bytes(8) + content[first + 8 :]
    for damaged in (b"", content[:-30], content[:1000], spoiled):
        entry.write_bytes(damaged)
        assert equal(batch, made(batches, 0).batch)
        with zipfile.ZipFile(entry) as archive:
            assert archive.testzip() is None and len(archive.namelist()) > 10
    assert len(read) == 4
    assert not [path for path in entry.parent.iterdir() if path != entry]


def test_a_changed_medium_or_rule_has_another_entry(
    make: Make, published: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, read = published["hc-stvg-v1"], opened(monkeypatch)
    made(make(source, frame_cache=str(tmp_path)), 0)
    made(make(source, frame_cache=str(tmp_path), max_visual_tokens=40), 0)
    (video,) = set(read)
    state = os.stat(video)
    os.utime(video, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
    for place in range(3):
        made(make(source, frame_cache=str(tmp_path)), place)
    assert len(read) == 3 and len([*tmp_path.rglob("*.zip")]) == 3


def test_several_processes_use_a_cache_at_once(make: Make, sources: list[Source], tmp_path: Path) -> None:
    plain, cached = make(*sources), make(*sources, frame_cache=str(tmp_path))
    places: Any = range(12)
    loader = DataLoader(places, batch_size=None, collate_fn=cached, num_workers=2, prefetch_factor=2)
    assert all(equal(made(plain, place).batch, result.batch) for place, result in zip(places, loader))
    assert not [*tmp_path.rglob("*.partial")]


def test_a_folder_that_cannot_be_written_is_an_error(make: Make, published: dict[str, Source], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = make(published["jsonl"], frame_cache=str(tmp_path / "file"))(0)
    assert isinstance(error, BridgeError) and not isinstance(error, MicroBatch)
    assert error.code == "output.not_writable" and str(tmp_path / "file") in error.message
