"""Make synthetic clips with an exact number of coarse frames, and calibration samples for random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.host.files import replacing

FRAME_RATE = 24
QUERIES = (
    "the red square",
    "a blue ball that moves to the left",
    "the person in the yellow coat",
    "a small dog",
    "the second car from the right",
    "the green bag that somebody leaves behind",
    "a bird above the water",
    "the child with the umbrella",
    "the man who waves",
    "a white van that turns",
    "the cyclist",
    "the door that opens",
    "an orange cat on the wall",
    "the woman who sits down",
    "the last runner",
    "the cup on the table",
)


def clip(folder: Path, spec: ModelSpec, frames: int, *, size: tuple[int, int] = (384, 216), seconds: float = 0) -> Path:
    """Return an H.264 clip with exactly `frames` coarse frames; an existing file is reused.

    Args:
        folder: folder of the clips.
        spec: the model's specification, which gives the coarse frame rate.
        frames: number of coarse frames.
        size: width and height in pixels, even numbers.
        seconds: length in seconds; 0: `frames` divided by the model's coarse frame rate.
    """
    width, height = size
    length = seconds or frames / spec.frames.coarse_fps
    path = folder / f"clip_{width}x{height}_{length:g}s.mp4"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write(temporary, width=width, height=height, count=round(length * FRAME_RATE))
    return path


def write(path: Path, *, width: int, height: int, count: int) -> None:
    """Encode a clip of a red square and a blue disc that cross a shaded, slightly noisy background."""
    import av

    noise = np.random.default_rng(0).integers(-6, 7, (8, height, width, 1))
    y, x = np.mgrid[0:height, 0:width]
    shade = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1)
    side = height // 5
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "23", "preset": "veryfast"}
        for index in range(count):
            image = np.clip(shade + noise[index % 8], 0, 255).astype(np.uint8)
            left = (index * 3) % (width - side)
            image[height // 4 : height // 4 + side, left : left + side] = (220, 30, 30)
            right = (width - index * 2) % width
            image[(x - right) ** 2 + (y - 3 * height // 4) ** 2 < (side // 2) ** 2] = (30, 60, 220)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def calibration_samples(folder: Path, spec: ModelSpec) -> Path:
    """Write two short clips and a JSON lines file with their queries; return the file."""
    lines = []
    for frames, size in ((4, (384, 216)), (6, (256, 256))):
        path = clip(folder, spec, frames, size=size)
        lines.append({"video": path.name, "query": QUERIES[len(lines)], "span": [0.0, frames / spec.frames.coarse_fps]})
    file = folder / "samples.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file
