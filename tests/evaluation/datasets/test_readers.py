"""Every dataset's reader on a small file in its published layout, quirks included, and on broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge_stg.evaluation.datasets.registry import DATASETS, read_dataset
from bridge_stg.evaluation.samples import Dataset, Sample
from tests.errors import raises
from tests.evaluation import official
from tests.evaluation.official import ALL, SIZE, Files, box_at


def read(files: Files, **changed: Any) -> Dataset:
    split = changed.get("split", files.split)
    return read_dataset(files.name, files.annotations, changed.get("media", files.media), split=split)


def by_query(dataset: Dataset, part: str) -> Sample:
    found = [sample for sample in dataset.samples if part in sample.query]
    assert len(found) == 1, [sample.query for sample in dataset.samples]
    return found[0]


def test_every_dataset_has_a_fixture() -> None:
    assert {name.rstrip("+g") if name.startswith("refcoco") else name for name in DATASETS} == set(ALL)


def test_vidstg(tmp_path: Path) -> None:
    dataset = read(official.vidstg(tmp_path))
    assert (dataset.split, len(dataset.samples), dataset.allow_none) == ("test", 4, False)
    assert [s.group for s in dataset.samples] == ["declarative", "interrogative", "interrogative", "declarative"]
    sample = by_query(dataset, "who holds")
    assert sample.clip is None and sample.task == "tube"  # from the first frame to the last
    assert sample.media == tmp_path / "video/0021/3557382625.mp4"
    truth = sample.read_truth()
    assert truth.span == (1.0, 3.0) and truth.size == SIZE
    assert len(truth.times) == 60 and list(np.flatnonzero(truth.inside)) == list(range(10, 30))
    np.testing.assert_allclose(truth.boxes[12], box_at(1.2), rtol=1e-6)
    np.testing.assert_allclose(truth.boxes[15], box_at(1.5), rtol=1e-6)  # between its neighbours
    thing = by_query(dataset, "what does").read_truth()
    assert thing.boxes[12][0] == pytest.approx(box_at(1.2)[0] + 2)  # target_id 1


def test_vidstg_segment(tmp_path: Path) -> None:
    sample = read(official.vidstg(tmp_path)).samples[3]
    assert sample.clip == (2.0, 6.0)  # the tube's last frame is after the segment's
    truth = sample.read_truth()
    assert truth.span == (2.0, 4.0)  # counted from the start of the segment
    assert len(truth.times) == 40 and truth.inside.sum() == 20 and truth.inside[-1]
    np.testing.assert_allclose(truth.boxes[20], box_at(4.0), rtol=1e-6)


@pytest.mark.parametrize("layout", [official.hc_stvg_v1, official.hc_stvg_v2])
def test_hc_stvg(tmp_path: Path, layout: Callable[..., Files]) -> None:
    (sample,) = read(layout(tmp_path)).samples
    assert sample.query == "The man in the red coat walks."
    assert sample.media is not None and sample.media.suffix == ".mp4"
    truth = sample.read_truth()
    assert truth.size == SIZE and len(truth.times) == 100 and truth.times[1] == pytest.approx(0.2)
    assert truth.span == (6.0, 10.0)  # st_frame counts from 1: frame 31 is at 30 / 5 s
    assert list(np.flatnonzero(truth.inside)) == list(range(30, 50))
    np.testing.assert_allclose(truth.boxes[30], box_at(6.0), rtol=1e-6)  # from x, y, width, height


def test_hc_stvg_names_the_other_version(tmp_path: Path) -> None:
    files = official.hc_stvg_v2(tmp_path)
    with raises("annotation.wrong_version", "English", "caption", "hc-stvg-v2"):
        read_dataset("hc-stvg-v1", files.annotations, files.media)


def test_charades_sta(tmp_path: Path) -> None:
    dataset = read(official.charades_sta(tmp_path))
    assert [sample.id for sample in dataset.samples] == ["1", "2", "3"]
    assert {sample.task for sample in dataset.samples} == {"span"}
    assert by_query(dataset, "on a shelf").read_truth().span == (0.0, 6.9)
    assert by_query(dataset, "phone").query == "person begins to play on a phone."
    missing = by_query(dataset, "light")
    assert missing.media is None and missing.media_name == "3MSZA.mp4"


def test_refcoco(tmp_path: Path) -> None:
    files = official.refcoco(tmp_path)
    dataset = read(files)
    assert [(s.id, s.query) for s in dataset.samples] == [("0", "the red square"), ("1", "red café thing")]
    sample = dataset.samples[0]
    assert sample.task == "image" and sample.media == files.media / "COCO_train2014_000000581857.jpg"
    truth = sample.read_truth()
    assert truth.size == SIZE and truth.span is None
    np.testing.assert_allclose(truth.boxes, [box_at(1.0)])
    (other,) = read(files, split="val").samples
    assert other.media is None
    np.testing.assert_allclose(other.read_truth().boxes, [[1.5, 2.5, 11.75, 23.0]])
    two = read_dataset("refcoco+", (tmp_path / "instances.json", tmp_path / "refs(unc).json"), files.media, split="val")
    assert (two.name, two.split) == ("refcoco+", "val")
    with raises("annotation.unknown_split", "testB", "testA, val"):
        read(files, split="testB")


def test_refcoco_rejects_pickles(tmp_path: Path) -> None:
    files = official.refcoco(tmp_path)
    (tmp_path / "refs(unc).json").unlink()
    official.refs_pickle(tmp_path / "refs(unc).p", protocol=2)
    with raises("annotation.unsafe_pickle", "convert-refs", "refs(unc).p", "refs(unc).json"):
        read(files)


def test_got10k(tmp_path: Path) -> None:
    files = official.got10k(tmp_path)
    dataset = read(files)
    (sample,) = dataset.samples
    assert (dataset.split, sample.id, sample.task, sample.frame_rate) == ("val", "GOT-10k_Val_000001", "track", 10.0)
    assert sample.media == files.media / "val/GOT-10k_Val_000001"
    truth = sample.read_truth()
    assert truth.size == SIZE and truth.times[3] == pytest.approx(0.3)
    np.testing.assert_allclose(truth.boxes[3], box_at(0.3), rtol=1e-5)
    assert list(np.flatnonzero(~truth.counted)) == [0, 5]  # the given box, and the frame in which it is hidden
    hidden = read(files, split="test").samples[0].read_truth()
    assert not hidden.counted.any() and len(hidden.times) == 12


def test_jsonl(tmp_path: Path) -> None:
    dataset = read(official.jsonl(tmp_path))
    assert [sample.task for sample in dataset.samples] == ["tube", "tube", "span", "image", "track"]
    assert [sample.id for sample in dataset.samples] == ["1", "2", "3", "4", "tracked"]
    assert dataset.allow_none
    truths = [sample.read_truth() for sample in dataset.samples]
    assert [truth.present for truth in truths] == [True, False, True, True, True]
    assert truths[0].interval_s == pytest.approx(0.1) and truths[0].inside.all() and len(truths[0].times) == 20
    np.testing.assert_allclose(truths[0].boxes[3], box_at(1.3), rtol=1e-5)  # between those of 1.2 and 1.4 s
    assert list(truths[4].counted) == [False] + [True] * 59 and dataset.samples[4].query == "the object"
    assert dataset.samples[2].group == "events" and truths[2].span == (0.0, 4.0)


def test_jsonl_tube_extends_over_its_span(tmp_path: Path) -> None:
    """Keyframes at 1.5 and 2.0 s of a span from 1 to 3 s: linear between them, constant outside."""
    (tmp_path / "a.mp4").touch()
    boxes = [{"time": 1.5, "box": [0, 0, 9, 9]}, {"time": 2.0, "box": [1, 1, 9, 9]}]
    line = {"video": "a.mp4", "query": "q", "span": [1.0, 3.0], "boxes": boxes}
    path = official.dump(tmp_path / "own.jsonl", line)
    truth = read_dataset("jsonl", (path,)).samples[0].read_truth()
    np.testing.assert_allclose(truth.times, np.arange(10, 30) / 10)
    assert truth.inside.all() and truth.interval_s == pytest.approx(0.1)
    np.testing.assert_allclose(truth.boxes[:, 0], [0] * 5 + [0, 0.2, 0.4, 0.6, 0.8] + [1] * 10, atol=1e-6)


@pytest.mark.parametrize(("interval", "expected"), [(1 / 30, 1 / 30), (0.1, 0.1), (0.25, 0.25 / 3), (1.0, 0.1)])
def test_jsonl_tubes_are_scored_at_the_rate_of_their_boxes(tmp_path: Path, interval: float, expected: float) -> None:
    (tmp_path / "a.mp4").touch()
    boxes = [{"time": i * interval, "box": [0, 0, 9, 9]} for i in range(4)]
    line = {"video": "a.mp4", "query": "q", "span": [0, 4 * interval], "boxes": boxes}
    truth = read_dataset("jsonl", (official.dump(tmp_path / "own.jsonl", line),)).samples[0].read_truth()
    assert truth.interval_s == pytest.approx(expected) and len(truth.times) == round(4 * interval / expected)


def edited(path: Path, change: Callable[[Any], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def put(*keys: Any, value: Any) -> Callable[[Any], None]:
    """Return a change of one field; DROP removes it."""

    def change(values: Any) -> None:
        for key in keys[:-1]:
            values = values[key]
        if value is DROP:
            del values[keys[-1]]
        else:
            values[keys[-1]] = value

    return change


DROP = object()
MKV = "27_woC9Vfbn74I.mkv"
VIDSTG, VIDOR = "test_annotations.json", "vidor/validation/0021/3557382625.json"
FIELD, FILE, LINE = "annotation.bad_field", "annotation.bad_file", "annotation.bad_line"
BROKEN: list[tuple[str, str, Callable[[Any], None], str, tuple[str, ...]]] = [
    ("vidstg", VIDSTG, put(0, "fps", value=0), FIELD, ("[0]", "'fps'", "0")),
    ("vidstg", VIDSTG, put(1, "vid", value=DROP), FIELD, ("[1]", "'vid'", "missing")),
    ("vidstg", VIDSTG, put(1, "vid", value="77"), "annotation.not_found", ("77.json",)),
    ("vidstg", VIDSTG, put(0, "used_segment", value=None), FIELD, ("'used_segment'", "null")),
    ("vidstg", VIDSTG, put(0, "captions", 0, "description", value=" "), FIELD, ("[0].captions[0]", "'description'")),
    ("vidstg", VIDSTG, put(0, "temporal_gt", "begin_fid", value=30), FIELD, ("[0].temporal_gt", "'begin_fid'", "30")),
    ("vidstg", VIDSTG, put(0, "questions", 0, "target_id", value=9), "annotation.mismatch", ("tid 9",)),
    (
        "vidstg", VIDOR, put("trajectories", 4, 0, "bbox", "xmax", value="7"), FIELD,
        ("trajectories[4][0].bbox", "'xmax'", '"7"'),
    ),
    ("hc-stvg-v1", "test.json", put(MKV, "st_frame", value=0), FIELD, (MKV, "'st_frame'", "0", "1")),
    ("hc-stvg-v1", "test.json", put(MKV, "bbox", 3, value=[1, 2, 3]), FIELD, ("bbox[3]", "[1, 2, 3]")),
    ("hc-stvg-v1", "test.json", put(MKV, "bbox", value=[]), FIELD, ("'bbox'", "[]")),
    ("hc-stvg-v2", "val_v2.json", put("103_yFy8pFJH5-s.mp4", "img_size", value=[64]), FIELD, ("'img_size'", "[64]")),
    ("refcoco", "refs(unc).json", put(0, "ann_id", value=5), "annotation.mismatch", ("'ann_id'", "5")),
    ("refcoco", "instances.json", put("annotations", 0, "bbox", value="x"), FIELD, ("annotations[0]", "'bbox'")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "change", "code", "values"), BROKEN, ids=[f"{b[0]} {b[4]}" for b in BROKEN])
def test_broken_fields_are_named(
    *, tmp_path: Path, name: str, file: str, change: Callable[[Any], None], code: str, values: tuple[str, ...]
) -> None:
    files = ALL[name](tmp_path)
    edited(tmp_path / file, change)
    with raises(code, tmp_path, *values):
        for sample in read(files).samples:
            sample.read_truth()


def own(line: str, *values: str, code: str = FIELD) -> tuple[str, str, str, str, tuple[str, ...]]:
    """Return a line of the project's own format that is wrong, and what its error names."""
    return "jsonl", "own.jsonl", line, code, (":6:", *values)


