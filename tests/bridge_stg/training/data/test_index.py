"""The check before a training: what is missing or broken, by source, and where a training stops."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.training.data.index import Index, check_clips, check_share
from bridge_stg.training.data.micro_batch import Skipped
from bridge_stg.training.data.sources import read_clips
from bridge_stg.training.recipe import Source
from tests.errors import raises
from tests.evaluation import official

QUERY = {"query": "the red square", "span": [0.5, 1.5]}


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    official.video(folder / "a.mp4", 2.0, 5.0)
    return folder


def own(media: Path, *lines: dict[str, Any], name: str = "clips.jsonl") -> Source:
    path = media.parent / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Source((str(path),), media=str(media))


def check(spec: ModelSpec, *sources: Source, **options: Any) -> Index:
    return check_clips(read_clips(sources), sources, spec, **options)


def test_all_datasets_are_indexed(spec: ModelSpec, published: dict[str, Source]) -> None:
    done: list[tuple[int, int]] = []
    index = check(
        spec, *published.values(), max_broken=0.2, progress=lambda count, total: done.append((count, total))
    )  # fmt: skip
    assert done[-1][0] == done[-1][1] == len(done) == len(index.clips) + 1
    kinds = {(clip.dataset, size.medium.kind) for clip, size in zip(index.clips, index.sizes)}
    assert {("vidstg", "video"), ("got-10k", "frames"), ("refcoco", "image"), ("jsonl", "image")} <= kinds
    assert all(size.medium.size == official.SIZE for size in index.sizes)
    durations = {
        (clip.dataset, clip.part): size.medium.duration_s for clip, size in zip(index.clips, index.sizes)
    }  # fmt: skip
    assert durations["hc-stvg-v1", None] == pytest.approx(20) and durations["got-10k", None] == pytest.approx(1.2)
    assert durations["vidstg", (2.0, 6.0)] == pytest.approx(4.0)
    groups = {clip.dataset: size.groups for clip, size in zip(index.clips, index.sizes)}
    assert groups["hc-stvg-v1"] == 20 and groups["refcoco"] == 1
    assert [one.media for one in index.missing[3]] == ["3MSZA.mp4"]
    assert "charades-sta" in index.summary() and "3MSZA.mp4" in index.summary()
    sentences = {clip.dataset: len(clip.queries) for clip in index.clips}
    assert sentences["refcoco"] == 2 and sentences["charades-sta"] == 2


def test_missing_and_broken_media_are_listed_up_to_a_share(spec: ModelSpec, media: Path) -> None:
    for number in range(5):
        shutil.copy(media / "a.mp4", media / f"{number}.mp4")
    (media / "1.mp4").write_bytes(b"damaged")
    source = own(media, *({"video": f"{number}.mp4", **QUERY} for number in range(6)))
    index = check(spec, source, max_broken=0.4)
    assert [one.media for one in index.missing[0]] == ["5.mp4"] and len(index.clips) == 4
    assert [one.media for one in index.broken[0]] == [str(media / "1.mp4")]
    assert {one.media for one in index.skipped} == {"5.mp4", str(media / "1.mp4")}
    for name in ("5.mp4", "1.mp4", "4 clips", "clips.jsonl"):
        assert name in index.summary()
    with raises("annotation.missing_media", "clips.jsonl:6", "5.mp4", 2, 6, 0.3):
        check(spec, source, max_broken=0.3)
    with raises("annotation.broken_media", "1.mp4"):
        check(spec, own(media, *({"video": f"{number}.mp4", **QUERY} for number in range(2))))
    check_share([Skipped("a", "b")], 10, 0.1)
    with raises("annotation.broken_media", "a: b", 0.09):
        check_share([Skipped("a", "b")], 10, 0.09)


def test_a_source_without_any_clip_stops(spec: ModelSpec, media: Path) -> None:
    source, other = own(media, {"video": "a.mp4", **QUERY}), own(media, {"video": "b.mp4", **QUERY}, name="other.jsonl")
    with raises("annotation.no_media", "other.jsonl"):
        check(spec, source, other, max_broken=0.9)


FAULTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a box outside": ({"boxes": [{"time": 1, "box": [97, 0, 98, 9]}]}, ["'boxes'", "[97", "96 × 64"]),
    "a query of nothing": ({"query": "?"}, ["'query'"]),
    "a span in milliseconds": ({"span": [1000, 2500]}, ["'span'", "1000 s", "2.00 s"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_own_annotations_stop_with_their_line(spec: ModelSpec, media: Path, name: str) -> None:
    change, values = FAULTS[name]
    first = {"video": "a.mp4", **QUERY}
    with raises("annotation.bad_field", "clips.jsonl:2", *values):
        check(spec, own(media, first, first | change), max_broken=0.9)


def test_faults_of_published_annotations_are_left_out(spec: ModelSpec, media: Path) -> None:
    path = media.parent / "charades.txt"
    path.write_text("a 0.5 1.5##a person sits.\na 1.5 0.5##a person stands.\na 9.0 12.0##a person runs.\n")
    index = check(spec, Source((str(path),), dataset="charades-sta", media=str(media)))
    assert [sample.query for sample in index.clips[0].queries] == ["a person sits."]
    assert [one.media for one in index.faults[0]] == [f"{path}:2", f"{path}:3"]
    assert f"{path}:2" in index.summary() and "2 queries left out" in index.summary()


def test_a_track_needs_boxes_after_the_first(spec: ModelSpec, published: dict[str, Source]) -> None:
    with raises("annotation.broken_media", "GOT-10k_Test_000001", "first frame"):
        check(spec, replace(published["got-10k"], split="test"))


def test_a_limit_uses_the_first_samples(spec: ModelSpec, media: Path) -> None:
    source = own(media, *({"video": "a.mp4", **QUERY, "query": f"query {number}"} for number in range(3)))
    index = check(spec, replace(source, limit=2))
    assert [sample.query for sample in index.clips[0].queries] == ["query 0", "query 1"]


def test_a_turned_photo_has_the_size_in_which_it_is_shown(spec: ModelSpec, media: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    official.drawn(0.0).save(media / "b.jpg", exif=exif)
    line = {"image": "b.jpg", "query": "the red square", "boxes": [{"box": [1, 2, 30, 90]}]}
    assert check(spec, own(media, line)).sizes[0].medium.size == (64, 96)
