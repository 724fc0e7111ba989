"""GOT-10k: tracking of any object, given its first box (Huang et al., arXiv 1810.11981).

Layout and protocol: github.com/got-10k/toolkit (datasets/got10k.py, experiments/got10k.py). `<root>/val/list.txt` names
the sequences; each is a folder of frames 00000001.jpg … with `groundtruth.txt` (x,y,width,height per line),
`cover.label` (0 to 8, eighths of the target that are visible), `absence.label`, and `meta_info.ini`. The test split has
only the first box: results are written in the layout of its server, and nothing can be scored here.

The toolkit's metrics omit the first frame and frames whose cover is 0, and clip both boxes to the image.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.evaluation.datasets.fields import digest, fault, numbered_lines, parse_number, read_text
from bridge_stg.evaluation.media import frame_files
from bridge_stg.evaluation.samples import Dataset, Sample, Truth, xyxy_from_xywh
from bridge_stg.runtime.chain.tasks import TRACKED
from bridge_stg.runtime.host.files import replacing

FRAME_RATE = 10.0
"""All sequences were annotated at 10 frames per second (`anno_fps: 10Hz`)."""


def read_got10k(annotations: Sequence[Path], media: Path, *, split: str | None = None) -> Dataset:
    """Return the sequences of a split, `val` by default; `annotations` is the root with train, val and test."""
    root, split = annotations[0], split or "val"
    samples, files = [], [root / split / "list.txt"]
    for where, line in numbered_lines(root / split / "list.txt"):
        name = line.strip()
        if Path(name).name != name:
            raise fault(where, f"{name!r} is not the name of a folder", code="annotation.bad_line")
        folder = root / split / name
        truth_file = folder / "groundtruth.txt"
        if truth_file.is_file():
            files.append(truth_file)
        frames = media / split / name
        samples.append(
            Sample(
                id=name, task="track", media=frames if truth_file.is_file() and frames.is_dir() else None,
                media_name=f"{split}/{name}", query=TRACKED, read_truth=partial(_truth, folder, frames, split),
                frame_rate=_frame_rate(folder), where=str(truth_file),
            )
        )  # fmt: skip
    return Dataset("got-10k", split, tuple(samples), digest(*files))


def _truth(folder: Path, frames_folder: Path, split: str) -> Truth:
    path = folder / "groundtruth.txt"
    rows = [_row(where, line) for where, line in numbered_lines(path)]
    frames = len(frame_files(frames_folder))
    if not rows or (len(rows) != frames and not (split == "test" and len(rows) == 1)):
        raise fault(path, f"has {len(rows)} boxes for the {frames} frames of {frames_folder}; expected one per frame")
    boxes = np.zeros((frames, 4))
    boxes[: len(rows)] = xyxy_from_xywh(rows)
    inside = np.arange(frames) < len(rows)
    counted = inside.copy()
    counted[0] = False  # the model is given this box
    cover = folder / "cover.label"
    if cover.is_file():
        values = [parse_number(where, line) for where, line in numbered_lines(cover)]
        if len(values) != frames:
            raise fault(cover, f"has {len(values)} lines for {frames} frames; expected one per frame")
        counted &= np.asarray(values) > 0
    times = np.arange(frames) / _frame_rate(folder)
    # `resolution: (1920, 1080)`, width and height
    found = re.fullmatch(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)", _meta(folder).get("resolution", ""))
    size = (int(found[1]), int(found[2])) if found else None
    return Truth(True, None, times, inside, boxes.astype(np.float32), counted, size)


def _row(where: str, line: str) -> list[float]:
    sides = [parse_number(where, part) for part in line.split(",")]
    if len(sides) != 4:
        raise fault(where, f"has {len(sides)} numbers; expected x,y,width,height", code="annotation.bad_line")
    return sides


def _meta(folder: Path) -> Mapping[str, str]:
    """Return the `name: value` pairs of meta_info.ini; the first line is a heading."""
    path = folder / "meta_info.ini"
    lines = read_text(path).splitlines() if path.is_file() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines) if value}


def _frame_rate(folder: Path) -> float:
    found = re.fullmatch(r"([0-9.]+)\s*Hz", _meta(folder).get("anno_fps", ""), re.IGNORECASE)
    return float(found[1]) if found and float(found[1]) > 0 else FRAME_RATE


def write_results(rows: Sequence[Mapping[str, Any]], folder: Path) -> int:
    """Write a tracker's boxes in the server's layout: `NAME/NAME_001.txt` and `NAME/NAME_time.txt`.

    A line is x,y,width,height with three decimals; the times file has seconds per frame with eight. Zip the folder's
    contents to submit them. Rows without boxes (failed samples) are omitted. Return the number of written sequences.
    """
    written = 0
    for row in rows:
        prediction = row.get("prediction") or {}
        if "boxes" not in prediction:
            continue
        boxes = np.asarray(prediction["boxes"], np.float64).reshape(-1, 4)
        place = folder / row["id"]
        place.mkdir(parents=True, exist_ok=True)
        rects = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
        seconds = np.full((len(boxes), 1), row["seconds"] / max(1, len(boxes)))
        for name, values, form in ((f"{row['id']}_001.txt", rects, "%.3f"), (f"{row['id']}_time.txt", seconds, "%.8f")):
            text = io.StringIO()
            np.savetxt(text, values, fmt=form, delimiter=",")
            with replacing(place / name) as partial_file:
                partial_file.write_text(text.getvalue(), encoding="utf-8")
        written += 1
    return written