LINES = [
    ("charades-sta", "charades_sta_test.txt", "AO8RW 0.0##a", LINE, (":4:", "'AO8RW 0.0##a'")),
    ("charades-sta", "charades_sta_test.txt", "AO8RW x 1##a", LINE, (":4:", "start", "'x'")),
    ("charades-sta", "charades_sta_test.txt", "AO8RW 0 1## ", LINE, (":4:", "'AO8RW 0 1## '")),
    ("got-10k", "val/GOT-10k_Val_000001/groundtruth.txt", "1,2,3", LINE, (":13:", "3 numbers")),
    ("got-10k", "val/GOT-10k_Val_000001/groundtruth.txt", "1,2,3,4", FILE, ("13 boxes", "12 frames")),
    ("got-10k", "val/GOT-10k_Val_000001/cover.label", "much", LINE, (":13:", "'much'")),
    ("got-10k", "val/list.txt", "../secret", LINE, (":2:", "'../secret'")),
    own("{", code=LINE),
    own("[]", code=LINE),
    own('{"video": "a", "qurey": "x"}', "'qurey'"),
    own('{"query": "x"}', "'video'", "'image'"),
    own('{"video": "a", "query": "x"}', "'span'", "missing"),
    own('{"video": "a", "query": "x", "span": [2, 1]}', "'span'", "[2, 1]"),
    own('{"video": "a", "query": "", "span": [1, 2]}', "'query'", '""'),
    own('{"video": "a", "query": "x", "span": [1, 2], "task": "tube"}', "'boxes'"),
    own('{"image": "a", "query": "x", "boxes": []}', "'boxes'", "[]"),
    own('{"image": "a", "query": "x", "boxes": [{"box": [5, 0, 1, 1]}]}', "boxes[0]", "'box'", "[5, 0, 1, 1]"),
    own('{"video": "a", "query": "x", "span": null, "boxes": [{"time": 0, "box": [0, 0, 1, 1]}]}', "'span'", "null"),
    own('{"video": "a", "task": "track", "boxes": [{"time": 1, "box": [0, 0, 1, 1]}]}', "'boxes'", "time 0"),
    ("jsonl", "own.jsonl", '{"id": "tracked", "video": "a", "query": "x", "span": null}', "annotation.duplicate_id",
     ("'tracked'",)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "line", "code", "values"), LINES, ids=[f"{b[0]} {b[2]}" for b in LINES])
