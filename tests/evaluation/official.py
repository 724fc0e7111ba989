"""Small files in each dataset's published layout, with its field names and quirks; all written by us.

The sources of the formats are named in the readers' docstrings and beside each function.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from bridge_stg.runtime.visualize.annotate import encode_h264

SIZE = (96, 64)
SIDE = 24
Write = Callable[[Path, float, float], Any]


@dataclass(frozen=True)
class Files:
    """What `--annotations`, `--media` and `--split` take."""

    name: str
    annotations: tuple[Path, ...]
    media: Path
    split: str | None = None


def box_at(time: float) -> tuple[float, float, float, float]:
    """Where the square is: xyxy in pixels."""
    left = 4 + (2 * time) % 60
    return left, 20, left + SIDE, 20 + SIDE


def drawn(time: float) -> Image.Image:
    image = Image.new("RGB", SIZE, (60, 90, 70))
    ImageDraw.Draw(image).rectangle(box_at(time), fill=(200, 40, 40))
    return image


def video(path: Path, seconds: float, fps: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    encode_h264(((i / fps, drawn(i / fps)) for i in range(round(seconds * fps))), path)


def empty(path: Path, seconds: float, fps: float) -> None:
    """Write a file that is only there: readers of annotations do not open media."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def dump(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def vidstg(root: Path, write: Write = empty) -> Files:
    """README of github.com/Guaranteer/VidSTG-Dataset; VidOR's JSON as read by TubeDETR's preproc_vidstg.py."""
    fps, frames = 10, 60
    entry: dict[str, Any] = {
        "vid": "3557382625", "fps": fps, "frame_count": frames, "used_segment": {"begin_fid": 0, "end_fid": frames - 1},
        "width": SIZE[0], "height": SIZE[1],
        "subject/objects": [{"tid": 0, "category": "adult"}, {"tid": 1, "category": "camera"}],
        "used_relation": {"subject_tid": 0, "object_tid": 1, "predicate": "hold", "begin_fid": 10, "end_fid": 30},
        "temporal_gt": {"begin_fid": 10, "end_fid": 30},
        "captions": [{"description": "an adult man in black holds a black camera.", "type": "person", "target_id": 0}],
        "questions": [
            {"description": "who holds the black camera?", "type": "person", "target_id": 0},
            {"description": "what does the adult man in black hold?", "type": "object", "target_id": 1},
        ],
    }  # fmt: skip
    # The segment ends with the last frame's number, the tube one frame after it, as at the end of published videos.
    cut = entry | {
        "used_segment": {"begin_fid": 20, "end_fid": 59}, "temporal_gt": {"begin_fid": 40, "end_fid": 60},
        "captions": [{"description": "the man lifts the camera.", "type": "person", "target_id": 0}], "questions": [],
    }  # fmt: skip
    trajectories = []
    for frame in range(frames):
        left, top, right, bottom = box_at(frame / fps)
        box = {"xmin": left, "ymin": top, "xmax": right, "ymax": bottom}
        trajectories.append(
            [
                {"tid": 0, "bbox": box, "generated": 0, "tracker": "none"},
                {"tid": 1, "bbox": box | {"xmin": left + 2}, "generated": 1, "tracker": "linear"},
            ]
        )
    trajectories[15] = trajectories[15][1:]  # one frame of the man was not annotated
    vidor = {
        "version": "VERSION 1.0", "video_id": entry["vid"], "video_hash": "", "video_path": "0021/3557382625.mp4",
        "frame_count": frames, "fps": fps, "width": SIZE[0], "height": SIZE[1],
        "subject/objects": entry["subject/objects"], "trajectories": trajectories, "relation_instances": [],
    }  # fmt: skip
    dump(root / "vidor/validation/0021/3557382625.json", vidor)
    write(root / "video/0021/3557382625.mp4", frames / fps, fps)
    annotations = dump(root / "test_annotations.json", [entry, cut])
    return Files("vidstg", (annotations, root / "vidor"), root / "video")


