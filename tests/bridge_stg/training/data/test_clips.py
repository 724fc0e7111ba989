"""Batches of clips of all datasets: labels by the runtime's rules, the same at a place for any number of processes."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.training.data.clips import ClipBatch, ClipBatches
from bridge_stg.training.data.labels import choose_fine_times
from bridge_stg.training.data.micro_batch import MicroBatch
from bridge_stg.training.recipe import Source
from tests.bridge_stg.training.data.conftest import Make
from tests.bridge_stg.training.small import BOXES, LINES, annotate
from tests.evaluation import official


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    official.video(folder / "a.mp4", 3.0, 10.0)
    official.drawn(0.0).save(folder / "b.png")
    return folder


def own(path: Path, media: Path, lines: list[dict[str, Any]]) -> Source:
    return Source((str(annotate(path, lines)),), media=str(media))


def made(batches: ClipBatches, place: int) -> MicroBatch:
    found = batches(place)
    assert isinstance(found, MicroBatch), found
    return found


def texts(batches: ClipBatches, batch: ClipBatch) -> list[str]:
    """Return query and answer of each row, without the bridging queries."""
    tokenizer, queries = Tokenizer.from_file(batches.tokenizer_path), batches.spec.language.num_bridging_queries
    return [
        tokenizer.decode(ids[: length - queries])
        for ids, length in zip(batch.input_ids.tolist(), batch.length.tolist())
    ]


def equal(first: ClipBatch, second: ClipBatch) -> bool:
    def same(name: str) -> bool:
        return torch.equal(getattr(first, name), getattr(second, name))

    return all(same(name) for name in vars(first) if name != "prefix")


def test_rows_hold_query_answer_and_bridging_ids(make: Make, tmp_path: Path, media: Path) -> None:
    batches = make(own(tmp_path / "clips.jsonl", media, LINES[:3]))
    batch = made(batches, 0).batch
    for row, length in enumerate(batch.length.tolist()):
        ids = batch.input_ids[row, :length].tolist()
        assert ids[-4:] == list(batches.spec.language.bridging_ids)
        asked = torch.nonzero(batch.target[row] >= 0)[:, 0]
        assert len(asked) and all(batch.input_ids[row, p + 1] == batch.target[row, p] for p in asked.tolist())
    # Samples lie at 0, 0.5 …, two a group: the spans 1.0–2.5 and 0.5–2.0 are in groups 1–2 and 0–1.
    answers = [text.split("assistant\n")[1] for text in texts(batches, batch)]
    assert answers == ["<1.2 seconds> to <2.2 seconds>", "none", "<0.2 seconds> to <1.2 seconds>"]


def test_truth_is_interpolated_and_extended_and_not_counted_where_unknown(
    make: Make, tmp_path: Path, media: Path
) -> None:
    batch = made(make(own(tmp_path / "clips.jsonl", media, LINES[:3]), fine_frames=100), 0).batch
    times = batch.fine_times.numpy()
    inside = (times >= 1.0 - 1e-3) & (times < 2.5 - 1e-3)
    assert len(times) == 24 and np.array_equal(batch.positive[0].numpy(), inside) and not batch.positive[1].any()
    left = np.interp(times, [1, 2], [10, 20])
    expected = np.stack([(left + 10) / 96, np.full(24, 25 / 64), np.full(24, 20 / 96), np.full(24, 30 / 64)], -1)
    np.testing.assert_allclose(batch.boxes[0], expected, atol=1e-6)
    assert torch.equal(batch.counted[1], batch.mask[1]) and batch.mask.any(-1).all()
    assert torch.equal(batch.counted[2], batch.mask[2] & ~batch.positive[2]) and batch.positive[2].any()


def test_an_image_is_one_frame_at_time_zero(make: Make, tmp_path: Path, media: Path) -> None:
    batch = made(make(own(tmp_path / "clips.jsonl", media, LINES[3:])), 0).batch
    assert batch.frames.shape[0] == 1 and batch.fine_times.tolist() == [0.0]
    assert batch.positive.all() and batch.boxes[0, 0].tolist() == [0.25, 0.25, 0.5, 0.5]


def test_tracking_queries_print_the_first_box(make: Make, tmp_path: Path, media: Path) -> None:
    boxes = [{"time": 0.0, "box": [0, 0, 48, 32]}, {"time": 2.9, "box": [0, 0, 48, 32]}]
    track = {"video": "a.mp4", "task": "track", "boxes": boxes, "span": [0.5, 1.4]}
    batches = make(own(tmp_path / "clips.jsonl", media, [track]), absent=1.0)
    (text,) = texts(batches, made(batches, 0).batch)
    assert "track the object, first at 0 0 500 500" in text and text.endswith("<0.2 seconds> to <1.2 seconds>")


def test_a_share_of_targets_present_from_the_start_is_tracked(make: Make, tmp_path: Path, media: Path) -> None:
    source = own(tmp_path / "clips.jsonl", media, [{**LINES[0], "span": [0.0, 2.5]}, LINES[0]])
    for rate, expected in ((0.0, [0, 0]), (1.0, [1, 0])):
        batches = make(source, tracked=rate)
        assert ["first at" in text for text in texts(batches, made(batches, 0).batch)] == expected


def test_a_share_of_queries_attends_only_near_the_span(make: Make, tmp_path: Path, media: Path) -> None:
    source = own(tmp_path / "clips.jsonl", media, [{**LINES[0], "span": [0.0, 0.5]}])
    whole, near = (made(make(source, near_span=rate, fine_frames=100), 0).batch for rate in (0.0, 1.0))
    assert whole.mask.all()
    assert near.mask[0, :4].all() and not near.mask[0, 14:].any() and torch.equal(near.counted, near.mask)


def test_a_run_mixes_clips_of_all_datasets(make: Make, published: dict[str, Source]) -> None:
    batches = make(*published.values(), fine_frames=8)
    index = batches.mixture.index
    names = {str(clip.media): clip.dataset for clip in index.clips}
    found = Counter()
    for place in range(80):
        result = made(batches, place)
        batch, dataset = result.batch, names[result.media]
        found[dataset] += 1
        for row, text in enumerate(texts(batches, batch)):
            assert text.split("assistant\n")[1].count("seconds>") in (0, 2)
            assert ("track" in text) == ("first at" in text) and (dataset != "got-10k" or "track" in text)
            covered(batch, row, least=0.6)
    assert set(found) == set(published)


def covered(batch: ClipBatch, row: int, *, least: float) -> None:
    """Check the box of each known positive frame against the red square that is drawn there."""
    for frame in torch.nonzero(batch.positive[row] & batch.counted[row])[:, 0].tolist():
        picture = batch.fine[frame].numpy().astype(int)
        height, width = picture.shape[:2]
        rows, columns = np.nonzero(picture[..., 0] - picture[..., 1] > 20)
        square = np.array(
            [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]
        )
        x, y, w, h = batch.boxes[row, frame].tolist()
        box = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
        common = np.prod(np.maximum(0, np.minimum(box[2:], square[2:]) - np.maximum(box[:2], square[:2])))
        union = np.prod(box[2:] - box[:2]) + np.prod(square[2:] - square[:2]) - common
        assert common / union > least, (frame, box, square)


AUGMENTED = {
    name: {name: 1.0} for name in ("crop", "flip", "colour", "scale", "time")
} | {"all": dict.fromkeys(("crop", "flip", "colour", "scale", "time"), 1.0)}  # fmt: skip


@pytest.mark.parametrize("name", AUGMENTED)
def test_boxes_follow_the_augmented_frames(make: Make, published: dict[str, Source], name: str) -> None:
    sources = [published[name] for name in ("vidstg", "got-10k", "refcoco", "jsonl", "hc-stvg-v2")]
    plain, changed = make(*sources, near_span=0.0), make(*sources, near_span=0.0, augment=AUGMENTED[name])
    different = 0
    for place in range(16):
        first, second = made(plain, place).batch, made(changed, place).batch
        assert first.input_ids.shape[0] == second.input_ids.shape[0]
        for row in range(second.input_ids.shape[0]):
            covered(second, row, least=0.6)
        shown = first.fine.shape != second.fine.shape or not torch.equal(first.fine, second.fine)
        different += shown or not torch.equal(first.fine_times, second.fine_times)
        if name == "scale":
            assert second.fine[0].numel() <= first.fine[0].numel()
        if name in ("flip", "colour"):
            assert torch.equal(first.fine_times, second.fine_times) and torch.equal(first.positive, second.positive)
    assert different >= (4 if name == "time" else 8)  # images and tracks start as they are


def test_coarse_and_fine_frames_are_augmented_alike(make: Make, tmp_path: Path, media: Path) -> None:
    source = own(tmp_path / "clips.jsonl", media, LINES[:1])
    for place in range(6):
        batch = made(make(source, augment=AUGMENTED["all"], fine_frames=100), place).batch
        coarse, fine = batch.frames[0, 0].float().mean((0, 1)), batch.fine[0].float().mean((0, 1))
        torch.testing.assert_close(coarse, fine, atol=3.0, rtol=0)


def test_queries_are_mirrored_with_the_frames(make: Make, tmp_path: Path, media: Path) -> None:
    lines = [{**LINES[0], "query": "the car on the left"}]
    plain = make(own(tmp_path / "a.jsonl", media, lines), fine_frames=100)
    flipped = make(own(tmp_path / "a.jsonl", media, lines), fine_frames=100, augment={"flip": 1.0})
    kept = make(
        own(tmp_path / "b.jsonl", media, [{**LINES[0], "query": "who left the room"}]), fine_frames=100,
        augment={"flip": 1.0},
    )  # fmt: skip
    first, second, third = (made(batches, 0).batch for batches in (plain, flipped, kept))
    assert "the car on the right" in texts(flipped, second)[0] and "who left the room" in texts(kept, third)[0]
    assert torch.equal(first.fine.flip(2), second.fine) and torch.equal(first.fine, third.fine)
    assert torch.equal(first.frames.flip(3), second.frames)
    mirrored = first.boxes.clone()
    mirrored[..., 0] = 1 - mirrored[..., 0]
    torch.testing.assert_close(mirrored, second.boxes)


def test_a_clip_that_starts_later_has_later_labels(make: Make, tmp_path: Path, media: Path) -> None:
    source = own(tmp_path / "clips.jsonl", media, [{**LINES[0], "span": [0.0, 2.5]}])
    starts = set()
    for place in range(6):
        batch = made(make(source, near_span=0.0, augment={"time": 1.0}, fine_frames=100, seed=place), place).batch
        shift = 2.5 - float(batch.fine_times[batch.positive[0]].max()) - 0.125
        starts.add(round(shift, 1))
        assert batch.fine_times[0] == 0 and batch.positive[0, 0] and 0 <= shift <= 1.125
        assert len(batch.fine_times) in (round((3 - s) * 8) for s in np.arange(shift - 0.13, shift + 0.13, 0.01))
    assert len(starts) > 2


def test_queries_about_other_media_are_absent(
    make: Make, published: dict[str, Source], tmp_path: Path, media: Path
) -> None:
    source = own(tmp_path / "clips.jsonl", media, LINES[:1])
    others = own(tmp_path / "others.jsonl", Path(published["jsonl"].media or ""), [
        {"video": "a.mp4", "query": "a red bicycle", "span": [1.0, 2.5], "boxes": BOXES},
        {"video": "a.mp4", "query": "a green tree", "span": [1.0, 2.5], "boxes": BOXES},
        {"video": "a.mp4", "query": "an event", "span": [1.0, 2.5]},
    ])  # fmt: skip
    batches = make(source, others, absent=1.0)
    found = set()
    for place in range(40):
        result = made(batches, place)
        if result.media == str(media / "a.mp4"):
            (text,) = texts(batches, result.batch)
            found.add(text.split("find ")[1])
            assert not result.batch.positive.any() and result.batch.counted.all()
    # "a red bicycle" shares a word with this clip's query, and "an event" is a query of another task.
    assert len(found) == 1 and found.pop().startswith("a green tree")
    share = make(source, others, absent=0.5)
    absent = [texts(share, made(share, place).batch)[0].endswith("none") for place in range(60)]
    assert 12 < sum(absent) < 48


def test_a_place_has_the_same_clip_in_every_process(make: Make, published: dict[str, Source]) -> None:
    sources = [published[name] for name in ("vidstg", "refcoco", "jsonl")]
    options: dict[str, Any] = {"absent": 0.3, "augment": AUGMENTED["all"], "clips": 4, "queries": 2}
    first, again = make(*sources, **options), make(*sources, **options)
    inside = [made(first, place).batch for place in range(8)]
    copy = pickle.loads(pickle.dumps(again))  # as for worker processes that are not forked
    assert equal(inside[3], made(copy, 3).batch)
    for process in range(2):
        places: Any = range(process, 8, 2)
        loader = DataLoader(places, batch_size=None, collate_fn=again, num_workers=1, prefetch_factor=2)
        assert all(equal(inside[place], result.batch) for place, result in zip(places, loader))
    other = make(*sources, seed=1, **options)
    assert not all(equal(inside[place], made(other, place).batch) for place in range(8))


def test_a_clip_that_cannot_be_read_is_replaced_and_listed(make: Make, tmp_path: Path, media: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for name in ("a", "b"):
        shutil.copy(media / "a.mp4", folder / f"{name}.mp4")
    source = own(tmp_path / "clips.jsonl", folder, [{**LINES[0], "video": f"{name}.mp4"} for name in ("a", "b")])
    batches = make(source)
    (folder / "b.mp4").write_bytes(b"damaged")
    results = [made(batches, place) for place in range(8)]
    assert {result.media for result in results} == {str(folder / "a.mp4")}
    skipped = [result.skipped for result in results if result.skipped]
    assert len(skipped) == 4 and {one.media for some in skipped for one in some} == {str(folder / "b.mp4")}
    assert all("b.mp4" in one.reason for some in skipped for one in some)
    assert [made(batches, place).skipped for place in range(8)] == [result.skipped for result in results]
    (folder / "a.mp4").unlink()
    error = batches(0)
    assert not isinstance(error, MicroBatch) and error.code == "annotation.broken_media"


def test_an_error_that_concerns_no_clip_is_returned(make: Make, tmp_path: Path, media: Path) -> None:
    batches = make(own(tmp_path / "clips.jsonl", media, LINES))
    error = ClipBatches(batches.spec, tmp_path / "tokenizer.json", batches.mixture)(0)
    assert not isinstance(error, MicroBatch) and error.code == "bundle.missing_file"


def test_fine_frames_lie_around_a_span() -> None:
    grid, rng = np.arange(400) / 4, np.random.default_rng(0)
    for _ in range(20):
        times = choose_fine_times(rng, grid, [(40.0, 50.0)], rate=4, count=16)
        assert len(np.unique(times)) == 16 and np.all(np.diff(times) > 0)
        assert ((times >= 38.5) & (times <= 51.5)).sum() >= 8
    assert len(choose_fine_times(rng, grid, [], rate=4, count=16)) == 16
    assert len(choose_fine_times(rng, grid[:7], [], rate=4, count=16)) == 7
