"""The committed demo checkpoint, from file to tube: its scores, and the exported chain against eager torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy.parity import compare_models
from bridge_stg.demo.held_out import clip_path, held_out_clips, measure, score
from bridge_stg.model.torch_session import torch_grounder
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.backends.choose import open_sessions
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.chain.prompt import Tokenizer

DEMO = Path(__file__).parents[4] / "assets" / "demo"
CLIPS = sorted((DEMO / "clips").glob("*.mp4"))
REAL = Path(os.environ.get("BRIDGE_STG_REAL_VIDEO", "/usr/share/doc/opencv-doc/examples/data/vtest.avi"))


def test_both_variants_equal_eager_torch_on_held_out_clips(demo_bundle, demo_model, tmp_path):
    grounders = {name: Grounder.load(demo_bundle, variant=name) for name in ("standard", "primitive")}
    figures = compare_models(torch_grounder(demo_model), grounders, clips=4, folder=tmp_path)
    for name in grounders:
        assert figures[name]["identical_answers"] == 1
        assert figures[name]["box_iou_mean"] >= 0.999


def test_the_model_grounds_and_the_controls_fail(demo_bundle, tmp_path):
    bundle = Bundle.load(demo_bundle)
    tokenizer = Tokenizer.from_file(bundle.tokenizer_path)
    figures = measure(dict(open_sessions(bundle)), bundle.manifest.spec, tokenizer, clips=10, folder=tmp_path)
    reached = figures["named"]["m_vIoU"]
    assert figures["named"]["m_tIoU"] > 0.8 and reached > 0.6
    assert figures["swapped_query_vIoU"] < 0.2
    for name, scores in figures["controls"].items():
        # With shuffled times the span is wide; the presence scores of fine frames correct much of it.
        corrected = name == "time texts shuffled"
        whole = figures["span_as_answered"]["m_vIoU"] if "as answered" in name else reached
        assert scores["m_vIoU"] < whole - (0 if corrected else 0.2), name
    assert figures["visual_tokens_ratio"] < 0.8


def test_ground_many_equals_ground(demo_grounder, tmp_path):
    clip = next(iter(held_out_clips(1)))
    path = clip_path(clip, tmp_path)
    texts = [q.text for q in (clip.named, clip.other, clip.absent) if q is not None]
    with demo_grounder.open(path) as video:
        together = video.ground_many(texts)
    for text, many in zip(texts, together):
        alone = demo_grounder.ground(path, text)
        assert (alone.answer, alone.found) == (many.answer, many.found)
        if alone.found:
            assert alone.span == many.span
            np.testing.assert_allclose(alone.boxes.boxes, many.boxes.boxes, atol=0.05)


def test_threads_share_one_grounder(demo_grounder, tmp_path):
    clips = list(held_out_clips(3))
    paths = [clip_path(clip, tmp_path) for clip in clips]
    ask = lambda i: demo_grounder.ground(paths[i], clips[i].named.text)  # noqa: E731
    alone = [ask(i) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for first, second in zip(alone, pool.map(ask, range(3))):
            assert first.answer == second.answer and first.span == second.span


def test_a_stream_of_frames_gives_the_files_answer(demo_grounder):
    clip = next(iter(held_out_clips(1)))
    frames = clip.scene.render(clip.times, clip.scene.width, clip.scene.height)
    result = demo_grounder.ground(zip(clip.times.tolist(), frames), clip.named.text)
    assert score(clip, clip.named, result)[1] > 0.4


def test_a_still_image(demo_grounder, tmp_path):
    from PIL import Image

    rng = np.random.default_rng(4)
    from bridge_stg.demo.sprites import COLOUR_NAMES, NAMES
    from bridge_stg.demo.synthetic import make_scene

    ious = []
    for _ in range(6):
        scene = make_scene(rng, split="held_out", still=True, size=(480, 360))
        frame = scene.render([0.0], 480, 360)[0]
        thing = scene.things[0]
        Image.fromarray(frame).save(tmp_path / "still.png")
        query = f"the {COLOUR_NAMES[thing.colour]} {NAMES[thing.name]}"
        result = demo_grounder.ground(tmp_path / "still.png", query, allow_none=False)
        assert len(result.boxes) == 1 and result.boxes.times[0] == 0
        from bridge_stg.runtime.chain.boxes import box_iou

        ious.append(float(box_iou(result.boxes.boxes, scene.boxes_pixels(0, np.zeros(1)))[0]))
    assert np.mean(ious) > 0.5


def test_infer_from_the_command_line(demo_bundle, tmp_path):
    clip = CLIPS[0]
    query = clip.with_suffix(".txt").read_text(encoding="utf-8").strip()
    outputs = {name: tmp_path / name for name in ("result.json", "annotated.mp4", "sheet.png")}
    done = subprocess.run(
        [sys.executable, str(DEMO.parents[1] / "cli.py"), "infer", str(clip), query, "--bundle", str(demo_bundle),
         "--json", str(outputs["result.json"]), "--annotate", str(outputs["annotated.mp4"]),
         "--sheet", str(outputs["sheet.png"])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "found from" in done.stdout
    result = json.loads(outputs["result.json"].read_text())["results"][0]
    assert result["found"] and len(result["boxes"]) > 3 and result["query"] == query
    assert all(path.stat().st_size > 1000 for path in outputs.values())


def test_verify_replays_every_variant(demo_bundle):
    done = subprocess.run(
        [sys.executable, str(DEMO.parents[1] / "cli.py"), "verify", str(demo_bundle)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for graph in GRAPHS:
        assert graph in done.stdout


@pytest.mark.skipif(not REAL.exists(), reason="the real clip is not installed (Debian: apt install opencv-doc)")
def test_a_long_real_clip_in_flat_memory(demo_bundle):
    """No accuracy is claimed: the result is well formed, and memory does not grow with the clip's length."""
    script = (
        "import sys\n"
        "from bridge_stg.runtime import Grounder\n"
        "grounder = Grounder.load(sys.argv[1], threads=2)\n"
        "with grounder.open(sys.argv[2]) as video:\n"
        "    for query in ('the red car', 'the white object moving left'):\n"
        "        result = video.ground(query, allow_none=False)\n"
        "        width, height = result.size\n"
        "        assert result.found and 0 <= result.span[0] < result.span[1] <= video.duration_s\n"
        "        boxes = result.boxes.boxes\n"
        "        assert (boxes[:, :2] <= boxes[:, 2:]).all() and boxes.min() >= 0\n"
        "        assert boxes[:, 2].max() <= width and boxes[:, 3].max() <= height\n"
        "status = open('/proc/self/status').read()\n"  # getrusage would count what pytest held when it forked
        "print(status.split('VmHWM:')[1].split()[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(DEMO.parents[1])!r})\n{script}",
         str(demo_bundle), str(REAL)],
        capture_output=True, text=True, check=False, cwd=DEMO.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 600_000  # KiB; all frames at full size would take 1.0 GB by themselves
