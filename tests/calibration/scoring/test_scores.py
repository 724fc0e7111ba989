"""Scores of models that know the truth, with chosen errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bridge_stg.calibration.scoring.agreement import agreement
from bridge_stg.calibration.scoring.scores import Scores, bootstrap, score_model, worst_cases
from bridge_stg.evaluation.datasets.jsonl import read_jsonl
from bridge_stg.evaluation.samples import Dataset
from tests.errors import raises
from tests.evaluation.fake_models import Oracle, model


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Four tubes of two seconds, an absent target, and a span."""
    boxes = [{"time": 0.25 * i, "box": [10, 10, 30, 30]} for i in range(4, 12)]
    lines = [{"id": f"t{i}", "video": "a.mp4", "query": f"tube {i}", "span": [1, 3], "boxes": boxes} for i in range(4)]
    lines += [{"id": "none", "video": "a.mp4", "query": "nothing", "span": None}]
    lines += [{"id": "span", "video": "a.mp4", "query": "it moves", "span": [0.5, 2.5]}]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "a.mp4").touch()
    return read_jsonl([tmp_path / "labels.jsonl"], tmp_path)


def scored(dataset: Dataset, folder: Path, oracle: Oracle, **options: object) -> Scores:
    label = f"shift {oracle.shift} delay {oracle.delay} {sorted(oracle.failing)}"
    return score_model(model(oracle, label), dataset, folder=folder, **options)  # type: ignore[arg-type]


def test_against_annotations(dataset: Dataset, tmp_path: Path) -> None:
    reference = scored(dataset, tmp_path / "out", Oracle(dataset))
    assert {name: m.value for name, m in reference.metrics.items()} == {"m_tIoU": 1, "m_vIoU": 1, "mIoU": 1}
    assert (reference.answer_agreement, reference.drops, reference.samples) == (None, {}, 6)
    moved = scored(dataset, tmp_path / "out", Oracle(dataset, shift=5.0), reference=reference)
    overlap = 15 * 15 / (2 * 400 - 15 * 15)
    assert moved.drops["m_vIoU"].value == pytest.approx(100 * (1 - overlap), abs=0.01)
    assert moved.drops["m_tIoU"].value == 0 and moved.drop == moved.drops["m_vIoU"].value
    assert moved.box_iou == pytest.approx(overlap, abs=1e-4)
    assert moved.answer_agreement == 1 and moved.changed == 0
    late = scored(dataset, tmp_path / "out", Oracle(dataset, delay=0.5), reference=reference)
    assert late.drops["m_tIoU"].value == pytest.approx(100 * (1 - 1.5 / 2.5), abs=0.01)
    assert late.drops["mIoU"].value == pytest.approx(100 * (1 - 1.5 / 2.5), abs=0.01)


def test_without_labels_the_references_own_tubes_are_the_truth(dataset: Dataset, tmp_path: Path) -> None:
    reference = scored(dataset, tmp_path / "out", Oracle(dataset, shift=5.0), labelled=False)
    assert {m.value for m in reference.metrics.values()} == {1.0}
    same = scored(dataset, tmp_path / "out", Oracle(dataset, shift=5.0), reference=reference, labelled=False)
    assert same.drop == 0 and same.tube_iou == 1 and not same.labelled
    truth = scored(dataset, tmp_path / "out", Oracle(dataset), reference=reference, labelled=False)
    assert truth.drops["m_vIoU"].value > 30  # closer to the annotation, but not to the reference


def test_failures_count_as_no_answer(dataset: Dataset, tmp_path: Path) -> None:
    reference = scored(dataset, tmp_path / "out", Oracle(dataset))
    failing = scored(dataset, tmp_path / "out", Oracle(dataset, failing=["tube 1"]), reference=reference)
    assert failing.failed == 1 and failing.drops["m_vIoU"].value == pytest.approx(25)
    assert failing.answer_agreement == pytest.approx(5 / 6)
    again = score_model(model(Oracle(dataset, failing=["tube 1"]), "b"), dataset, folder=tmp_path, reference=failing)
    assert again.answer_agreement == 1
    names = ["tube 0", "tube 1", "tube 2", "tube 3", "nothing", "it moves"]
    with raises("calibration.all_samples_failed", 6, "cannot see"):
        scored(dataset, tmp_path / "out", Oracle(dataset, failing=names))


