"""Annotations and a checkpoint that train in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BOXES = [{"time": 1.0, "box": [10, 10, 30, 40]}, {"time": 2.0, "box": [20, 10, 40, 40]}]
LINES: list[dict[str, Any]] = [
    {"video": "a.mp4", "query": "the red car", "span": [1.0, 2.5], "boxes": BOXES},
    {"video": "a.mp4", "query": "the dog", "span": None},
    {"video": "a.mp4", "query": "the cat moves", "span": [0.5, 2.0]},
    {"image": "b.png", "query": "the car", "boxes": [{"box": [0, 0, 48, 32]}]},
]


def annotate(path: Path, lines: list[dict[str, Any]] = LINES) -> Path:
    """Write lines of annotations, and return the path."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def shrink_frames(checkpoint: Path) -> None:
    """Give a checkpoint frames of few pixels."""
    path = checkpoint / "config.json"
    values = json.loads(path.read_text())
    values["frames"] |= {"coarse_max_pixels": 4096, "coarse_min_pixels": 1024, "fine_max_pixels": 8192,
                         "fine_min_pixels": 1024}  # fmt: skip
    path.write_text(json.dumps(values))