def hc_stvg_entry(fps: float) -> dict[str, Any]:
    times = np.arange(30, 50) / fps
    boxes = [[left, top, right - left, bottom - top] for left, top, right, bottom in map(box_at, times)]
    return {"bbox": boxes, "st_time": 30 / fps, "ed_time": 50 / fps, "img_num": round(20 * fps), "st_frame": 31}


def hc_stvg_v1(root: Path, write: Write = empty) -> Files:
    """The example in the README of github.com/tzhhhh123/HC-STVG: `caption`, `width`; names may end in .mkv."""
    fps = 5.0
    entry = hc_stvg_entry(fps) | {"caption": "The man in the red coat walks.", "width": SIZE[0], "height": SIZE[1]}
    write(root / "video/27/27_woC9Vfbn74I.mp4", 20, fps)  # the mirror converted it
    path = dump(root / "test.json", {"27_woC9Vfbn74I.mkv": entry})
    return Files("hc-stvg-v1", (path,), root / "video")


def hc_stvg_v2(root: Path, write: Write = empty) -> Files:
    """TubeDETR's preproc_hcstvgv2.py: `English`, and `img_size` as [height, width]."""
    fps = 5.0
    entry = hc_stvg_entry(fps) | {
        "English": "The man in the red coat walks.", "Chinese": "红衣男人走着。", "img_size": [SIZE[1], SIZE[0]],
    }  # fmt: skip
    write(root / "video/3/103_yFy8pFJH5-s.mp4", 20, fps)
    path = dump(root / "val_v2.json", {"103_yFy8pFJH5-s.mp4": entry})
    return Files("hc-stvg-v2", (path,), root / "video")


def charades_sta(root: Path, write: Write = empty) -> Files:
    """README of github.com/jiyanggao/TALL: `[video name] [start time] [end time]##[sentence]`."""
    write(root / "video/AO8RW.mp4", 8, 5)
    path = root / "charades_sta_test.txt"
    path.write_text(
        "AO8RW 0.0 6.9##a person is putting a book on a shelf.\n"
        "AO8RW 2.0 30.5##person begins to play on a phone.\r\n"  # it ends after its video
        "3MSZA 24.3 30.4##person turn a light on.\n",  # this video is not there
        encoding="utf-8",
    )
    return Files("charades-sta", (path,), root / "video")


def refs() -> list[dict[str, Any]]:
    """`refs(unc).p` as described in github.com/lichengunc/refer: `file_name` is no file of COCO."""

    def sentence(number: int, text: str) -> dict[str, Any]:
        return {"tokens": text.split(), "raw": text.upper(), "sent_id": number, "sent": text}

    return [
        {"sent_ids": [0, 1], "file_name": "COCO_train2014_000000581857_16.jpg", "ann_id": 1719310, "ref_id": 0,
         "image_id": 581857, "split": "testA", "category_id": 1,
         "sentences": [sentence(0, "the red square"), sentence(1, "red café thing")]},
        {"sent_ids": [2], "file_name": "COCO_train2014_000000000009_3.jpg", "ann_id": 7, "ref_id": 1,
         "image_id": 9, "split": "val", "category_id": 1, "sentences": [sentence(2, "square on the left")]},
    ]  # fmt: skip


