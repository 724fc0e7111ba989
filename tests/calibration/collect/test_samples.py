from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bridge_stg.calibration.collect.samples import read_samples, warnings_of
from bridge_stg.runtime.bundle.bundle import file_sha256
from bridge_stg.runtime.errors import AnnotationError
from tests.calibration.chain_samples import write_samples
from tests.errors import raises


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("samples"), copies=3)


def test_kinds_order_and_hashes(file: Path) -> None:
    samples = read_samples(file)
    assert samples.kinds == {"absent": 3, "image": 3, "span": 3, "track": 3, "tube": 6}
    assert [entry.id for entry in samples.entries] == [sample.id for sample in samples.dataset.samples]
    assert samples.entries[0].sha256 == file_sha256(file.parent / "a.mp4")
    assert not samples.labelled and samples.dataset.allow_none
    assert warnings_of(samples) == []
    values = json.loads(json.dumps(samples.to_dict()))
    assert values["count"] == 18 and values["entries"][4]["media"] == "c.png"


def test_the_digest_depends_on_content_not_on_the_folder(file: Path, tmp_path: Path) -> None:
    shutil.copytree(file.parent, tmp_path / "moved")
    moved = tmp_path / "moved" / file.name
    assert read_samples(moved).digest == read_samples(file).digest
    (tmp_path / "moved" / "a.mp4").write_bytes((file.parent / "b.mp4").read_bytes())
    assert read_samples(moved).digest != read_samples(file).digest
    assert read_samples(file, limit=7).digest != read_samples(file).digest


def test_warns_of_few_samples_and_of_one_kind(file: Path, tmp_path: Path) -> None:
    shutil.copytree(file.parent, tmp_path, dirs_exist_ok=True)
    lines = [line for line in file.read_text().splitlines() if "red car" in line]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    few, one_kind = warnings_of(read_samples(tmp_path / "few.jsonl"))
    assert "3 samples" in few and "16" in few
    assert "'tube'" in one_kind


def test_warns_of_media_shared_with_the_evaluation(file: Path, tmp_path: Path) -> None:
    samples = read_samples(file)
    shutil.copy(file.parent / "a.mp4", tmp_path / "renamed.mp4")
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text(json.dumps({"id": "x", "video": "renamed.mp4", "query": "other", "span": [0, 1]}))
    (warning,) = warnings_of(samples, {"evaluation": read_samples(evaluation)})
    assert "9 of the 18" in warning and "evaluation" in warning
    # The same sample with other bytes, as after a conversion, is found by its id and the name of its media.
    shutil.copy(file.parent / "b.mp4", tmp_path / "c.mkv")
    evaluation.write_text(json.dumps({"id": "5", "video": "c.mkv", "query": "other", "span": [0, 1]}))
    (warning,) = warnings_of(read_samples(file, limit=17), {"evaluation": read_samples(evaluation)})
    assert "7 of the 17" in warning  # 6 of b.mp4, and sample 5 of c.png
    shutil.copy(file.parent / "c.png", tmp_path / "d.png")
    evaluation.write_text(json.dumps({"image": "d.png", "query": "other", "boxes": [{"box": [0, 0, 9, 9]}]}))
    assert "3 of the 18" in warnings_of(samples, {"evaluation": read_samples(evaluation)})[0]


def test_equal_ids_are_named_with_their_file(file: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"id": "a", "video": "a.mp4", "query": "x"}\n' * 2, encoding="utf-8")
    with raises("annotation.duplicate_id", "twice.jsonl", "'a'"):
        read_samples(twice, file.parent)


def test_missing_media(file: Path, tmp_path: Path) -> None:
    shutil.copytree(file.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "b.mp4").unlink()
    samples = read_samples(tmp_path / file.name)
    assert len(samples.entries) == 12 and len(samples.missing) == 6
    assert any("6 samples" in warning for warning in warnings_of(samples))
    for name in ("a.mp4", "c.png"):
        (tmp_path / name).unlink()
    with raises("annotation.no_media", 18, "--media"):
        read_samples(tmp_path / file.name)


@pytest.mark.parametrize("line", ["{", "[1]", '{"video": "a.mp4"}', '{"video": "a.mp4", "query": "x", "task": "span"}'])
def test_bad_lines_are_named(file: Path, tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(AnnotationError) as caught:
        read_samples(path, file.parent)
    assert "bad.jsonl:1" in str(caught.value)
