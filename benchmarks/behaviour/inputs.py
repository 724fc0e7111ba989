"""Write the inputs of the steps: clips, annotations, a plain model, and damaged copies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

INPUTS = """
import json, pickle, sys
from pathlib import Path
import av, torch
from transformers import AutoModelForImageTextToText, Qwen3VLConfig
folder = Path(sys.argv[1])
with av.open(str(folder / "1-named.mp4")) as clip:
    pictures = [frame.to_image() for frame in clip.decode(video=0)]
pictures[30].save(folder / "picture.png")
for split in ("val", "test"):
    name = f"GOT-10k_{split.capitalize()}_000001"
    (folder / "got" / split / name).mkdir(parents=True)
    (folder / "got" / split / "list.txt").write_text(name + "\\n")
    for number in range(6):
        pictures[30 + number].save(folder / "got" / split / name / f"{number + 1:08d}.jpg", quality=90)
    rows = ["300.0,150.0,80.0,80.0"] * (6 if split == "val" else 1)
    (folder / "got" / split / name / "groundtruth.txt").write_text("\\n".join(rows) + "\\n")
    if split == "val":
        for label, value in (("cover", 8), ("absence", 0), ("cut_by_image", 0)):
            (folder / "got" / split / name / f"{label}.label").write_text(f"{value}\\n" * 6)
        (folder / "got" / split / name / "meta_info.ini").write_text(
            "[METAINFO]\\nanno_fps: 10Hz\\nobject_class: bird\\nmotion_class: flying\\nresolution: (640, 360)")
sentence = {"tokens": ["bird"], "raw": "BIRD", "sent_id": 0, "sent": "the blue bird"}
refs = [{"sent_ids": [0], "file_name": "COCO_train2014_000000000009_3.jpg", "ann_id": 7, "ref_id": 0, "image_id": 9,
         "split": "val", "category_id": 1, "sentences": [sentence]}]
(folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
(folder / "evil.p").write_bytes(b"cos\\nsystem\\n(S'true'\\ntR.")
(folder / "coco").mkdir()
pictures[30].save(folder / "coco" / "COCO_train2014_000000000009.jpg", quality=95)
picture = {"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": 640, "height": 360}
box = {"id": 7, "image_id": 9, "category_id": 1, "bbox": [300, 150, 80, 80]}
kinds = [{"id": 1, "name": "bird", "supercategory": "animal"}]
(folder / "instances.json").write_text(json.dumps({"images": [picture], "annotations": [box], "categories": kinds}))
backbone = json.loads((folder / "checkpoint/config.json").read_text())["backbone"]
text = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
          "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "patch_size": 16}
tokens = {key: value for key, value in backbone.items() if key.endswith("token_id")}
torch.manual_seed(0)
config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
AutoModelForImageTextToText.from_config(config).float().eval().save_pretrained(folder / "plain")
"""
"""Run with the checkout's Python, but without its code: pictures, benchmark files, a plain model."""


def make_inputs(work: Path, root: Path, python: Path) -> None:
    """Write clips, annotations, pictures and a plain model into the folder `in` of the work folder."""
    folder, demo = work / "in", root / "assets" / "demo"
    for clip in sorted((demo / "clips").glob("*.mp4")):
        shutil.copy(clip, folder)
    shutil.copytree(demo / "checkpoint", folder / "checkpoint")
    subprocess.run([str(python), "-c", INPUTS, str(folder)], check=True, capture_output=True)
    shutil.copy(demo / "checkpoint" / "tokenizer.json", folder / "plain")
    boxes = [{"time": t, "box": [300, 150, 380, 230]} for t in (0.0, 1.0, 3.0)]
    bird, moving = {"video": "1-named.mp4", "query": "the blue bird"}, {"video": "2-moving.mp4", "query": "the dog"}
    own = [
        bird | {"span": [1.0, 3.5], "boxes": boxes[1:]},
        moving | {"span": None},
        moving | {"span": [0.0, 4.0], "group": "events"},
        {"image": "picture.png", "query": "the blue bird", "boxes": [{"box": [300, 150, 380, 230]}]},
        {"video": "1-named.mp4", "task": "track", "boxes": boxes, "id": "tracked"},
    ]
    upright = {"video": "3-upright.mp4"}
    samples = [upright | {"query": query, "id": query} for query in ("the bus", "the red car")]
    hc = {"bbox": [[300, 150, 80, 80]] * 16, "st_time": 1.0, "ed_time": 3.0, "img_num": 72, "st_frame": 9}
    things = [{"tid": 0, "category": "bird"}, {"tid": 1, "category": "car"}]
    stg = {
        "vid": "2-moving", "fps": 8, "frame_count": 72, "used_segment": {"begin_fid": 0, "end_fid": 71}, "width": 480,
        "height": 360, "subject/objects": things, "temporal_gt": {"begin_fid": 8, "end_fid": 24}, "questions": [],
        "used_relation": {"subject_tid": 0, "object_tid": 1, "predicate": "past", "begin_fid": 8, "end_fid": 24},
        "captions": [{"description": "the dog moves.", "type": "dog", "target_id": 0}],
    }  # fmt: skip
    box = {"tid": 0, "bbox": {"xmin": 9, "ymin": 9, "xmax": 99, "ymax": 99}, "generated": 0, "tracker": "none"}
    vidor = {"video_id": "2-moving", "video_path": "2-moving.mp4", "frame_count": 72, "fps": 8, "width": 480,
             "height": 360, "subject/objects": things, "trajectories": [[box]] * 72}  # fmt: skip
    lines: dict[str, list[Any]] = {"own": own, "samples": samples, "bad": [bird | {"span": [3, 1]}]}
    texts = {f"{name}.jsonl": "".join(json.dumps(line) + "\n" for line in rows) for name, rows in lines.items()}
    texts |= {
        "table.csv": "video,query,id\n1-named.mp4,the blue bird,a\nnone.mp4,the bus,b\n",
        "no-query.csv": "video\n1-named.mp4\n",
        "charades.txt": "1-named 1.0 3.5##the bird flies.\n2-moving 0.0 30.0##the dog moves.\nnone 1.0 2.0##nothing.\n",
        "hc.json": json.dumps({"1-named.mkv": hc | {"caption": "The blue bird flies.", "width": 640, "height": 360}}),
        "vidstg.json": json.dumps([stg]),
        "vidor/2-moving.json": json.dumps(vidor),
        "empty.mp4": "",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "cut.mp4").write_bytes((folder / "1-named.mp4").read_bytes()[:5000])


def make_broken(work: Path) -> None:
    """Write bundles and checkpoints that something is wrong with into the folder `broken`; equal files are links."""

    def copy(source: str, name: str) -> Path:
        return Path(shutil.copytree(work / source, work / "broken" / name, copy_function=os.link))

    def rewrite(path: Path, content: bytes) -> None:
        path.unlink()
        path.write_bytes(content)

    manifest = (work / "build/demo/bundle/manifest.json").read_bytes()
    (copy("build/demo/bundle", "no-manifest") / "manifest.json").unlink()
    rewrite(copy("build/demo/bundle", "no-json") / "manifest.json", manifest[:100])
    changed = {"version": (b'"schema_version": 2', b'"schema_version": 99'), "changed": (b'"layers": ', b'"layers": 1')}
    for name, (old, new) in changed.items():
        rewrite(copy("build/demo/bundle", name) / "manifest.json", manifest.replace(old, new))
    weights = min(copy("build/demo/bundle", "hash").rglob("*.data"))
    rewrite(weights, b"\x01" + weights.read_bytes()[1:])
    min(copy("build/demo/bundle", "no-graph").rglob("*.onnx")).unlink()
    rewrite(copy("in/checkpoint", "config") / "config.json", b"{")
    tensors = copy("in/checkpoint", "checkpoint") / "model.safetensors"
    content = tensors.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    end = header.pop(last)["data_offsets"][0]
    shorter = json.dumps(header).encode()
    rewrite(tensors, len(shorter).to_bytes(8, "little") + shorter + content[8 + size : 8 + size + end])