def refcoco(root: Path, write: Write = empty, *, name: str = "refcoco") -> Files:
    """instances.json of the same package: COCO's images and annotations, boxes as [x, y, width, height]."""
    left, top, right, bottom = box_at(1.0)
    instances = {
        "info": {}, "licenses": [], "categories": [{"id": 1, "name": "person", "supercategory": "person"}],
        "images": [
            {"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": SIZE[0], "height": SIZE[1],
             "license": 1, "flickr_url": "", "coco_url": "", "date_captured": "2013-11-14 17:02:52"},
            {"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": SIZE[0], "height": SIZE[1]},
        ],
        "annotations": [
            {"id": 1719310, "image_id": 581857, "category_id": 1, "iscrowd": 0, "area": 576.0,
             "segmentation": [[1, 2, 3, 4]], "bbox": [left, top, right - left, bottom - top]},
            {"id": 7, "image_id": 9, "category_id": 1, "bbox": [1.5, 2.5, 10.25, 20.5]},
        ],
    }  # fmt: skip
    dump(root / "instances.json", instances)
    dump(root / "refs(unc).json", refs())
    images = root / "images/train2014"
    images.mkdir(parents=True)
    drawn(1.0).save(images / "COCO_train2014_000000581857.jpg", quality=95)
    return Files(name, (root,), images, "testA")


def refs_pickle(path: Path, *, protocol: int) -> Path:
    path.write_bytes(pickle.dumps(refs(), protocol=protocol))
    return path


def got10k(root: Path, write: Write = empty, *, frames: int = 12) -> Files:
    """Layout of github.com/got-10k/toolkit, datasets/got10k.py."""
    for split in ("val", "test"):
        name = f"GOT-10k_{split.capitalize()}_000001"
        folder = root / split / name
        folder.mkdir(parents=True)
        (root / split / "list.txt").write_text(f"{name}\n", encoding="utf-8")
        rows = []
        for frame in range(frames):
            drawn(frame / 10).save(folder / f"{frame + 1:08d}.jpg", quality=90)
            left, top, right, bottom = box_at(frame / 10)
            rows.append(f"{left:.4f},{top:.4f},{right - left:.4f},{bottom - top:.4f}")
        (folder / "groundtruth.txt").write_text("\n".join(rows if split == "val" else rows[:1]) + "\n")
        if split == "val":
            cover = [8] * frames
            cover[5] = 0  # hidden: its overlap does not count
            (folder / "cover.label").write_text("\n".join(map(str, cover)) + "\n")
            (folder / "absence.label").write_text("\n".join(str(int(c == 0)) for c in cover) + "\n")
            (folder / "cut_by_image.label").write_text("0\n" * frames)
            (folder / "meta_info.ini").write_text(
                "[METAINFO]\nurl: https://youtu.be/P-fKM-2DHoM\nbegin: 00:00:01\nend: 00:00:10\nanno_fps: 10Hz\n"
                f"object_class: ctenophore\nmotion_class: swimming\nresolution: ({SIZE[0]}, {SIZE[1]})"
            )
    return Files("got-10k", (root,), root)


def jsonl(root: Path, write: Write = empty) -> Files:
    """The project's own format; see evaluation/datasets/jsonl.py."""
    fps = 5.0
    write(root / "media/a.mp4", 6, fps)
    (root / "media").mkdir(parents=True, exist_ok=True)
    drawn(0.0).save(root / "media/b.png")
    track_boxes = [{"time": i / fps, "box": list(box_at(i / fps))} for i in range(30)]
    tube = track_boxes[5:15]
    lines = [
        {"video": "a.mp4", "query": "the red square", "span": [1.0, 3.0], "boxes": tube},
        {"video": "a.mp4", "query": "the blue dog", "span": None},
        {"video": "a.mp4", "query": "the square moves", "span": [0.0, 4.0], "group": "events"},
        {"image": "b.png", "query": "the red square", "boxes": [{"box": list(box_at(0.0))}]},
        {"video": "a.mp4", "task": "track", "boxes": track_boxes, "id": "tracked"},
    ]
    path = root / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return Files("jsonl", (path,), root / "media")


ALL: dict[str, Callable[..., Files]] = {
    "vidstg": vidstg,
    "hc-stvg-v1": hc_stvg_v1,
    "hc-stvg-v2": hc_stvg_v2,
    "charades-sta": charades_sta,
    "refcoco": refcoco,
    "got-10k": got10k,
    "jsonl": jsonl,
}
