"""What operators run, on the demo model: Triton's model with a real chain."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bridge_stg.runtime import Grounder
from bridge_stg.triton.repository import Serving, write_repository
from tests.bridge_stg.triton.test_model import as_json
from tests.fakes import triton as fake_triton

ROOT = Path(__file__).resolve().parents[4]
CLIPS = ROOT / "assets/demo/clips"


def clip(name: str) -> tuple[Path, str]:
    return CLIPS / f"{name}.mp4", (CLIPS / f"{name}.txt").read_text().strip()


def test_triton_answers_as_the_grounder_does(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_repository(demo_bundle, tmp_path / "repo", Serving(media=str(CLIPS), variant="standard"))
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_triton.as_module())
    spec = importlib.util.spec_from_file_location("triton_model_of_the_demo", folder / "1/model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = fake_triton.Server(module.TritonPythonModel, as_json((folder / "config.pbtxt").read_text()), str(folder))
    path, query = clip("1-named")
    responses = server.infer(
        server.request(VIDEO=[path.name], QUERY=[query]),
        server.request(VIDEO=["nowhere.mp4"], QUERY=[query]),
        server.request(VIDEO_BYTES=[path.read_bytes()], QUERY=[query]),
        server.request(VIDEO=[path.name], QUERY=["x" * 2000]),
    )
    server.model.finalize()
    assert [response.has_error() for response in responses] == [False, True, False, True]
    with Grounder.load(demo_bundle, variant="standard") as grounder:
        expected = grounder.ground(path, query)
    assert expected.boxes is not None and expected.span is not None
    for response in (responses[0], responses[2]):
        arrays = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        result = json.loads(arrays["RESULT"][0, 0])
        assert result["answer"] == expected.answer and result["found"]
        np.testing.assert_allclose(arrays["SPAN"][0], expected.span, rtol=1e-6)
        np.testing.assert_allclose(arrays["BOXES"][0, :, 1:5], expected.boxes.boxes, atol=1e-2)
