"""The report says what was measured, carries its hash, and shows no name as markup."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from bridge_stg.calibration.report.report import html_page, report_values, table_text, write_calibration_report
from bridge_stg.runtime.bundle.reports import read_report
from bridge_stg.runtime.errors import BundleError
from tests.evaluation.validation import validate


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def judgement(label: str, value: float, *, drop: float | None) -> dict[str, Any]:
    return {
        "label": label, "samples": 200, "failed": 0, "labelled": True, "metrics": {"m_tIoU": interval(value)},
        "drops": {} if drop is None else {"m_tIoU": interval(drop)}, "seconds_median": 0.2,
        "answer_agreement": None if drop is None else 0.985, "box_iou": None if drop is None else 0.97,
        "tube_iou": None if drop is None else 0.96,
    }  # fmt: skip


def result(**changes: Any) -> dict[str, Any]:
    """Return what `CalibrationResult.to_dict` returns."""
    page = io.BytesIO()
    Image.new("RGB", (4, 4)).save(page, "PNG")
    samples = {
        "file": "calibration.jsonl", "sha256": "ab" * 32, "count": 1, "kinds": {"tube": 1}, "labelled": True,
        "entries": [{"id": "7", "kind": "tube", "media": "a.mp4", "sha256": "cd" * 32}],
    }  # fmt: skip
    graph = {
        "graph": "vision_encoder", "precision": "int8 w8a8", "recipe": "w8a8", "int8": True, "forced": False,
        "why": "INT8 is faster and smaller here", "bytes": {"float": 8_000_000, "int8": 2_500_000},
        "seconds": {"float": 0.2, "int8": 0.1},
        "blocks": [
            {"block": "vision_encoder.blocks.0.mlp", "bytes": 260, "float_bytes": 1000, "kept": False},
            {"block": "vision_encoder.blocks.1.mlp", "bytes": 1000, "float_bytes": 1000, "kept": True},
        ],
    }  # fmt: skip
    other = {
        **graph, "graph": "spatial_decoder", "precision": "fp32", "int8": False, "seconds": None, "blocks": [],
        "why": "it stays in float by default", "bytes": {"float": 6_000_000, "int8": 6_000_000},
    }  # fmt: skip
    part = {
        "labelled": True, "samples": 200, "judged_on": "select", "judgement": judgement("INT8", 0.95, drop=0.4),
        "float": judgement("float", 0.954, drop=None),
    }  # fmt: skip
    sensitivity = [
        {"block": "vision_encoder.blocks.1.mlp", "graph": "vision_encoder", "proxy": 0.8, "drop": 31.5, "changed": 0.4,
         "kept": True},
        {"block": "vision_encoder.blocks.0.mlp", "graph": "vision_encoder", "proxy": 0.004, "drop": None,
         "changed": None, "kept": False},
        {"block": "vision_encoder.merger", "graph": "vision_encoder", "proxy": 0.0, "drop": -0.1, "changed": 0.0,
         "kept": False},
    ]  # fmt: skip
    case = {
        "id": "3", "why": "its tube shares 0.10 with that of float", "query": "<b>the cat</b>", "media": "c.mp4",
        "scores": {"float": 0.9, "INT8": None},
    }  # fmt: skip
    values = {
        "source": {"name": "demo", "fingerprint": "ef" * 32, "precision": {}, "bytes": 22_000_000},
        "recipe": {"name": "w8a8", "graphs": {}, "kept": {"vision_encoder": ["vision_encoder.blocks.1.mlp"]},
                   "method": "least error", "max_drop": 1.0, "max_changed": None, "minimal": True, "seed": 0},
        "samples": {"calibration": samples, "select": samples, "evaluate": None},
        "warnings": ["1 sample is few"],
        "machine": {"processor": "A & B", "cores": 2, "flags": ["avx2"], "self_test": "matmuls are exact",
                    "system": "Linux", "python": "3.11.2"},
        "tools": {"onnxruntime": "1.32.0"},
        "target": {"backend": "onnxruntime", "version": "1.32.0", "variants": {"vision_encoder": "standard"}},
        "graphs": [graph, other],
        "stages": {"float": {"vision": 0.2, "total": 0.4}, "int8": {"vision": 0.1, "total": 0.3}, "clips": 5},
        "peak_bytes": {"float": 400_000_000, "int8": None},
        "drift": [{"graph": "vision_encoder", "tensor": "visual_tokens", "cosine": 0.9991, "max_abs": 0.3,
                   "rel_l2": 0.02, "iou": None}],
        "choice": part, "evaluation": None, "sensitivity": sensitivity,
        "trials": [{"kept": [], "drop": 31.0, "changed": 40.0, "within": False},
                   {"kept": ["vision_encoder.blocks.1.mlp"], "drop": 0.4, "changed": 1.5, "within": True}],
        "cases": [{**case, "picture": page.getvalue()}, {**case, "id": "4", "picture": None, "problem": "gone"}],
        "seconds": {"collect": 61.2},
    }  # fmt: skip
    return values | changes


def test_the_report_lies_in_the_bundle_and_carries_its_hash(tmp_path: Path) -> None:
    path = write_calibration_report(tmp_path, result())
    assert path == tmp_path / "reports" / "calibration.json"
    found = read_report(tmp_path, "calibration")
    validate(found, "calibration_report")
    assert found["samples"]["calibration"]["entries"] == [
        {"id": "7", "kind": "tube", "media": "a.mp4", "sha256": "cd" * 32}
    ]
    assert "picture" not in found["cases"][0] and found["cases"][1]["problem"] == "gone"
    path.write_text(path.read_text(encoding="utf-8").replace("0.954", "0.999"), encoding="utf-8")
    with pytest.raises(BundleError, match="was changed"):
        read_report(tmp_path, "calibration")


def test_the_page(tmp_path: Path) -> None:
    write_calibration_report(tmp_path, result())
    page = " ".join((tmp_path / "reports" / "calibration.html").read_text(encoding="utf-8").split())
    for text in (
        "1 sample is few", "vision_encoder.blocks.1.mlp", "+31.50 pts", "0.9500", "0.9850", "data:image/png;base64,",
        "No picture: gone", "&lt;b&gt;the cat&lt;/b&gt;", "A &amp; B", "avx2", "matmuls are exact", "0.260",
        "Evaluated on: nothing", "0.999100", "against annotations", "it stays in float by default", "400.00 MB",
    ):  # fmt: skip
        assert text in page, text
    assert "<b>the cat" not in page and "<script" not in page and "http" not in page


def test_without_labels_the_page_says_so(tmp_path: Path) -> None:
    part = {**result()["choice"], "labelled": False}
    write_calibration_report(tmp_path, result(choice=part, evaluation=part))
    page = (tmp_path / "reports" / "calibration.html").read_text(encoding="utf-8")
    assert page.count("the float bundle&#39;s own tubes (there were no labels)") == 2


def test_what_was_not_measured_is_no_number(tmp_path: Path) -> None:
    values = result(drift=[{"graph": "g", "tensor": "t", "cosine": float("nan"), "max_abs": float("inf"),
                            "rel_l2": None, "iou": None}], sensitivity=[], trials=[], cases=[], stages={})  # fmt: skip
    found = report_values(values)
    assert found["drift"][0]["cosine"] is None and found["drift"][0]["max_abs"] is None
    json.dumps(found, allow_nan=False)
    write_calibration_report(tmp_path, values)
    assert "nan" not in (tmp_path / "reports" / "calibration.html").read_text(encoding="utf-8").lower()


def test_the_plot_has_a_row_per_block_and_marks_what_stays_in_float() -> None:
    drawn = re.search(r"<svg.*?</svg>", html_page(result()), re.DOTALL)
    assert drawn is not None
    root = ElementTree.fromstring(drawn.group())
    bars = root.findall("rect")
    assert len(bars) == 3 and len(root.findall("circle")) == 2
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths[0] > widths[1] > widths[2] == 1
    assert bars[0].attrib["fill"] != bars[1].attrib["fill"] == bars[2].attrib["fill"]
    assert "<svg" not in html_page(result(sensitivity=[]))


def test_the_table_of_the_terminal() -> None:
    text = table_text(result())
    assert "warning: 1 sample is few" in text
    assert "8.00 → 2.50" in text and "200.0 → 100.0" in text
    assert "in float: it stays in float by default" in text
    assert "0.9540 → 0.9500  loses +0.40 points" in text
    assert text.endswith("blocks that stay in float: vision_encoder.blocks.1.mlp")
