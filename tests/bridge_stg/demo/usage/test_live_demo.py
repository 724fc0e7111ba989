"""A live stream through the trained demo bundle: the numbers of a real language model, and a real process's end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bridge_stg.runtime import Grounder
from bridge_stg.runtime.video.frame import resize
from bridge_stg.runtime.video.playback import play

ROOT = Path(__file__).parents[4]
CLIPS = sorted((ROOT / "assets" / "demo" / "clips").glob("*.mp4"))
QUERIES = ("the blue bird", "the bus")


def joined() -> list[tuple[float, np.ndarray]]:
    """Return the sample clips one after the other, in the first one's size and at eight frames a second."""
    frames = []
    for clip in CLIPS:
        with play(clip) as video:
            frames += [frame for _, frame in video.frames]
    return [(i / 8, resize(frame, frames[0].shape[:2])) for i, frame in enumerate(frames)]


@pytest.mark.slow
def test_an_extended_and_a_rebuilt_prefix_answer_like_one_prefill(demo_grounder: Grounder) -> None:
    frames = joined()
    found = rebuilt = 0
    for queries in (QUERIES[:1], QUERIES):
        with demo_grounder.watch(frames, queries, window_s=4, every_s=3) as watch:
            for update in watch:
                start, end = update.window
                same_frames = ((time_s - start, frame) for time_s, frame in frames if start <= time_s < end)
                with demo_grounder.open(same_frames) as video:
                    for live, whole in zip(update.groundings, video.ground_many(queries), strict=True):
                        assert (live.answer, live.coarse) == (whole.answer, whole.coarse)
                        if whole.tube is not None and live.tube is not None:
                            scale = np.array([*whole.size, *whole.size])
                            np.testing.assert_allclose(live.tube.times, whole.tube.times + start, atol=1e-9)
                            np.testing.assert_allclose(live.tube.boxes / scale, whole.tube.boxes / scale, atol=1e-4)
                            found, rebuilt = found + 1, rebuilt + (start > 0)
    assert watch.stats.rebuilds >= 5 and found > 6 and rebuilt > 4


def test_a_signal_ends_a_whole_process_in_order(demo_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "events.jsonl"
    command = [sys.executable, "cli.py", "watch", str(CLIPS[0]), "the blue bird", "--bundle", str(demo_bundle)]
    watching = subprocess.Popen(
        [*command, "--realtime", "--jsonl", str(out), "--answers"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    began = time.monotonic()
    while "answers" not in (out.read_text(encoding="utf-8") if out.exists() else ""):
        assert time.monotonic() - began < 60 and watching.poll() is None
        time.sleep(0.1)
    watching.send_signal(signal.SIGTERM)
    _, told = watching.communicate(timeout=30)
    assert watching.returncode == 0, told
    end = json.loads(out.read_text(encoding="utf-8").splitlines()[-1])
    assert end["event"] == "end" and end["ended"] == "stopped" and "ended: stopped" in told
