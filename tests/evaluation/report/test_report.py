"""The values of report.json, and the page."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bridge_stg.evaluation.datasets.registry import read_dataset
from bridge_stg.evaluation.report.pictures import MODELS, TRUE
from bridge_stg.evaluation.report.report import table_text, write_report
from bridge_stg.evaluation.run.evaluate import evaluate
from tests.evaluation.fake_models import Oracle, model
from tests.evaluation.official import ALL, video
from tests.evaluation.validation import validate


class Reader(HTMLParser):
    """Collects tags and what they refer to; complains where tags do not close."""

    VOID = ("meta", "img", "rect", "line", "br", "li")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    root = tmp_path_factory.mktemp("report")
    files = ALL["jsonl"](root, video)
    path = files.annotations[0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines += [
        {"video": "lost <b>.mp4", "query": "x", "span": None},
        {"video": "a.mp4", "query": "<i>&", "span": [0, 1]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = read_dataset("jsonl", files.annotations, files.media)
    models = [model(Oracle(dataset), "exact"), model(Oracle(dataset, shift=6, delay=1, failing=["<i>&"]), "off")]
    (root / "out").mkdir()
    values = write_report(evaluate(dataset, models, root / "out"), root / "out")
    assert json.loads((root / "out/report.json").read_text(encoding="utf-8")) == values
    validate(values, "evaluation_report")
    for file in (root / "out/samples").iterdir():
        header, *rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        validate(header, "evaluation_header")
        for row in rows:
            validate(row, "evaluation_row")
    assert sorted(p.name for p in (root / "out").iterdir()) == ["report.html", "report.json", "samples"]
    return values, (root / "out/report.html").read_text(encoding="utf-8")


def test_values(reported: tuple[dict[str, Any], str]) -> None:
    values, _ = reported
    assert values["samples"] == 7 and values["missing"] == ["lost <b>.mp4"] and values["missing_samples"] == 1
    assert values["finished"] == {"exact": 6, "off": 6}
    difference = values["differences"]["off"]
    assert difference["reference"] == "exact" and difference["samples"] == 6
    assert difference["same"] == pytest.approx(1 / 6)  # the absent one
    assert difference["lowest"] == -1 and difference["highest"] == 0 and -1 < difference["mean"] < 0
    assert sum(difference["histogram"]["counts"]) == 6 and len(difference["histogram"]["counts"]) % 2 == 1
    assert values["failed"]["off"] == [{"id": "7", "error": "RuntimeError: cannot see <i>&"}]
    losses = [case for case in values["worst"] if case["why"] == "largest losses of off against exact"]
    assert [case["id"] for case in values["worst"]][:1] == ["1"] or losses
    text = table_text(values)
    assert re.search(r"tube +exact +off\n", text) and "1 media were not found (1 samples left out)" in text
    assert re.search(r"m_vIoU +1\.0000 +0\.\d{4}\n", text)


def test_page_is_whole_and_self_contained(reported: tuple[dict[str, Any], str]) -> None:
    _, page = reported
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    assert "script" not in reader.tags and "link" not in reader.tags and "svg" in reader.tags
    assert reader.references and all(value.startswith("data:image/png;base64,") for value in reader.references)
    assert "url(" not in page and "@import" not in page
    assert "width=device-width" in page and "prefers-color-scheme" in page
    assert "lost &lt;b&gt;.mp4" in page and "“&lt;i&gt;&amp;”" in page and "<i>" not in page
    for label in ("exact", "off", "AUROC", "Acc@0.5", "SR@0.75"):
        assert label in page


def test_pictures_show_truth_and_answers(reported: tuple[dict[str, Any], str]) -> None:
    _, page = reported
    encoded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(encoded) >= 5  # tube, span, image, track, and the one that failed
    seen: set[tuple[int, int, int]] = set()
    for data in encoded:
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)
        for colour in (TRUE, *MODELS[:2]):
            if (np.abs(picture - colour).sum(-1) < 40).sum() > 20:
                seen.add(colour)
    assert seen == {TRUE, *MODELS[:2]}


def test_histograms_have_a_bar_per_filled_bin(reported: tuple[dict[str, Any], str]) -> None:
    values, page = reported
    histograms = [difference["histogram"] for difference in values["differences"].values()]
    histograms += values["scores"].values()
    assert page.count("<rect") == sum(count > 0 for histogram in histograms for count in histogram["counts"])
    highest = max(histograms[0]["counts"])
    assert f"highest bar: {highest} sample{'s' * (highest != 1)};" in page
