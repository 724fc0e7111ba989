"""Every row of the chain's runner on the tiny model: torch and the bundle on the same inputs, with a fixed answer."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from speed.parity import parity
from speed.peers.protocol import Load, answer_requests
from speed.results.growth import answer_ids, cases
from speed.run_chain import load_ours, load_torch
from speed.workload.bundles import prepare, quantize
from speed.workload.clips import QUERIES, clip
from speed.workload.inputs import record

from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.runtime.video.open import open_source

if TYPE_CHECKING:
    from bridge_stg.runtime.bundle.bundle import Bundle

FRAMES, SIZE = 6, (128, 96)
ROWS = ("vision", "prefill", "prefill_text", "decode", "bridge", "spatial", "end_to_end")
Answers = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record the inputs of every row."""
    made = tmp_path_factory.mktemp("bench") / "inputs"
    record(checkpoint, made, FRAMES, SIZE)
    return made


@pytest.fixture(scope="module")
def ask(checkpoint: Path, exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Load], Answers]:
    """Return a function that loads a model in this process and answers requests."""
    model = {"name": "tiny", "checkpoint": str(checkpoint), "folder": ".", "bundles": {"fp32": str(exported.path)}}

    def of(load: Load) -> Answers:
        def answered(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
            first = {"do": "load", "model": model, "precision": "fp32", "threads": 1}
            answers = io.StringIO()
            answer_requests(load, io.StringIO("".join(json.dumps(r) + "\n" for r in (first, *requests))), answers)
            found = [json.loads(line) for line in answers.getvalue().split("\n")[:-1]]
            assert all(answer["ok"] for answer in found), found
            return found

        return answered

    return of


def request(row: str, inputs: Path, out: Path) -> dict[str, Any]:
    return {"do": "run", "row": row, "inputs": str(inputs), "repeat": 1, "outputs": str(out)}


def test_every_row_agrees_with_the_reference(folder: Path, ask: Callable[[Load], Answers], tmp_path: Path) -> None:
    outputs: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, load in (("torch", load_torch), ("ours", load_ours)):
        files = {row: tmp_path / f"{row}_{name}.npz" for row in ROWS}
        loaded, *answers = ask(load)([request(row, folder / f"{row}.npz", files[row]) for row in ROWS])
        assert set(ROWS) < set(loaded["rows"]) and loaded["load_s"] > 0
        tokens = dict(zip(ROWS, (answer["tokens"] for answer in answers), strict=True))
        assert tokens["prefill"] == tokens["prefill_text"] > 20 and tokens["decode"] == 16
        outputs[name] = {row: dict(np.load(file, allow_pickle=False)) for row, file in files.items()}
    for row in ROWS:
        found = parity(row, outputs["ours"][row], outputs["torch"][row])
        assert found.get("worst_cosine", 1.0) > 0.9999 and found.get("worst_iou", 1.0) > 0.99, (row, found)
    details = [json.loads(str(found["end_to_end"]["details"])) for found in outputs.values()]
    assert details[0]["answer"] == details[1]["answer"]
    assert details[0]["calls"] == details[1]["calls"] and details[0]["language_steps"] >= 2
    for found in details:
        assert 0 < found["first_token"] < found["total"] and sum(found["graphs"].values()) < found["total"]


def test_the_answer_is_the_one_that_was_given(
    folder: Path, exported: Bundle, ask: Callable[[Load], Answers], tmp_path: Path
) -> None:
    spec, tokenizer = exported.manifest.spec, Tokenizer.from_file(exported.tokenizer_path)
    said = []
    for groups in ((0, 0), (1, 2)):
        ids = answer_ids(spec, tokenizer, FRAMES, groups)
        with np.load(folder / "end_to_end.npz", allow_pickle=False) as held:
            inputs = {**dict(held), "answer_ids": np.array(ids), "count": np.array(3)}
        np.savez(tmp_path / "in.npz", **inputs)
        ask(load_ours)([request("queries", tmp_path / "in.npz", tmp_path / "out.npz")])
        details = json.loads(str(np.load(tmp_path / "out.npz", allow_pickle=False)["details"]))
        said.append((details["answer"], tokenizer.decode(ids)))
    assert all(answer == given for answer, given in said) and said[0] != said[1]


def test_missing_precisions_are_made_by_the_parts_of_calibration(
    checkpoint: Path, exported: Bundle, tmp_path: Path
) -> None:
    quantize(exported.path, tmp_path / "int8", "w8a8", tmp_path)
    graphs = type(exported).load(tmp_path / "int8").manifest.graphs
    assert {graphs[name]["ort-cpu"].precision for name in ("vision_encoder", "language_model")} == {"int8 w8a8"}
    kept = (tmp_path / "statistics" / "statistics.json").stat().st_mtime_ns
    quantize(exported.path, tmp_path / "int4", "w4", tmp_path)
    assert (tmp_path / "statistics" / "statistics.json").stat().st_mtime_ns == kept  # collected once
    given = {"checkpoint": checkpoint, "fp32": exported.path, "int8": tmp_path / "int8"}
    model = prepare("tiny", tmp_path, ("fp32", "int8"), given)
    assert model.spec.language.vocab_size > 0 and list(model.bundles) == ["fp32", "int8"]


def test_a_clip_has_the_frames_it_is_named_for(exported: Bundle, tmp_path: Path) -> None:
    spec = exported.manifest.spec
    for frames in (4, 10):
        with open_source(str(clip(tmp_path, spec, frames, size=SIZE)), spec) as source:
            coarse = source.coarse()
        assert coarse.frames.shape[0] * coarse.frames.shape[1] == frames
        assert coarse.duration_s == pytest.approx(frames / spec.frames.coarse_fps)
        assert float(coarse.frames.astype(float).std()) > 10  # not a flat image


def test_growth_varies_what_it_says(exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "speed.results.growth.clip", lambda folder, spec, frames, size: folder / f"{frames}_{size[0]}.mp4"
    )
    tokenizer = Tokenizer.from_file(exported.tokenizer_path)
    found = list(cases(exported.manifest.spec, tokenizer, tmp_path, ("tube", "queries", "batch", "resolution")))
    tubes = [case["inputs"]["answer_ids"].tolist() for case in found if case["axis"] == "tube"]
    assert len({tuple(ids) for ids in tubes}) == len(tubes) == 5
    assert [case["x"] for case in found if case["axis"] == "queries"] == [1, 2, 4, 8, 16] and len(QUERIES) >= 16
    assert [case["inputs"]["prefix_ids"].shape[0] for case in found if case["axis"] == "batch"] == [1, 2, 4, 8, 16]
    assert [case["x"] for case in found if case["axis"] == "resolution"] == [128**2, 192**2, 256**2, 352**2, 512**2]
