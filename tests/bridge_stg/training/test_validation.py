"""Validation on held-out samples: the choice, the shares of processes, and the metrics of `evaluate`."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bridge_stg.evaluation.datasets.registry import read_dataset
from bridge_stg.evaluation.metrics import temporal_iou, tube_iou
from bridge_stg.evaluation.run.evaluate import evaluate
from bridge_stg.model.torch_session import torch_grounder
from bridge_stg.training.recipe import Source, Validation
from bridge_stg.training.validation import Validator, divide, metrics, read_settings
from tests.errors import raises
from tests.evaluation.fake_models import Oracle, model
from tests.evaluation.official import Files, charades_sta, jsonl, refcoco, video, vidstg


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Five samples: a tube, an absent target, a span, an image, a track."""
    return jsonl(tmp_path_factory.mktemp("own"), video)


def source(files: Files, **values: Any) -> Source:
    return Source(tuple(map(str, files.annotations)), files.name, str(files.media), files.split, **values)


def oracle(files: Files, **errors: Any) -> Oracle:
    return Oracle(read_dataset(files.name, files.annotations, files.media, split=files.split), **errors)


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_metrics_are_those_of_the_tasks_computed_by_hand(own: Files) -> None:
    validator = Validator(Validation((source(own),)), seed=0)
    found = metrics(validator.validate(oracle(own, shift=6, delay=1)))
    # A box of 24 × 24, moved by 6 in both directions, shares 18 × 18; the track's first box is not scored.
    box = 18**2 / (2 * 24**2 - 18**2)
    # The tube has the frames 5–14 of 5 per second, scored at 10 per second: 1.0 … 2.9; the answer begins 10 later.
    inside, covered = np.arange(40) < 20, np.arange(40) >= 10
    covered[30:] = False
    # After the last box that the oracle knows, at 2.9 s, its tube repeats it; only frames that both have count.
    boxes = np.tile([0.0, 0.0, 24.0, 24.0], (40, 1))
    assert found["m_tIoU"] == pytest.approx(10 / 30)
    assert found["m_vIoU"] == pytest.approx(tube_iou(inside, boxes, covered, boxes + 6)) == pytest.approx(box / 3)
    assert found["vIoU@0.3"] == found["vIoU@0.5"] == 0
    assert found["mIoU"] == pytest.approx(temporal_iou((0, 4), (1, 5))) and found["R1@0.5"] == 1
    assert found["Acc@0.5"] == float(box >= 0.5) and found["AO"] == pytest.approx(box, abs=1e-3)
    assert found["absent recognized"] == found["AUROC"] == 1
    assert set(found) == set(validator.metric_names)


def test_the_metrics_are_those_of_evaluate(own: Files, tmp_path: Path) -> None:
    dataset = read_dataset("jsonl", own.annotations, own.media)
    evaluated = evaluate(dataset, [model(oracle(own, shift=3, failing=["the square moves"]))], tmp_path).metrics
    validator = Validator(Validation((source(own),)), seed=0)
    found = metrics(validator.validate(oracle(own, shift=3, failing=["the square moves"])))
    for task in ("tube", "span", "image", "track"):
        for name, value in evaluated["oracle"][task].items():
            assert name in ("samples", "failed", "absent") or found[name] == value
    assert found["mIoU"] == 0  # a failure counts


def test_shares_of_processes_together_are_all(own: Files, tiny_model) -> None:
    validator, grounder = Validator(Validation((source(own),)), seed=0), torch_grounder(tiny_model)
    done: list[tuple[int, int]] = []
    everything = validator.validate(grounder, progress=lambda *place: done.append(place))
    assert done == [(place, 5) for place in range(1, 6)] and not any("error" in row for row in everything)
    shares = [validator.validate(grounder, process=process, processes=2) for process in range(2)]
    assert [len(share) for share in shares] == [3, 2]
    assert comparable(sorted(shares[0] + shares[1], key=lambda row: row["index"])) == comparable(everything)
    assert metrics(shares[0] + shares[1]) == metrics(everything)
    assert set(metrics(everything)) == set(validator.metric_names)
    assert validator.validate(grounder, process=5, processes=6) == []


def test_a_model_of_several_dtypes_answers_with_autocast(own: Files, tiny_model) -> None:
    mixed = copy.deepcopy(tiny_model)
    mixed.language_model.model.layers.to(torch.bfloat16)
    validator = Validator(Validation((source(own),)), seed=0)
    assert any("error" in row for row in validator.validate(torch_grounder(mixed)))
    rows = validator.validate(torch_grounder(mixed, autocast=torch.bfloat16))
    assert not any("error" in row for row in rows) and len(rows) == 5


