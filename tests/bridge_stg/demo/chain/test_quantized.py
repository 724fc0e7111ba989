"""The demo bundle in int8 and int4, with ranges of its golden cases: the chain gives nearly the same tubes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bridge_stg.calibration.quantize.bundle import quantize_bundle
from bridge_stg.calibration.recipes import RECIPES
from bridge_stg.export.parity.golden_cases import scene
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.chain.boxes import box_iou
from bridge_stg.runtime.parity.verify import verify_bundle
from tests.calibration.golden_ranges import golden_ranges
from tests.calibration.sizes import quantized_share

pytestmark = pytest.mark.slow


def test_the_quantized_demo(demo_bundle: Path, tmp_path: Path) -> None:
    source = Bundle.load(demo_bundle)
    ranges = golden_ranges(source, tmp_path / "ranges")
    with Grounder.load(demo_bundle, threads=1) as grounder:
        expected = grounder.ground(scene(), "the red square", allow_none=False)
    assert expected.boxes is not None
    for name in ("w8a8", "w8", "w4"):
        recipe = RECIPES[name].with_int8_cache() if name == "w8a8" else RECIPES[name]
        path = quantize_bundle(source, tmp_path / name, recipe=recipe, ranges=ranges)
        assert set(verify_bundle(path, threads=1)) == {"ort-cpu", "standard", "primitive"}
        assert quantized_share(Bundle.load(path)) < 0.3
        with Grounder.load(path, threads=1) as grounder:
            found = grounder.ground(scene(), "the red square", allow_none=False)
        assert found.boxes is not None
        if name != "w4":
            assert found.named_span == expected.named_span
            ious = box_iou(found.boxes.boxes, expected.boxes.boxes)
            assert np.mean(ious) > 0.9, name
