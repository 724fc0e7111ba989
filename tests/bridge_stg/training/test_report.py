"""The page of a training: curves of every stage, validations, pictures, and what was skipped."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from bridge_stg.evaluation.datasets.registry import read_dataset
from bridge_stg.training.recipe import Source, Validation
from bridge_stg.training.report.curves import HEIGHT, MOST_POINTS, RIGHT, WIDTH, curve
from bridge_stg.training.report.report import ValidationMetrics, best_of, read_log, write_report
from bridge_stg.training.validation import Validator, metrics
from tests.errors import raises
from tests.evaluation.fake_models import Oracle
from tests.evaluation.official import jsonl, video

Point = tuple[float, float]


def polylines(page: str, label: str) -> list[list[Point]]:
    """Return the lines of the chart with this label."""
    chart = page.partition(f'aria-label="{label}"')[2].partition("</svg>")[0]
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]
        for points in re.findall(r'points="([^"]+)"', chart)
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of two stages, with two validations each; the third is the best."""
    root = tmp_path_factory.mktemp("trained")
    files = jsonl(root, video)
    source = Source((str(files.annotations[0]),), media=str(files.media))
    validator = Validator(Validation((source,)), seed=0)
    dataset = read_dataset("jsonl", files.annotations, files.media)
    folder = root / "out-training"
    folder.mkdir()
    lines: list[dict[str, Any]] = []
    for stage, shifts in (("align", (12, 8)), ("joint", (1, 4))):
        for step in range(10, 201, 10):
            figures = {"loss": 100 / step, "learning_rate": 1e-4, "iou": math.nan if step == 50 else step / 200}
            lines.append({"stage": stage, "step": step, "seconds": step * 2, **figures})
            if step % 100 == 0:
                rows = validator.validate(Oracle(dataset, shift=shifts[step // 100 - 1], failing=["the square moves"]))
                validator.write(folder, stage, step, rows)
                lines.append({"stage": stage, "step": step, "validation": metrics(rows)})
    lines.append({"stage": "joint", "step": 150, "event": "rolled back", "loss": 81.5})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "joi')
    (folder / "skipped.jsonl").write_text('{"media": "x.mp4", "reason": "no <frames>"}\n' * 2)
    (folder / "run.json").write_text(json.dumps({"recipe": {"seed": 0, "stages": [{"name": "align"}]}}))
    return folder


def test_the_page_has_curves_of_every_stage_pictures_and_what_was_skipped(trained: Path) -> None:
    path = write_report(trained)
    page = path.read_text(encoding="utf-8")
    assert path == trained / "train_report.html"
    for stage in ("align", "joint"):
        for name in ("loss", "learning_rate", "m_tIoU", "m_vIoU", "R1@0.5", "Acc@0.5", "AO"):
            (line,) = polylines(page, f"{name} of {stage}")
            assert len(line) == (20 if name in ("loss", "learning_rate") else 2)
        assert [len(line) for line in polylines(page, f"iou of {stage}")] == [4, 15]  # NaN interrupts the line
    falling = polylines(page, "loss of align")[0]
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(falling))  # y points down
    assert "Best checkpoint by m_vIoU: joint, step 100" in page
    assert "best (joint, step 100)" in page and "newest (joint, step 200)" in page
    assert page.count('src="data:image/png;base64,') == 5 and "cannot see the square moves" in page
    assert "rolled back 1" in page and "loss: 81.5" in page and "no &lt;frames&gt;" in page and "recipe.seed" in page
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", page, re.S)) and "<script" not in page


def test_pictures_need_the_media_and_the_rest_does_not(trained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved-training"
    shutil.copytree(trained, moved)
    path = moved / "validation" / "validation.json"
    path.write_text(path.read_text().replace("own.jsonl", "gone.jsonl"))
    page = write_report(moved).read_text(encoding="utf-8")
    assert "gone.jsonl" in page and "data:image/png" not in page
    assert "Best checkpoint by m_vIoU: joint, step 100" in page and polylines(page, "m_vIoU of joint")
    shutil.rmtree(moved / "validation")
    assert polylines(write_report(moved).read_text(encoding="utf-8"), "m_vIoU of joint")


def test_a_resumed_training_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    steps = [(1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0), (3, math.inf)]
    text = "".join(
        json.dumps({"stage": "a", "step": step, "seconds": step, "loss": loss}) + "\n" for step, loss in steps
    )
    text += '{"stage": "a", "step": 3, "validation": {"AO": 0.5, "AUROC": NaN}}\n'
    (tmp_path / "log.jsonl").write_text(text * 2)
    stage = read_log(tmp_path).stages["a"]
    assert stage.figures == {"loss": [(1, 9.0), (2, 5.0), (3, math.inf)]} and (stage.step, stage.seconds) == (3, 3)
    assert [one.step for one in stage.validations] == [3]
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert len(polylines(page, "loss of a")) == 1 and len(polylines(page, "AO of a")) == 1


def test_a_folder_without_a_log(tmp_path: Path) -> None:
    with raises("training.no_log", tmp_path):
        write_report(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    assert "No step is logged yet" in write_report(tmp_path).read_text(encoding="utf-8")


def test_damaged_lines_are_left_out(trained: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged-training"
    shutil.copytree(trained, damaged)
    bad = [
        '{"stage": "al{}', "[1]", '{"stage": "align", "step": "x"}', '{"step": 1}', '{"stage": "align"}',
        '{"stage": "align", "step": 1, "validation": 3}', "\0\0\0",
    ]  # fmt: skip
    log = damaged / "log.jsonl"
    log.write_text("".join(line + "\n" for line in bad) + log.read_text())
    (damaged / "run.json").write_text("{")
    rows = damaged / "validation" / "joint-200.jsonl"
    wrong = [
        '{"index": 99, "task": "tube", "scores": {}}',
        '{"index": 1}',
        '{"index": 0, "task": "x", "scores": {}}',
        "1",
    ]
    rows.write_text("\n".join(wrong + rows.read_text().splitlines()[1:]) + "\n")
    page = write_report(damaged).read_text(encoding="utf-8")
    assert f"{len(bad)} lines of log.jsonl cannot be read" in page
    assert len(polylines(page, "loss of align")[0]) == 20 and page.count("data:image/png") == 4
    (damaged / "validation" / "validation.json").write_text("[]")
    page = write_report(damaged).read_text(encoding="utf-8")
    assert "validation.json" in page and "data:image/png" not in page


def test_the_best_is_the_earliest_with_the_largest_value() -> None:
    values = [math.nan, 0.1, 0.4, 0.4, 0.2]
    validations = [ValidationMetrics("a", step, {"AO": value}) for step, value in enumerate(values)]
    assert best_of([*validations, ValidationMetrics("b", 0, {})], "AO").step == 2


@pytest.mark.parametrize(
    "values",
    [
        [1.0], [0.0, 0.0], [1e-9, 2e-9], [1e12, -1e12], [math.nan], [math.nan, 1.0, math.inf], [5.0] * 3, [-3.0] * 2,
        [1000.0, 1.0, 0.001], [2.0**-k for k in range(40)], [1e-30 * 3**k for k in range(99, 0, -1)],
        list(range(5000)), [math.nan] * 4000 + [1.0],
    ],
)  # fmt: skip
def test_curves_stay_in_their_charts(values: list[float]) -> None:
    chart = curve("loss", [(10 * step, value) for step, value in enumerate(values, 1)], marks=len(values) < 10)
    finite = [value for value in values if math.isfinite(value)]
    assert chart.last == (finite[-1] if finite else None)
    points = [tuple(map(float, pair.split(","))) for line in (*chart.lines, *chart.smoothed) for pair in line.split()]
    assert len(points) <= 2 * MOST_POINTS and bool(points) == bool(finite)
    points += (
        [(x, y) for x, y, *_ in chart.marks] + [(0, y) for y, _ in chart.y_ticks] + [(x, 0) for x, _ in chart.x_ticks]
    )
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    if finite:
        assert 1 <= len(chart.y_ticks) <= 8 and 1 <= len(chart.x_ticks) <= 8
        assert len({label for _, label in chart.y_ticks}) == len(chart.y_ticks)


def test_a_single_point_is_a_dot() -> None:
    (line,) = curve("loss", [(50, 1.5)]).lines
    first, second = line.split()
    assert first == second and float(first.split(",")[0]) == WIDTH - RIGHT


def test_values_that_fall_by_much_are_on_a_logarithmic_axis() -> None:
    assert curve("loss", [(1, 100.0), (2, 1.0)]).logarithmic and not curve("iou", [(1, 0.01), (2, 1.0)]).logarithmic
    assert not curve("learning_rate", [(1, 1e-3), (2, 1e-6)]).logarithmic
    assert not curve("loss", [(1, 100.0), (2, 0.0)]).logarithmic
