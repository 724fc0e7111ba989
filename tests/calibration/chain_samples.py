"""Samples of every kind about small videos and pictures, for the tiny bundle."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from tests.fakes.clips import pictures, write


def write_samples(folder: Path, *, copies: int = 1) -> Path:
    """Write samples.jsonl and its media: a tube, a span, one absent, one without labels, an image and a track each."""
    write(folder / "a.mp4", pictures(30), rate=10)
    write(folder / "b.mp4", pictures(20, 32, 48)[::-1], rate=10)
    Image.fromarray(pictures(1)[0]).save(folder / "c.png")
    boxes = [{"time": 0.0, "box": [4, 4, 40, 30]}, {"time": 1.0, "box": [6, 4, 42, 30]}]
    lines = []
    for copy in range(copies):
        lines += [
            {"video": "a.mp4", "query": f"red car {copy}", "span": [0.0, 2.0], "boxes": boxes},
            {"video": "b.mp4", "query": f"the man sits down {copy}", "span": [0.5, 1.5]},
            {"video": "b.mp4", "query": f"the dog {copy}", "span": None},
            {"video": "a.mp4", "query": f"the tree {copy}"},
            {"image": "c.png", "query": f"the box {copy}", "boxes": [{"box": [4, 4, 40, 30]}]},
            {"video": "a.mp4", "task": "track", "query": f"the ball {copy}", "boxes": boxes},
        ]
    file = folder / "samples.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file