class AnyOf:
    """Answers by the first oracle that knows the query of a task."""

    def __init__(self, *oracles: Oracle) -> None:
        self.oracles = oracles

    def __getattr__(self, name: str) -> Any:
        task = {"ground": "tube", "locate": "image"}.get(name, name)

        def call(media: Any, *rest: Any, query: str | None = None, **options: Any) -> Any:
            asked = {} if query is None else {"query": query}
            known = next(one for one in self.oracles if (task, query or rest[0]) in one.truths)
            return getattr(known, name)(media, *rest, **asked, **options)

        return call


def test_sources_pool_their_samples_by_task(own: Files, tmp_path: Path) -> None:
    files = [own]
    for make in (charades_sta, vidstg, refcoco):
        (tmp_path / make.__name__).mkdir()
        files.append(make(tmp_path / make.__name__, video))
    validator = Validator(Validation(tuple(map(source, files)), metric="AO"), seed=0)
    assert [len(names) for names in validator.missing] == [0, 1, 0, 0]  # Charades-STA lists a video that is not there
    assert Counter(sample.task for sample in validator.samples) == {"tube": 6, "span": 3, "image": 3, "track": 1}
    rows = validator.validate(AnyOf(*map(oracle, files)))
    assert not any("error" in row for row in rows)
    assert Counter(row["source"] for row in rows) == {"jsonl": 5, "charades-sta": 2, "vidstg": 4, "refcoco": 2}
    found = metrics(rows)
    assert found["Acc@0.5"] == found["R1@0.5"] == found["vIoU@0.5"] == 1 and found["AO"] == pytest.approx(1)


def test_the_choice_follows_from_the_seed_and_weights(own: Files, tmp_path: Path) -> None:
    lines = [{"video": "a.mp4", "query": f"query {i}", "span": [0, 1 + i / 100]} for i in range(40)]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = Source((str(tmp_path / "more.jsonl"),), media=str(own.media), limit=30, weight=3.0)

    def chosen(samples: int, seed: int = 0) -> list[str]:
        validation = Validation((source(own), more), samples=samples, metric="R1@0.5")
        return [sample.query for sample in Validator(validation, seed).samples]

    assert chosen(8) == chosen(8) != chosen(8, seed=1)
    assert sum(query.startswith("query ") for query in chosen(8)) == 6
    assert set(chosen(4)) < set(chosen(8)) and len(set(chosen(1000))) == 34  # two queries are the same
    assert not {f"query {i}" for i in range(30, 40)} & set(chosen(1000))


@pytest.mark.parametrize(
    ("weights", "sizes", "total", "expected"),
    [
        ([1, 1], [10, 10], 8, [4, 4]),
        ([0.6, 0.4], [10, 10], 4, [2, 2]),
        ([3, 1], [2, 10], 8, [2, 6]),
        ([1, 1], [0, 3], 8, [0, 3]),
        ([7, 2, 1], [99, 99, 99], 10, [7, 2, 1]),
    ],
)
def test_shares_follow_the_weights(weights: list[float], sizes: list[int], total: int, expected: list[int]) -> None:
    assert divide(weights, sizes, total) == expected


def test_rows_and_settings_are_written(own: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.annotations[0].parent)
    validation = Validation((Source(("own.jsonl",), media="media"),), samples=5, metric="AO", patience=2)
    validator = Validator(validation, seed=7)
    rows = validator.validate(oracle(own))
    path = validator.write(tmp_path, "joint", 500, rows[::-1])
    assert path == tmp_path / "validation" / "joint-500.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    monkeypatch.chdir(tmp_path)  # the settings name the files wherever they are read
    read, seed = read_settings(tmp_path)
    assert seed == 7 and dataclasses.replace(read, sources=()) == dataclasses.replace(validation, sources=())
    assert [sample.id for sample in Validator(read, seed).samples] == [sample.id for sample in validator.samples]


def test_the_summary_names_media_that_were_not_found(tmp_path: Path) -> None:
    files = charades_sta(tmp_path, video)
    summary = Validator(Validation((source(files),), metric="mIoU"), 0).summary()
    assert "validation: 2 samples" in summary and "1 media not found: 3MSZA.mp4" in summary


def test_bad_settings(own: Files, tmp_path: Path) -> None:
    with raises("training.bad_recipe", "m_IoU", "m_vIoU"):
        Validator(Validation((source(own),), metric="m_IoU"), 0)
    with raises("evaluation.no_media"):
        Validator(Validation(()), 0)
    (tmp_path / "empty").mkdir()
    with raises("evaluation.no_media", own.annotations[0]):
        Validator(Validation((dataclasses.replace(source(own), media=str(tmp_path / "empty")),)), 0)
    with raises("annotation.not_found", tmp_path / "none.jsonl"):
        Validator(Validation((Source((str(tmp_path / "none.jsonl"),)),)), 0)
