"""Write annotated clips and images for calibration, and others to choose the blocks that stay in float.

Two files: calibration.jsonl (64 queries of all kinds) and select.jsonl (100 queries on clips). Both use their own seeds
and the training photographs as backgrounds, so they share no sample with `make_held_out.py`.

Usage: python assets/demo/make_calibration.py build/calibration
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from make_held_out import Line, boxes_of, images, tracks
from tqdm import tqdm

from bridge_stg.demo.held_out import HELD_OUT_SEED, HeldOutClip, clip_path, held_out_clips
from bridge_stg.demo.questions import Question

CALIBRATION_SEED, SELECT_SEED = HELD_OUT_SEED + 11, HELD_OUT_SEED + 12
IMAGE_SEED, TRACK_SEED = HELD_OUT_SEED + 13, HELD_OUT_SEED + 14
CALIBRATION = {"named": 28, "motion": 10, "absent": 10}
SELECT = {"named": 75, "motion": 15, "absent": 10}
"""Number of queries on clips by kind."""
IMAGES, TRACKS = 8, 8
SPLIT = "train"


def clip_lines(folder: Path, name: str, seed: int, counts: dict[str, int]) -> Iterator[Line]:
    """Yield `counts[kind]` queries of each kind on the clips of a seed, which are written to `folder`/`name`."""
    left = dict(counts)
    for clip in held_out_clips(100 * max(counts.values()), seed, split=SPLIT):
        queries = {"named": clip.named, "motion": clip.motion, "absent": clip.absent}
        for kind, query in queries.items():
            if query is not None and left[kind]:
                left[kind] -= 1
                yield clip_line(clip, query, kind, f"{name}/{clip_path(clip, folder / name).name}")
        if not any(left.values()):
            return


def clip_line(clip: HeldOutClip, query: Question, kind: str, video: str) -> Line:
    """Return the annotation line of one query on a clip."""
    name = video.partition(".")[0].replace("/", "-")
    line: Line = {"id": f"{name}-{kind}", "group": kind, "video": video, "query": query.text}
    if query.thing is None:
        return line | {"span": None}
    thing = clip.scene.things[query.thing]
    visible = clip.times[thing.visible(clip.times)]
    return line | {"span": [thing.start, thing.end], "boxes": boxes_of(clip.scene, query.thing, visible)}


def grouped(lines: Iterator[Line], kind: str) -> Iterator[Line]:
    """Yield the lines with their kind as group and in their id."""
    return (line | {"id": f"{line['id']}-{kind}", "group": kind} for line in lines)


def main() -> None:
    """Write calibration.jsonl and select.jsonl and their media into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    folder: Path = parser.parse_args().out
    clips = clip_lines(folder, "calibration", CALIBRATION_SEED, CALIBRATION)
    lines = [
        *tqdm(clips, "calibration", total=sum(CALIBRATION.values())),
        *grouped(images(folder, IMAGES, seed=IMAGE_SEED, split=SPLIT), "image"),
        *grouped(tracks(folder, TRACKS, seed=TRACK_SEED, split=SPLIT), "track"),
    ]
    chosen = list(tqdm(clip_lines(folder, "select", SELECT_SEED, SELECT), "select", total=sum(SELECT.values())))
    for name, rows in (("calibration", lines), ("select", chosen)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
