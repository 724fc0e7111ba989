"""Write held-out clips and images annotated for the four tasks, for `python cli.py evaluate jsonl`.

Usage: python assets/demo/make_held_out.py build/tasks [--count 200]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from bridge_stg.demo.held_out import FRAME_RATE, HELD_OUT_SEED, clip_path, held_out_clips
from bridge_stg.demo.questions import ask
from bridge_stg.demo.synthetic import Scene, make_scene, write_clip

IMAGE_SEED, TRACK_SEED = HELD_OUT_SEED + 3, HELD_OUT_SEED + 4

Line = dict[str, Any]


def boxes_of(scene: Scene, thing: int, times: np.ndarray) -> list[Line]:
    """Return the box of a thing at each time: left, top, right, bottom in pixels."""
    boxes = scene.boxes_pixels(thing, times)
    return [{"time": float(t), "box": [round(float(side), 2) for side in box]} for t, box in zip(times, boxes)]


def videos(folder: Path, count: int) -> Iterator[tuple[Line, Line]]:
    """Yield the tube line and the span line of each clip."""
    for clip in held_out_clips(count):
        query, scene = clip.named, clip.scene
        assert query is not None and query.thing is not None
        thing = scene.things[query.thing]
        name = clip_path(clip, folder / "clips").name
        line = {"id": name[:-4], "video": f"clips/{name}", "query": query.text, "span": [thing.start, thing.end]}
        visible = clip.times[thing.visible(clip.times)]
        yield line | {"boxes": boxes_of(scene, query.thing, visible)}, line


def images(folder: Path, count: int, *, seed: int = IMAGE_SEED, split: str = "held_out") -> Iterator[Line]:
    """Yield a line for each of `count` images; `split` is the split of the backgrounds."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    index = 0
    while index < count:
        rng = np.random.default_rng((seed, index))
        scene = make_scene(rng, split=split, still=True)
        query = next(q for q in ask(rng, scene, absent=0.0) if q.thing is not None)
        assert query.thing is not None
        name = f"images/{index:03d}.png"
        Image.fromarray(scene.render([0.0], scene.width, scene.height)[0]).save(folder / name)
        box = boxes_of(scene, query.thing, np.zeros(1))[0]["box"]
        yield {"id": f"{index:03d}", "image": name, "query": query.text, "boxes": [{"box": box}]}
        index += 1


def tracks(folder: Path, count: int, *, seed: int = TRACK_SEED, split: str = "held_out") -> Iterator[Line]:
    """Yield a tracking line, without a query, for each of `count` clips whose first thing is visible from the start."""
    (folder / "tracks").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        scene = make_scene(rng, split=split, frame_rate=FRAME_RATE, from_start=0.5)
        name = f"tracks/{index:03d}.mp4"
        if not (folder / name).exists():
            partial = folder / f"{name}.partial.mp4"
            write_clip(scene, partial, frame_rate=FRAME_RATE)
            os.replace(partial, folder / name)
        times = np.arange(round(scene.duration * FRAME_RATE)) / FRAME_RATE
        yield {
            "id": f"{index:03d}", "video": name, "task": "track", "span": [0.0, scene.things[0].end],
            "boxes": boxes_of(scene, 0, times[scene.things[0].visible(times)]),
        }  # fmt: skip


def main() -> None:
    """Write tube.jsonl, span.jsonl, image.jsonl, track.jsonl and their media into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=200, help="samples per task")
    options = parser.parse_args()
    if options.count < 1:
        sys.exit("--count must be 1 or more")
    lines: dict[str, list[Line]] = {"tube": [], "span": [], "image": [], "track": []}
    for tube, span in tqdm(videos(options.out, options.count), "clips", total=options.count):
        lines["tube"].append(tube)
        lines["span"].append(span)
    lines["image"] = list(tqdm(images(options.out, options.count), "images", total=options.count))
    lines["track"] = list(tqdm(tracks(options.out, options.count), "tracks", total=options.count))
    for task, rows in lines.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (options.out / f"{task}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
