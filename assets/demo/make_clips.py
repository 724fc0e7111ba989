"""Write the sample clips of `make demo` with the generator, on held-out backgrounds.

Usage: python assets/demo/make_clips.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from bridge_stg.demo.held_out import FRAME_RATE
from bridge_stg.demo.questions import ask
from bridge_stg.demo.synthetic import make_scene, write_clip

CLIPS = {
    "1-named": (11, "colour", (640, 360)),
    "2-moving": (23, "motion", (480, 360)),
    "3-upright": (5, "name", (360, 640)),
}
"""File name → seed, kind of the query, size in pixels."""


def main(folder: Path) -> None:
    """Write each clip as H.264 mp4 and its query as a .txt of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (seed, kind, size) in CLIPS.items():
        rng = np.random.default_rng((777, seed))
        while True:
            scene = make_scene(rng, split="held_out", frame_rate=FRAME_RATE, size=size, duration=9.0)
            texts = [query.text for query in ask(rng, scene) if query.kind == kind]
            if texts:
                break
        write_clip(scene, folder / f"{name}.mp4", frame_rate=FRAME_RATE)
        (folder / f"{name}.txt").write_text(texts[0] + "\n", encoding="utf-8")
        print(f"{name}.mp4: {texts[0]}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "assets/demo/clips"))
