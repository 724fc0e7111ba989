"""The examples on the demo bundle and the sample clips."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bridge_stg.runtime import Grounder
from tests.examples.loading import EXAMPLES, load

CLIPS = sorted((Path(__file__).parents[4] / "assets" / "demo" / "clips").glob("*.mp4"))
QUERY = "the blue bird"


def test_embed(demo_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("embed.py").main(str(demo_bundle), str(CLIPS[0]), QUERY, "the red boat")
    found, *boxes = capsys.readouterr().out.splitlines()
    with Grounder.load(demo_bundle) as grounder:
        expected = grounder.ground(CLIPS[0], QUERY)
    assert expected.span is not None and expected.boxes is not None
    assert found == f"{QUERY}: {expected.span[0]:.2f} s to {expected.span[1]:.2f} s"
    assert len(boxes) >= len(expected.boxes) + 1 and "left, top, right, bottom:" in boxes[0]
    assert any(line.startswith("the red boat: ") for line in boxes)
    assert len((EXAMPLES / "embed.py").read_text(encoding="utf-8").splitlines()) <= 25


def test_analytics(demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, table, picture = tmp_path / "videos", tmp_path / "tubes.parquet", tmp_path / "summary.png"
    folder.mkdir()
    shutil.copy(CLIPS[0], folder / "a.mp4")
    (folder / "b.mp4").write_bytes(b"not a video" * 100)
    load("analytics.py").main(str(demo_bundle), str(folder), str(table), str(picture), QUERY, "the red boat")
    rows = pq.read_table(table).to_pylist()
    assert [(row["video"], row["query"]) for row in rows] == [
        ("a.mp4", QUERY), ("a.mp4", "the red boat"), ("b.mp4", QUERY), ("b.mp4", "the red boat")
    ]  # fmt: skip
    assert rows[0]["found"] and 0 <= rows[0]["start_s"] < rows[0]["end_s"] and 0 < rows[0]["area"] < 1
    assert rows[0]["error"] is None and "b.mp4" in rows[2]["error"] and rows[2]["found"] is None
    with Image.open(picture) as image:
        assert image.size[0] > 800 and len(image.convert("RGB").getcolors(1 << 24) or []) > 50
    assert "4 rows" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_draw_with_supervision(demo_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "drawn.mp4"
    load("draw_with_supervision.py").main(str(demo_bundle), str(CLIPS[0]), str(out), QUERY)
    with Grounder.load(demo_bundle) as grounder:
        boxes = grounder.ground(CLIPS[0], QUERY).boxes
    assert boxes is not None
    with av.open(str(CLIPS[0])) as before, av.open(str(out)) as after:
        pairs = list(zip(before.decode(video=0), after.decode(video=0), strict=True))
    for plain, drawn in pairs:
        differs = np.abs(plain.to_ndarray(format="rgb24").astype(int) - drawn.to_ndarray(format="rgb24")).max(axis=2)
        index = int(np.argmin(np.abs(boxes.times - plain.time)))
        if abs(boxes.times[index] - plain.time) > 1e-3:
            assert (differs > 100).mean() < 1e-3  # nothing is drawn outside the span
            continue
        left, top, _, bottom = boxes.boxes[index].astype(int)
        assert (differs[top:bottom, left : left + 2] > 60).mean() > 0.5  # the box's left side is where it should be


def test_tap_head(demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples, head = tmp_path / "labelled.jsonl", tmp_path / "head.npz"
    animals, vehicles = ("the bird", "the blue bird", "the dog", "the cat"), ("the bus", "the car", "the boat")
    labelled = [(query, "animal") for query in animals] + [(query, "vehicle") for query in vehicles]
    rows = [{"video": str(CLIPS[0]), "query": query, "label": label} for query, label in labelled]
    examples.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    module = load("tap_head.py")
    module.main(str(demo_bundle), str(examples), str(head))
    assert "7 examples of 2 labels" in capsys.readouterr().out
    for query, label in (("the blue bird", "animal"), ("the bus", "vehicle")):
        module.main(str(demo_bundle), "--ask", str(head), str(CLIPS[0]), query)
        likeliest = capsys.readouterr().out.splitlines()[0]
        assert likeliest.endswith(label)


def test_a_linear_head_learns_what_can_be_learned() -> None:
    module = load("tap_head.py")
    random = np.random.default_rng(0)
    labels = ["red", "green", "blue"] * 8
    features = random.normal(size=(24, 300))
    features += 2 * random.normal(size=(3, 300))[[i % 3 for i in range(24)]]
    assert module.left_out_accuracy(features, labels) > 0.8
    assert module.left_out_accuracy(random.normal(size=(24, 300)), labels) < 0.8
