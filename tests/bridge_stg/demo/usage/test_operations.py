"""What operators run, on the demo model: Triton's model with a real chain, and the benchmark of all backends."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


@pytest.mark.slow
def test_benchmark_puts_parity_beside_times(demo_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "chain.json"
    path, _ = clip("1-named")
    command = [sys.executable, "benchmarks/gpu/stages.py", "--bundle", demo_bundle, "--clip", path, "--runs", 1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = "import sys, runpy; sys.path.insert(0, {root!r}); sys.argv = sys.argv[1:]; "
    start += "sys.path.insert(0, 'benchmarks'); runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [str(part) for part in (*command[1:], "--out", out)]
    done = subprocess.run(
        [sys.executable, "-c", start.format(root=str(ROOT)), *arguments],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(out.read_text())
    cpu = report["backends"]["onnxruntime"]
    assert not cpu["parity"]["failed"] and set(cpu["parity"]["worst"]) == {
        "vision_encoder", "language_model", "spatial_decoder"
    }  # fmt: skip
    assert cpu["least_box_iou"] == 1.0 and cpu["seconds"]["total"] > 0
    for name, entry in report["backends"].items():
        assert "seconds" in entry or entry["left_out"], name
    assert "ok (" in done.stdout
