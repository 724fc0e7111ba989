"""The index: what is stored is neither decoded nor encoded again, and changes no answer."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge_stg.runtime import Grounder
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.host.threads import for_each
from bridge_stg.runtime.index.fine import BLOCK, StoredMaps
from bridge_stg.runtime.index.index import VisualIndex, remove_file
from bridge_stg.runtime.video import decoder
from tests.errors import raises
from tests.fakes.answers import QUERIES, SCRIPT, write_video
from tests.fakes.chain import clip, fake_grounder, text_spec

BOX = '```json\n[\n\t{"time": 2.0, "bbox_2d": [100, 200, 300, 400]}\n]\n```'


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mp4", clip())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "index"


def opened(root: Path | None = None, *, encoder: str = "a", **options: Any) -> Grounder:
    """Return a grounder whose vision encoder records its calls."""
    index = None if root is None else VisualIndex(root, {"encoder": encoder})
    return fake_grounder(script=SCRIPT, index=index, **options)


def values(result: Grounding) -> dict[str, Any]:
    return {**result.to_json(), "timings_s": None}


def encoded(grounder: Grounder) -> int:
    """Return how many groups of frames the grounder has encoded."""
    calls = grounder.sessions["vision_encoder"].calls  # type: ignore[attr-defined]
    return sum(len(call["frames"]) for call in calls)


@pytest.mark.parametrize("heads", ["bridge", "text"])
def test_the_second_run_decodes_and_encodes_nothing(
    video: Path, root: Path, heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {}
    if heads == "text":
        options = {"spec": text_spec(), "replies": {"Boxes of the car?": BOX}}
    expected = opened(**options).ground(video, "the car")
    first = opened(root, **options)
    assert values(first.ground(video, "the car")) == values(expected) and encoded(first) > 0
    again = opened(root, **options)
    monkeypatch.setattr(decoder.Decoder, "frames", lambda self: pytest.fail("the file is decoded"))
    assert values(again.ground(video.rename(video.with_name("renamed.mp4")), "the car")) == values(expected)
    assert encoded(again) == 0


def test_other_queries_encode_only_what_is_missing(video: Path, root: Path) -> None:
    opened(root).ground(video, "the car")
    plain, again = opened(), opened(root)
    with plain.open(video) as without, again.open(video) as indexed:
        coarse = encoded(plain)
        for query in QUERIES:
            assert values(indexed.ground(query)) == values(without.ground(query))
    assert encoded(again) == encoded(plain) - coarse - 20  # the fine frames of the car


def test_all_fine_frames_can_be_indexed(video: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coarse, everything = opened(root).index(video), opened(root).index(video, fine=True)
    assert not coarse.reused and not everything.reused and everything.nbytes > coarse.nbytes
    assert everything.duration_s == pytest.approx(8)
    monkeypatch.setattr(decoder.Decoder, "frames", lambda self: pytest.fail("the file is decoded"))
    again = opened(root)
    for query in QUERIES:
        again.ground(video, query)
    assert encoded(again) == 0 and again.index(video, fine=True) == type(everything)(8.0, everything.nbytes, True)
    assert remove_file(root, video) == everything.nbytes and remove_file(root, video) == 0


def test_another_encoder_option_or_content_is_a_miss(video: Path, root: Path) -> None:
    opened(root).index(video)
    assert not opened(root, encoder="b").index(video).reused
    assert not opened(root).index(video, max_visual_tokens=8).reused
    assert not opened(root, unchanged_tolerance=1.0).index(video).reused
    assert not opened(root, spec=text_spec("qwen2_5_vl")).index(video).reused
    assert opened(root).index(video).reused
    state = video.stat()
    write_video(video, clip(present=(4.0, 6.0)))
    content = video.read_bytes()[: state.st_size]
    video.write_bytes(content + bytes(state.st_size - len(content)))
    expected = values(opened().ground(video, "the car"))
    assert values(opened(root).ground(video, "the car")) == expected


def test_a_file_that_changes_while_it_is_read_is_not_stored(video: Path, root: Path) -> None:
    grounder = opened(root)
    encoder: Any = grounder.sessions["vision_encoder"]
    encoder.before = lambda feeds: video.write_bytes(video.read_bytes() + bytes(1))
    grounder.index(video)
    assert not list(root.rglob("coarse-*"))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "deleted"])
def test_damage_is_found_and_mended(video: Path, root: Path, damage: str) -> None:
    expected = values(opened(root).ground(video, "the car"))
    files = [file for file in root.rglob("*-*") if file.is_file()]
    assert len(files) >= 3
    for place, file in enumerate(files):
        content = bytearray(file.read_bytes())
        content[len(content) * (place + 1) // (len(files) + 1)] ^= 1
        kept = {"flipped": len(content), "truncated": len(content) // 2}.get(damage, 0)
        file.unlink() if damage == "deleted" else file.write_bytes(content[:kept])
    mended, again = opened(root), opened(root)
    assert values(mended.ground(video, "the car")) == expected and encoded(mended) > 0
    assert values(again.ground(video, "the car")) == expected and encoded(again) == 0


def test_writers_share_an_index(video: Path, root: Path) -> None:
    expected = [values(opened().ground(video, query)) for query in QUERIES]
    found: dict[int, Any] = {}

    def ask(place: int) -> None:
        found[place] = values(opened(root).ground(video, QUERIES[place]))

    for_each(ask, range(len(QUERIES)), threads=4)
    assert [found[place] for place in range(len(QUERIES))] == expected
    again = opened(root)
    assert [values(again.ground(video, query)) for query in QUERIES] == expected and encoded(again) == 0


def test_two_writers_of_one_block_lose_nothing(video: Path, root: Path) -> None:
    cache = VisualIndex(root, {}).cache_of(video)
    barrier = threading.Barrier(BLOCK)

    def put(index: int) -> None:
        barrier.wait()
        StoredMaps(cache, "maps", {}).put({index: (np.full((2, 2), index), index / 4)})

    threads = [threading.Thread(target=put, args=(index,)) for index in range(BLOCK)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = StoredMaps(cache, "maps", {}).get(range(2 * BLOCK))
    assert {index: (float(rows[0, 0]), time) for index, (rows, time) in stored.items()} == {
        index: (index, index / 4) for index in range(BLOCK)
    }


def test_errors(video: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises("index.missing"):
        opened().index(video)
    with raises("index.not_an_index", video):
        opened(video)
    with raises("index.not_an_index", tmp_path):
        opened(tmp_path)  # the folder of the video
    with raises("output.no_folder", video / "index"):
        opened(video / "index")
    opened(root).index(video)
    (content,) = (folder for folder in root.iterdir() if folder.is_dir())
    shutil.rmtree(content)
    content.write_text("no folder")
    with raises("index.not_an_index", content):
        opened(root).ground(video, "the car")
    (root / "index.json").write_text('{"format": "bridge-stg index", "version": 2}')
    with raises("index.not_an_index", root):
        opened(root)
    shutil.rmtree(root)

    def full(*arguments: Any, **arrays: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with raises("output.disk_full", root):
        opened(root).ground(video, "the car")
    assert [file.name for file in root.rglob("*") if file.is_file()] == ["index.json"]


def test_other_sources_are_not_indexed(root: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.fromarray(clip()[20][1]).save(picture)
    assert values(opened(root).ground(clip(), "the car")) == values(opened().ground(clip(), "the car"))
    assert values(opened(root).ground(picture, "the car")) == values(opened().ground(picture, "the car"))
    with raises("index.not_a_video", picture):
        opened(root).index(picture)
    with raises("video.not_found"):
        opened(root).index(tmp_path / "gone.mp4")
    assert not root.exists()


def test_an_index_that_is_deleted_meanwhile_is_made_again(video: Path, root: Path) -> None:
    grounder = opened(root)
    grounder.index(video)
    shutil.rmtree(root)
    grounder.index(video, fine=True)
    assert opened(root).index(video, fine=True).reused


def test_the_videos_used_longest_ago_are_deleted(tmp_path: Path, root: Path) -> None:
    videos = [write_video(tmp_path / f"{i}.mp4", clip(present=(4.0, 5.0 + i / 2))) for i in range(4)]
    nbytes = opened(root).index(videos[0]).nbytes
    limited = fake_grounder(script=SCRIPT, index=VisualIndex(root, {"encoder": "a"}, max_bytes=int(2.9 * nbytes)))
    for i, file in enumerate(videos[:2]):
        assert limited.index(file).reused == (i == 0)
        time.sleep(0.02)  # coarser clocks of file systems
    assert limited.index(videos[0]).reused  # now used later than the second one
    time.sleep(0.02)
    limited.index(videos[2])
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    assert size <= 2.9 * nbytes
    assert opened(root).index(videos[0]).reused and opened(root).index(videos[2]).reused
    assert remove_file(root, videos[1]) == 0


def test_a_video_larger_than_the_index_is_answered_and_not_kept(video: Path, tmp_path: Path) -> None:
    expected, root = values(opened().ground(video, "the car")), tmp_path / "small"
    limited = fake_grounder(script=SCRIPT, index=VisualIndex(root, {}, max_bytes=200))
    assert values(limited.ground(video, "the car")) == expected
    assert sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) <= 200
    with raises("index.missing"):
        Grounder.load(tmp_path, max_index_bytes=200)
