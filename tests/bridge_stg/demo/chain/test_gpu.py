"""On a machine with a GPU: the demo chain on every backend that is installed, against golden cases and the CPU.

Run with `pytest -m gpu`. Engines are built first, by the command that users call.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bridge_stg.demo.held_out import clip_path, held_out_clips
from bridge_stg.export.engines.bisect_engines import engine_maker
from bridge_stg.export.engines.layers import plan_summary
from bridge_stg.export.parity.bisect import Side, bisect
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.backends.choose import choose
from bridge_stg.runtime.backends.registry import BACKENDS, gpu
from bridge_stg.runtime.backends.tensorrt.engine_cache import read_engines
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.device.array import DeviceArray
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.parity.verify import verify_bundle
from bridge_stg.runtime.video.frame import resize

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[4]
INSTALLED = [backend.name for backend in BACKENDS if backend.on_gpu and backend.version() is not None]
NATIVE = [name for name in INSTALLED if name in ("tensorrt", "tensorrt-rtx")]


@pytest.fixture(scope="module")
def built_bundle(demo_bundle: Path) -> Path:
    if NATIVE:
        command = [sys.executable, str(ROOT / "cli.py"), "build", str(demo_bundle), "--target", "this"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return demo_bundle


def test_a_gpu_and_a_backend_for_it_are_here():
    """SM 7.0 or later, and TensorRT, TensorRT-RTX or onnxruntime with a GPU provider."""
    assert gpu().sm >= 70
    assert INSTALLED, 'no GPU backend is installed: pip install -e ".[tensorrt]", "[rtx]" or "[gpu]"'


@pytest.mark.skipif(not NATIVE, reason="no TensorRT is installed")
def test_engines_tell_what_became_of_their_layers(built_bundle):
    """`build` compiles every graph here, and names the precision of most products."""
    entries = read_engines(Bundle.load(built_bundle))
    assert {entry.graph for entry in entries} == set(GRAPHS)
    for entry in entries:
        products = plan_summary(entry.built["layers"])["products"]
        assert sum(products.values()) > 2 * products.get("unknown", 0)


@pytest.mark.parametrize("backend", INSTALLED)
def test_golden_cases_hold_at_every_boundary(built_bundle, backend):
    """Each backend gives what torch recorded, within the tolerance of its precision."""
    replayed = verify_bundle(built_bundle, backend=backend)
    assert replayed and all(b.passed for boundaries in replayed.values() for b in boundaries)


@pytest.mark.parametrize("backend", NATIVE)
def test_every_block_of_an_engine_agrees_with_the_cpu(built_bundle, backend):
    """`verify --bisect` compiles engines with block outputs and finds no block that drifts."""
    bundle, graph = Bundle.load(built_bundle), "language_model"
    variant = choose(bundle, backend=backend).variants[graph]
    sides = Side(bundle, graph, variant, backend), Side(bundle, graph, variant)
    found = bisect(*sides, f"{bundle.golden_cases()[0].name}/{graph}_0.logits", prepare=engine_maker())
    assert found.begins is None, str(found)


@pytest.mark.parametrize("backend", INSTALLED)
def test_the_chain_equals_the_chain_on_the_cpu(built_bundle, backend, tmp_path):
    """Four videos: the same answers as on the CPU, boxes within two pixels."""
    clips = list(held_out_clips(4))
    with (
        Grounder.load(built_bundle, backend="onnxruntime") as on_cpu,
        Grounder.load(built_bundle, backend=backend) as on_gpu,
    ):
        assert on_gpu.target is not None and on_gpu.target.device != "CPU"
        for clip in clips:
            path, text = clip_path(clip, tmp_path), clip.named.text
            ours, theirs = on_gpu.ground(path, text), on_cpu.ground(path, text)
            assert (ours.answer, ours.found) == (theirs.answer, theirs.found)
            if theirs.boxes is not None:
                np.testing.assert_allclose(ours.boxes.boxes, theirs.boxes.boxes, atol=2.0)  # pixels


@pytest.mark.parametrize("backend", NATIVE)
def test_outputs_stay_on_the_device_and_steps_become_graphs(built_bundle, backend, tmp_path):
    """No copy to the host between graphs; decode steps are CUDA graphs or say why not."""
    clip = next(iter(held_out_clips(1)))
    path = clip_path(clip, tmp_path)
    with Grounder.load(built_bundle, backend=backend) as grounder, grounder.open(path) as video:
        results = [video.ground(clip.named.text) for _ in range(4)]
        assert isinstance(video.features.at(np.arange(2), Limits())[0], DeviceArray)
        graphs = grounder.sessions["language_model"].graphs
        assert graphs is None or graphs.capture_error or len(graphs)
    assert len({result.answer for result in results}) == 1
    for result in results[1:]:
        np.testing.assert_allclose(result.boxes.boxes, results[0].boxes.boxes, atol=1e-2)


def test_pictures_are_resized_on_the_device_to_the_bytes_of_pillow():
    """Frames resized on the GPU are, byte by byte, those of the CPU."""
    random = np.random.default_rng(0)
    context = DeviceContext().open()
    for size, target in (((48, 64), (32, 32)), ((37, 53), (64, 96)), ((720, 1280), (192, 320))):
        picture = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        np.testing.assert_array_equal(resize(context.upload(picture), target).numpy(), resize(picture, target))
    assert context.resizer.compiled
    context.close()
