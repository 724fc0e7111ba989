"""The replay in a subprocess: it needs no torch, reports errors, and measures its memory."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bridge_stg.export.parity.golden_cases import random_cases
from bridge_stg.export.parity.probes import PROBE_SIZES, RandomCase, feeds_of, load_cases
from bridge_stg.export.parity.replay import Replays, replay_in_subprocess
from bridge_stg.model.model import BridgeSTG
from bridge_stg.runtime.bundle.bundle import Bundle
from tests.errors import raises


def save_random_cases(name: str, model: BridgeSTG, folder: Path) -> None:
    for index, case in enumerate(random_cases(name, model)):
        case.save(folder / f"{name}_{index}.npz")


def test_cases_are_read_as_they_were_written(model: BridgeSTG, tmp_path: Path) -> None:
    save_random_cases("language_model", model, tmp_path)
    found = list(load_cases(tmp_path, "language_model"))
    assert [dict(case.sizes) for case in found] == [dict(sizes) for sizes in PROBE_SIZES["language_model"]]
    feeds, past = feeds_of("language_model", model.spec, found[2].sizes, np.random.default_rng([0, 2]))
    assert past is not None and found[2].past is not None
    for mine, theirs in ((found[2].feeds, feeds), (found[2].past, past)):
        assert mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert set(found[1].dependence) == {f"language_model.{tensor}" for tensor in ("logits", "taps", "kv")}
    assert not found[0].dependence and list(load_cases(tmp_path, "vision_encoder")) == []


@pytest.mark.slow
def test_a_subprocess_replays(exported: Bundle, model: BridgeSTG, tmp_path: Path) -> None:
    save_random_cases("spatial_decoder", model, tmp_path)
    graph = exported.graph("spatial_decoder", "primitive")
    path = exported.graph_path("spatial_decoder", "primitive")
    found = replay_in_subprocess([(graph, path)], tmp_path, exported.golden_cases(), threads=1)
    assert not found.parity.failures and found.parity.least_iou is not None and found.parity.least_iou > 0.999
    assert found.peak_rss_bytes > 10**7 and list(found.seconds) == ["spatial_decoder (primitive)"]
    with Replays(tmp_path, exported.golden_cases(), low_memory=True) as replays:
        for _ in range(2):
            replays.add([(graph, path)])
        saving = replays.finish()
    assert not saving.parity.failures and len(saving.parity.boundaries) == 2 * len(found.parity.boundaries)
    case = RandomCase.load(tmp_path / "spatial_decoder_2.npz")
    wrong = dataclasses.replace(case, expected={**case.expected, "boxes": case.expected["boxes"] * 0.9})
    wrong.save(tmp_path / "spatial_decoder_2.npz")
    failures = replay_in_subprocess([(graph, path)], tmp_path, [], threads=1).parity.failures
    assert [failure.name for failure in failures] == [f"spatial_decoder.boxes (primitive; {case.dims})"]


@pytest.mark.slow
def test_an_unreadable_graph_is_reported(exported: Bundle, tmp_path: Path) -> None:
    graph = exported.graph("spatial_decoder", "primitive")
    with raises("engine.rejected_graph", "spatial_decoder (primitive)", "nowhere.onnx"):
        replay_in_subprocess([(graph, tmp_path / "nowhere.onnx")], tmp_path, [])


def test_the_subprocess_needs_neither_torch_nor_onnx() -> None:
    code = (
        "import sys, json; sys.path[:] = json.loads(sys.argv[1]); import bridge_stg.export.parity.replay; "
        "print([name for name in ('torch', 'transformers', 'onnx', 'onnx_ir') if name in sys.modules])"
    )
    arguments = json.dumps([path or "." for path in sys.path])
    done = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
