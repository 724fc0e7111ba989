"""A block that fails in plain INT8 is found, named, and kept in float; the loss is then within the limit."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from bridge_stg.calibration.collect.collect import collect
from bridge_stg.calibration.collect.samples import read_samples
from bridge_stg.calibration.quantize.bundle import quantize_bundle
from bridge_stg.calibration.quantize.ranges import choose_ranges
from bridge_stg.calibration.quantize.scales import Scales
from bridge_stg.calibration.quantize.smooth import choose_smoothing
from bridge_stg.calibration.recipes import RECIPES
from bridge_stg.calibration.scoring.scores import score_model
from bridge_stg.calibration.search.matmul_errors import matmul_errors
from bridge_stg.calibration.search.search import fewest_in_float
from bridge_stg.calibration.search.sensitivity import rank_blocks
from bridge_stg.evaluation.datasets.jsonl import read_jsonl
from bridge_stg.evaluation.run.evaluate import bundle_model
from bridge_stg.export.graph.blocks import Matmul, find_matmuls
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.bundle.bundle import Bundle
from tests.calibration.hostile import hostile_bundle

DEMO = Path(__file__).parents[4] / "assets" / "demo"
LIMIT = 1.0
"""Points of m_tIoU and m_vIoU that may be lost: the default of the automatic mode."""

OPTIONS = {"backend": "auto", "variant": "standard", "threads": 1}


@pytest.fixture(scope="module")
def hostile(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The bundle with a hostile block, and the name of the block."""
    return hostile_bundle(demo_bundle, tmp_path_factory.mktemp("hostile") / "bundle", layer=2)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files of labelled clips, for the calibration and for the selection."""
    folder = tmp_path_factory.mktemp("samples")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEMO))
        script = importlib.import_module("make_calibration")
    files = []
    for name, seed, counts in (
        ("calibration", script.CALIBRATION_SEED, {"named": 4, "motion": 1, "absent": 1}),
        ("select", script.SELECT_SEED, {"named": 8, "motion": 0, "absent": 0}),
    ):
        files.append(folder / f"{name}.jsonl")
        lines = script.clip_lines(folder, name, seed, counts)
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return files[0], files[1]


@pytest.mark.slow
def test_the_block_is_harmless_in_float(demo_bundle: Path, hostile: tuple[Path, str]) -> None:
    clip = DEMO / "clips" / "1-named.mp4"
    query = clip.with_suffix(".txt").read_text(encoding="utf-8").strip()
    found = []
    for path in (demo_bundle, hostile[0]):
        with Grounder.load(path, variant="standard", threads=1) as grounder:
            found.append(grounder.ground(clip, query))
    assert found[0].answer == found[1].answer
    assert found[0].boxes is not None and found[1].boxes is not None
    assert np.allclose(found[0].boxes.boxes, found[1].boxes.boxes, atol=0.01)


@pytest.mark.slow
def test_the_block_is_ranked_first_and_kept_in_float(
    hostile: tuple[Path, str], labelled: tuple[Path, Path], tmp_path: Path
) -> None:
    path, block = hostile
    source, recipe = Bundle.load(path), RECIPES["w8a8"]
    statistics = collect(source, read_samples(labelled[0]), folder=tmp_path / "statistics", threads=1)
    matmuls: list[Matmul] = []
    for graph, chosen in recipe.graphs.items():
        if chosen.quantizes:
            matmuls += find_matmuls(ir.load(source.graph_path(graph, "standard")), graph)
    smoothing = choose_smoothing(statistics, recipe).vectors
    ranges = choose_ranges(statistics, matmuls, smoothing=smoothing)
    errors = matmul_errors(statistics, matmuls, recipe, scales=Scales(ranges, smoothing))
    ranked = rank_blocks(matmuls, errors)
    assert ranked[0].block == block and ranked[0].proxy > 3 * ranked[1].proxy

    dataset = read_jsonl([labelled[1]], labelled[1].parent)
    before = score_model(bundle_model(path, "float", **OPTIONS), dataset, folder=tmp_path / "answers")

    def loss(kept: tuple[str, ...]) -> float:
        name = f"int8-{len(tried)}"
        out = quantize_bundle(
            source, tmp_path / name, recipe=recipe.with_float(*kept), ranges=ranges, smoothing=smoothing,
            variants=("standard",),
        )  # fmt: skip
        model = bundle_model(out, name, **OPTIONS)
        tried[kept] = score_model(model, dataset, folder=tmp_path / "answers", reference=before).drop
        return tried[kept]

    tried: dict[tuple[str, ...], float] = {}
    choice = fewest_in_float([one.block for one in ranked], loss, limit=LIMIT, max_trials=8)
    assert tried[()] > 5 * LIMIT
    assert choice.within and block in choice.kept
