"""The JSON schema of results: it is valid, and every kind of result agrees with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bridge_stg import cli
from bridge_stg.evaluation import schema
from bridge_stg.evaluation.run.parquet import answer_schema
from bridge_stg.runtime.heads.options import TextOptions
from tests.bridge_stg.commands.fake_grounder import complaint
from tests.evaluation.validation import validate
from tests.fakes.answers import SCRIPT
from tests.fakes.chain import clip, fake_grounder, text_spec
from tests.fakes.live_chain import live_grounder, stream

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", list(schema.DEFINITIONS))
def test_every_definition_is_a_schema_of_its_own(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema.schema(name))
    jsonschema.Draft202012Validator.check_schema(schema.inlined(name))
    assert "$ref" not in json.dumps(schema.inlined(name))


def test_results_of_every_task() -> None:
    with fake_grounder(script=SCRIPT) as grounder, grounder.open(clip()) as video:
        results = [video.ground("the car"), video.ground("the cat"), video.span("the dog"), video.track((1, 2, 30, 40))]
        results.append(grounder.locate(next(iter(clip()))[1], "the car"))
    assert [result.task for result in results] == ["tube", "tube", "span", "track", "image"]
    assert [result.found for result in results[:2]] == [True, False]
    replies = {"Boxes of the car?": '[{"time": 2.25, "bbox_2d": [100, 200, 300, 900], "label": "the car"}]'}
    with fake_grounder(text_spec("qwen3_vl"), replies=replies, text=TextOptions()) as grounder:
        results.append(grounder.ground(clip(), "the car"))
    assert results[-1].heads == "text"
    (searched,) = live_grounder().search(stream(20, bright=((6.0, 9.0),)), ["the car"], window_s=8.0)
    assert searched.found and searched.to_json()["windows"]["count"] > 1
    validate(searched.to_json(), "result")
    for result in results:
        value = result.to_json()
        validate(value, "result")
        parts = [seconds for stage, seconds in value["timings_s"].items() if stage != "total"]
        assert value["timings_s"]["total"] >= sum(parts) - 1e-5  # of the rounding


def test_a_field_without_a_definition_is_found() -> None:
    with fake_grounder(script=SCRIPT) as grounder:
        value: dict[str, Any] = grounder.ground(clip(), "the car").to_json()
    for changed in ({**value, "colour": "red"}, {**value, "task": "ground"}, {**value, "span": {"start_s": 1.0}}):
        with pytest.raises(jsonschema.ValidationError):
            validate(changed, "result")


def test_the_columns_of_parquet_are_its_fields() -> None:
    pytest.importorskip("pyarrow")
    assert set(answer_schema().names) == {*schema.ROW, *schema.RESULT, *schema.SEARCHED, "error"}


def test_the_command_prints_a_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["schema", "table_row"]) == 0
    assert json.loads(capsys.readouterr().out) == schema.schema("table_row")
    complaint(["schema", "no-such-part"], capsys, code="options.invalid")


@pytest.mark.parametrize(("file", "name"), [("figures", "demo_figures"), ("text_figures", "demo_text_figures")])
def test_the_figures_of_the_demo(file: str, name: str) -> None:
    validate(json.loads((ROOT / f"assets/demo/{file}.json").read_text(encoding="utf-8")), name)


def test_what_doctor_and_errors_print(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--json"]) == 0
    validate(json.loads(capsys.readouterr().out), "doctor")
    assert cli.run(["doctor", "--json", "more"]) == 2
    validate(json.loads(capsys.readouterr().out), "error")