def test_finished_samples_are_not_evaluated_again(dataset: Dataset, tmp_path: Path) -> None:
    oracle = Oracle(dataset)
    first = scored(dataset, tmp_path / "out", oracle)
    calls = len(oracle.calls)
    assert scored(dataset, tmp_path / "out", oracle).to_dict() == first.to_dict()
    assert len(oracle.calls) == calls == 6
    json.dumps(first.to_dict(), allow_nan=False)


def test_a_model_with_a_large_drop_is_stopped_early(tmp_path: Path) -> None:
    boxes = [{"time": 1.0, "box": [10, 10, 30, 30]}]
    lines = [{"id": f"{i}", "video": "a.mp4", "query": f"{i}", "span": [1, 3], "boxes": boxes} for i in range(60)]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "a.mp4").touch()
    dataset = read_jsonl([tmp_path / "labels.jsonl"], tmp_path)
    reference = scored(dataset, tmp_path / "out", Oracle(dataset))
    failing, good = Oracle(dataset, shift=100.0), Oracle(dataset, shift=0.01)
    assert scored(dataset, tmp_path / "out", failing, reference=reference, stop_above=1.0).drop == pytest.approx(100)
    assert len(failing.calls) == 16
    assert scored(dataset, tmp_path / "out", good, reference=reference, stop_above=1.0).samples == 60


def test_worst_cases(dataset: Dataset, tmp_path: Path) -> None:
    reference = scored(dataset, tmp_path / "out", Oracle(dataset))
    other = scored(dataset, tmp_path / "out", Oracle(dataset, failing=["tube 2"]), reference=reference)
    cases = worst_cases(other, reference, count=2)
    assert [case["id"] for case in cases] == ["t2", "t0"]
    assert cases[0]["scores"] == {reference.label: 1.0, other.label: 0.0}


def test_bootstrap_is_seeded_and_covers() -> None:
    values = np.random.default_rng(1).normal(0.7, 0.1, 400).tolist()
    found = bootstrap(values)
    assert found == bootstrap(values) != bootstrap(values, seed=1)
    error = 1.96 * 0.1 / 20
    assert found.high - found.value == pytest.approx(error, rel=0.2)
    assert found.low < 0.7 < found.high
    assert bootstrap([1.0, 1.0]).low == bootstrap([1.0, 1.0]).high == 1


def test_agreement() -> None:
    tube = {"found": True, "span": [0, 2], "times": [0.0, 1.0], "boxes": [[0, 0, 10, 10], [10, 0, 20, 10]]}
    late = {**tube, "span": [1, 3]}
    assert agreement("tube", tube, tube) == pytest.approx({"tIoU": 1, "vIoU": 1, "boxes": 1})
    shares = agreement("tube", tube, late)
    assert shares["tIoU"] == pytest.approx(1 / 3, abs=0.02) and shares["boxes"] == pytest.approx(1)
    assert agreement("tube", tube, {"found": False}) == {"tIoU": 0, "vIoU": 0}
    assert agreement("tube", {"found": False}, {"found": False}) == {"tIoU": 1, "vIoU": 1}
    assert agreement("tube", tube, {**tube, "span": [5, 6]}) == {"tIoU": 0, "vIoU": 0}
    assert agreement("span", tube, late) == {"IoU": pytest.approx(1 / 3)}
    image = {"found": True, "times": [0.0], "boxes": [[0, 0, 10, 10]]}
    assert agreement("image", image, {**image, "boxes": [[5, 0, 15, 10]]})["IoU"] == pytest.approx(1 / 3)
    assert agreement("track", tube, {**tube, "boxes": [[0, 0, 10, 10]] * 2})["AO"] == pytest.approx(0.5)