def test_broken_lines_are_named(
    *, tmp_path: Path, name: str, file: str, line: str, code: str, values: tuple[str, ...]
) -> None:
    files = ALL[name](tmp_path)
    with open(tmp_path / file, "a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    with raises(code, *values):
        for sample in read(files).samples:
            sample.read_truth()


def test_files_that_are_not_annotations(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"a": [1,\n 2')
    with raises("annotation.bad_file", "half.json:2"):
        read_dataset("hc-stvg-v1", (tmp_path / "half.json",))
    (tmp_path / "latin.txt").write_bytes(b"AO8RW 0 1##caf\xe9\n")
    with raises("annotation.bad_file", "UTF-8"):
        read_dataset("charades-sta", (tmp_path / "latin.txt",))
    with raises("annotation.not_found", "nowhere", "vidstg"):
        read_dataset("vidstg", (tmp_path / "nowhere",))
    with raises("annotation.wrong_files", "1 files", "0 folders"):
        read_dataset("vidstg", (tmp_path / "half.json",))
    with raises("annotation.unknown_split", "charades-sta", "'val'"):
        read_dataset("charades-sta", (tmp_path / "latin.txt",), split="val")
    with raises("annotation.no_media_folder", tmp_path / "nowhere"):
        read_dataset("charades-sta", (tmp_path / "half.json",), tmp_path / "nowhere")
    with raises("annotation.unknown_dataset", "'imagenet'"):
        read_dataset("imagenet", ())


def test_the_digest_follows_the_annotations(tmp_path: Path) -> None:
    files = official.charades_sta(tmp_path)
    before = read(files).annotations
    assert before == read(files).annotations
    with open(files.annotations[0], "a") as file:
        file.write("AO8RW 1 2##more\n")
    assert read(files).annotations != before
