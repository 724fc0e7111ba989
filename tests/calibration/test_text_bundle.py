"""A whole calibration of a bundle with text heads, whose answers are noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bridge_stg.calibration.calibrate import Options, calibrate
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.reports import read_report
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.parity.verify import verify_bundle
from tests.calibration.test_calibrate import LOOSE, labelled
from tests.errors import raises
from tests.fakes.clips import pictures


@pytest.mark.slow
@pytest.mark.parametrize("family, recipe", [("qwen3_vl", "w8a8"), ("qwen2_5_vl", "w4")])
def test_calibrate(text_bundle: Callable[[str], Bundle], tmp_path: Path, family: str, recipe: str) -> None:
    source = text_bundle(family)
    samples = labelled(tmp_path, "samples", 1, count=2)
    options = Options(recipe=recipe, int8_cache=recipe == "w8a8", **LOOSE)
    calibrate(source.path, tmp_path / "quantized", samples=samples, options=options)
    bundle = Bundle.load(tmp_path / "quantized", check="all")
    assert set(bundle.manifest.graphs) == {"vision_encoder", "language_model"}
    precisions = {name: variants["standard"].precision for name, variants in bundle.manifest.graphs.items()}
    assert precisions["vision_encoder"] == "int8 w8a8"
    assert precisions["language_model"] == {"w8a8": "int8 w8a8-kv8", "w4": "int4 w4"}[recipe]
    assert {row["graph"] for row in read_report(bundle.path, "calibration")["graphs"]} <= set(bundle.manifest.graphs)
    with Grounder.load(bundle.path, threads=1) as grounder:
        frames = pictures(8, 64, 96)
        assert "".join(grounder.ask(((i / 4, frame) for i, frame in enumerate(frames)), "What is it?", max_tokens=5))
        found = grounder.ground(frames[0], "the car", allow_none=False)
        assert found.heads == "text" and found.found
    assert verify_bundle(bundle.path, backend="onnxruntime")


@pytest.mark.slow
def test_a_recipe_for_a_graph_that_the_bundle_lacks(text_bundle: Callable[[str], Bundle], tmp_path: Path) -> None:
    options = Options(graphs={"spatial_decoder": "w8"})
    path, samples = text_bundle("qwen3_vl").path, labelled(tmp_path, "s", 1)
    with raises("calibration.bad_recipe", "spatial_decoder", "language_model"):
        calibrate(path, tmp_path / "b", samples=samples, options=options)
    floats = Options(graphs={"vision_encoder": "float", "language_model": "float"})
    with raises("calibration.bad_recipe", "every graph"):
        calibrate(path, tmp_path / "b", samples=samples, options=floats)
    assert not (tmp_path / "b.calibration").exists()
