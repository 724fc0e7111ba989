"""Record what a user of the command line sees, and compare two records: a restructuring must not change them.

    python benchmarks/behaviour.py record --root . --python .venv/bin/python --out now.json
    python benchmarks/behaviour.py compare before.json now.json

A record holds, for every command on the demo and for many misuses: the exit code, whether there was a traceback, the
names of the files that were written, hashes of binary files, and JSON with floats rounded and times and paths left
out. `compare` exits with 1 if any of these differ, or a step of the first record is not in the second. Texts for people
are listed as `wording` if they differ; they do not fail. Only the standard library is imported here, so that any
checkout can be recorded with its own Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIMEOUT_S = 300
TOLERANCE = 2e-4
"""Of floats, which are rounded to four decimals: two that are nearly equal may be rounded apart."""

RENAMED = {
    "--again": ["--overwrite"],
    "--engine": ["--executor"],
    "--dtype": ["--precision"],
    "--jsonl": ["--json"],
    "--evaluate": ["--judge"],
    "--max-seconds": ["--deadline"],
}
"""An option as it is written in STEPS → what else it may be called; the command's --help decides."""

POSITIONAL = {"--bundle", "--checkpoint", "--out"}
"""Where a command has no such option, the value is given as an argument."""

DROPPED = re.compile(
    r"timings|timings_s|seconds|seconds_\w+|.*_seconds|.*rss_bytes|.*_ms|host|machine|date|created|"
    r"(cost|encode|extend|rebuild|answer)_s|longest_\w+|age_s|stage_seconds|about_sha256"
)
"""Keys of JSON whose values are measured, or belong to a machine."""

DROPPED_REPORT = re.compile(DROPPED.pattern + r"|(html_)?sha256")
"""In reports of a bundle: their hashes cover what was measured."""

DROPPED_HTTP = re.compile(DROPPED.pattern + r"|id|video|expires_at|uptime_s|open_\w*bytes|finished_at|created_at")
HASHED = {".onnx", ".data", ".npz", ".safetensors", ".png", ".mp4"}
WORDING = re.compile(r"/wording|/command|\S*/error: \"")
"""Places in a step that hold texts for people; an error that is null in one record is a difference."""

LINES = {".pbtxt", ".yaml", ".csv", ".txt"}
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

BIRD = "in/1-named.mp4 'where is the blue bird'"
B = "--bundle build/demo/bundle"
M = "--model build/demo/bundle"
STEPS = {
    "version": "--version",
    "doctor": "doctor",
    "doctor as JSON": "doctor --json",
    "export": "export --checkpoint in/checkpoint --out build/demo/bundle",
    "inspect": f"inspect {B}",
    "verify": f"verify {B}",
    "verify one variant": f"verify {B} --variant primitive --threads 1",
    "verify and bisect": f"verify {B} --bisect",
    "infer": f"infer {BIRD} {B} --json clip.json --annotate clip.mp4 --sheet clip.png",
    "infer with the demo bundle": "infer in/2-moving.mp4 'show the white dog moving left' --json moving.json",
    "infer several queries": f"infer {BIRD} 'the bus' 'the red car' {B} --json several.json",
    "infer must answer": f"infer in/3-upright.mp4 'show the bus' {B} --no-allow-none --json upright.json",
    "infer in few tokens": f"infer {BIRD} {B} --max-visual-tokens 90 --variant primitive --json few.json",
    "infer a span": f"infer {BIRD} {B} --task span --json span.json",
    "infer a picture": f"infer in/picture.png 'the blue bird' {B} --task image --json picture.json --annotate p.png",
    "infer a track": f"infer in/1-named.mp4 --track 300,150,380,230 {B} --json track.json --sheet track.png",
    "infer-many a folder": f"infer-many in --query 'the bus' {B} --out folder.jsonl",
    "infer-many again": f"infer-many in --query 'the bus' {B} --out folder.jsonl",
    "infer-many a table": f"infer-many in/table.csv {B} --out table.jsonl",
    "infer-many retry": f"infer-many in/table.csv {B} --out table.jsonl --retry-failed",
    "infer-many as parquet": f"infer-many in/table.csv {B} --task span --out rows.parquet --engine local",
    "infer-many pictures": f"infer-many in/coco --query bird --task image {B} --out pictures.jsonl",
    "evaluate own files": f"evaluate jsonl --annotations in/own.jsonl {M} --out own",
    "evaluate again": f"evaluate jsonl --annotations in/own.jsonl {M} --out own",
    "evaluate the checkpoint": "evaluate jsonl --annotations in/own.jsonl --model in/checkpoint --out eager --limit 1",
    "evaluate charades-sta": f"evaluate charades-sta --annotations in/charades.txt --media in {M} --out sta",
    "evaluate hc-stvg-v1": f"evaluate hc-stvg-v1 --annotations in/hc.json --media in {M} --out hc",
    "evaluate vidstg": f"evaluate vidstg --annotations in/vidstg.json --annotations in/vidor --media in {M} "
    "--out vidstg --shard 1/2",
    "convert-refs": "convert-refs 'in/refs(unc).p' --out 'in/refs(unc).json'",
    "evaluate refcoco": f"evaluate refcoco --annotations in --media in/coco --split val {M} --out ref",
    "evaluate got-10k": f"evaluate got-10k --annotations in/got --media in/got --split test {M} --out got",
    "init": "init --backbone in/plain --out new --queries 2 --taps 0,2 --decoder-width 32 --decoder-layers 2",
    "train": "train --checkpoint new --annotations in/own.jsonl --media in --out trained --epochs 1 --workers 0 "
    "--device cpu --precision fp32 --no-resume",
    "triton": f"triton {B} --out repository --media /videos --kind cpu",
    "watch": f"watch {BIRD} 'the bus' {B} --jsonl events.jsonl --answers --every 2",
    "watch for a while": f"watch {BIRD} {B} --duration 3 --window 8",
    "build lists targets": "build --targets",
    "build here": f"build {B} --target this",
    # Misuses
    "no command": "",
    "unknown command": "nonsense",
    "unknown option": f"infer {BIRD} --nonsense",
    "no arguments": "infer",
    "no query": f"infer in/1-named.mp4 {B}",
    "empty query": f"infer in/1-named.mp4 '' {B} --json bad.json",
    "no such video": f"infer none.mp4 bird {B} --json bad.json",
    "not a video": f"infer in/own.jsonl bird {B} --json bad.json",
    "empty video": f"infer in/empty.mp4 bird {B}",
    "cut video": f"infer in/cut.mp4 bird {B} --json bad.json",
    "unknown task": f"infer {BIRD} {B} --task nonsense",
    "unknown variant": f"infer {BIRD} {B} --variant nonsense",
    "unknown backend": f"infer {BIRD} {B} --backend nonsense",
    "no threads": f"infer {BIRD} {B} --threads 0",
    "deadline": f"infer {BIRD} {B} --deadline 0.001 --json bad.json",
    "too few tokens": f"infer {BIRD} {B} --max-visual-tokens 1 --json bad.json",
    "bad box": f"infer in/1-named.mp4 --track 1,2,3 {B}",
    "box outside": f"infer in/1-named.mp4 --track 900,900,950,950 {B}",
    "output is the video": f"infer {BIRD} {B} --annotate in/1-named.mp4",
    "output with a wrong suffix": f"infer {BIRD} {B} --json bad.txt",
    "output in no folder": f"infer {BIRD} {B} --sheet none/bad.png",
    "two queries drawn": f"infer {BIRD} bus {B} --sheet bad.png",
    "no such bundle": f"infer {BIRD} --bundle none",
    "bundle without manifest": "inspect --bundle broken/no-manifest",
    "manifest is no JSON": "inspect --bundle broken/no-json",
    "manifest of another version": "inspect --bundle broken/version",
    "manifest was changed": f"infer {BIRD} --bundle broken/changed",
    "weights were changed": "verify --bundle broken/hash",
    "infer with changed weights": f"infer {BIRD} --bundle broken/hash",
    "graph is missing": f"infer {BIRD} --bundle broken/no-graph",
    "verify a variant that is not there": "verify --bundle build/demo/bundle --variant nonsense",
    "against without bisect": f"verify {B} --against in",
    "out exists": "export --checkpoint in/checkpoint --out build/demo/bundle",
    "no such checkpoint": "export --checkpoint none --out bad",
    "checkpoint without tensors": "export --checkpoint broken/checkpoint --out bad",
    "config is no JSON": "export --checkpoint broken/config --out bad",
    "unknown dtype": "export --checkpoint in/checkpoint --out bad --dtype fp4",
    "samples without int8": "export --checkpoint in/checkpoint --out bad --samples in/own.jsonl",
    "calibrate on a bad line": f"calibrate {B} --samples in/bad.jsonl --out bad",
    "calibrate on what judges": f"calibrate {B} --samples in/samples.jsonl --select in/own.jsonl "
    "--evaluate in/own.jsonl --out bad",
    "evaluate a bad line": f"evaluate jsonl --annotations in/bad.jsonl {M} --out bad",
    "evaluate no such benchmark": f"evaluate imagenet --annotations in {M} --out bad",
    "evaluate one model twice": f"evaluate jsonl --annotations in/own.jsonl {M} {M} --out bad",
    "evaluate another model into it": "evaluate jsonl --annotations in/own.jsonl --model in/checkpoint --out own",
    "bad shard": f"evaluate jsonl --annotations in/own.jsonl {M} --out bad --shard 3/2",
    "table without a query": f"infer-many in/no-query.csv {B} --out bad.jsonl",
    "folder without a query": f"infer-many in {B} --out bad.jsonl",
    "rows with a wrong suffix": f"infer-many in/table.csv {B} --out bad.txt",
    "pickle that runs code": "convert-refs in/evil.p --out bad.json",
    "train on a bad line": "train --checkpoint new --annotations in/bad.jsonl --media in --out bad",
    "train without media": "train --checkpoint new --annotations in/own.jsonl --media coco --out bad",
    "init from nothing": "init --backbone none --out bad",
    "init with layers that are not there": "init --backbone in/plain --out bad --taps 9",
    "triton again": f"triton {B} --out repository",
    "watch nothing": f"watch none.mp4 bird {B}",
    "watch twice the same": f"watch in/1-named.mp4 bird bird {B}",
    "watch over a file": f"watch {BIRD} {B} --jsonl events.jsonl",
    "watch what is no video": f"watch in/own.jsonl bird {B} --jsonl bad.jsonl",
    "serve beyond this machine": f"serve {B} --host 0.0.0.0 --port 0",
    "serve no bundle": "serve --bundle none --port 0",
    "serve without the key": f"serve {B} --api-key-env NO_SUCH_VARIABLE",
    "build for nothing": f"build {B} --target nonsense",
    "build no such graph": "build --bundle build/demo/bundle --target rtx-ada --graph nonsense",
    # What takes longest
    "build for RTX": "build --bundle build/demo/bundle --target rtx-ada --graph spatial_decoder",
    "calibrate": f"calibrate {B} --samples in/samples.jsonl --select in/own.jsonl --out int8 --own-tubes --confirm 1 "
    "--max-trials 2 --force-int8 language_model --force-int8 vision_encoder --threads 1",
    "inspect INT8": "inspect --bundle int8",
    "verify INT8": "verify --bundle int8",
    "infer INT8": f"infer {BIRD} --bundle int8 --json int8.json",
    "calibrate INT8 again": "calibrate --bundle int8 --samples in/samples.jsonl --out bad",
}
"""What is run, in this order: a name → words for a shell. `--bundle`, `--checkpoint` and `--out` may be arguments."""

SLOW_STEPS = {
    "export of one variant in fp16": "export --checkpoint in/checkpoint --out fp16 --dtype fp16 --variant standard",
    "inspect fp16": "inspect --bundle fp16",
    "infer fp16": f"infer {BIRD} --bundle fp16 --json fp16.json",
    "export unverified": "export --checkpoint trained --out unverified --no-verify --variant primitive",
    "infer unverified": f"infer {BIRD} --bundle unverified --threads 1 --json unverified.json",
    "train-demo": "train-demo --out demo --vision-steps 1 --grounding-steps 1",
    "infer-many with ray": f"infer-many in/table.csv {B} --out ray.jsonl --engine ray --workers 1",
    "evaluate-demo": f"evaluate-demo --clips 1 {B} --out figures.json",
    "build once more": "build --bundle build/demo/bundle --target rtx-ada --graph spatial_decoder --again --layers",
}
"""Run after the others if --slow is given: an export takes one or two minutes."""


def normal(value: Any, shorten: Callable[[str], str], dropped: re.Pattern[str] = DROPPED) -> Any:
    """Return JSON without what differs from run to run: floats to four decimals, no times, short paths."""
    if isinstance(value, dict):
        return {k: normal(v, shorten, dropped) for k, v in value.items() if not dropped.fullmatch(k)}
    if isinstance(value, list):
        return [normal(item, shorten, dropped) for item in value]
    if isinstance(value, str):
        return shorten(value)
    return round(value, 4) if isinstance(value, float) else value


def shape(value: Any) -> Any:
    """Return the keys of JSON and the types of its values: what a machine's own facts leave to compare."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return type(value).__name__


@dataclass
class Recorder:
    """Runs the command line of a checkout in a work folder.

    Attributes:
        root: the checkout.
        python: its interpreter.
        base: an empty folder, for the work, the cache and temporary files.
        record: what was seen, by the name of the step.
    """

    root: Path
    python: Path
    base: Path
    record: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.work = self.base / "work"
        for name in ("work/in", "tmp", "home"):
            (self.base / name).mkdir(parents=True)
        paths = {"HOME": "home", "XDG_CACHE_HOME": "cache", "TMPDIR": "tmp"}
        self.env = os.environ | {name: str(self.base / path) for name, path in paths.items()}
        self.env |= {"COLUMNS": "100", "OMP_NUM_THREADS": "1"}
        shim = self.root / "cli.py"
        self.program = [str(self.python), *([str(shim)] if shim.is_file() else ["-m", "bridge_stg"])]
        self.options: dict[str, set[str]] = {}
        self.places = {str(self.base): "<base>", str(self.root): "<root>", str(self.python.parent.parent): "<venv>"}

    def shorten(self, text: str) -> str:
        """Replace the paths of this run."""
        for path, name in self.places.items():
            text = text.replace(path, name)
        return text

    def wording(self, text: str) -> list[str]:
        """Return lines for people, with # for every number."""
        return [re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", line) for line in self.shorten(text).splitlines()]

    def arguments(self, words: str) -> list[str]:
        """Split words, and give options the names that they have in this checkout."""
        given = shlex.split(words)
        if not given or given[0].startswith("-"):
            return given
        if given[0] not in self.options:
            shown = subprocess.run(
                [*self.program, given[0], "--help"], env=self.env, capture_output=True, text=True, check=False
            )
            rows = [line for line in shown.stdout.splitlines() if line.lstrip().startswith("-")]
            self.options[given[0]] = {name for row in rows for name in re.findall(r"--[a-z][\w-]*", row)}
        there = self.options[given[0]]
        made = []
        for word in given:
            name = next((other for other in (word, *RENAMED.get(word, [])) if other in there), word)
            if name in there or name not in POSITIONAL:
                made.append(name)
        return made

    def files(self) -> dict[str, tuple[int, int]]:
        """Return all files of the work folder, with size and time of their last change."""
        found = ((path, path.stat()) for path in sorted(self.work.rglob("*")) if path.is_file())
        return {path.relative_to(self.work).as_posix(): (stat.st_size, stat.st_mtime_ns) for path, stat in found}

    def describe(self, name: str) -> Any:
        """Return what counts of a file's content; None: only that it is there."""
        path = self.work / name
        dropped = DROPPED_REPORT if path.parent.name == "reports" else DROPPED
        if path.suffix == ".json":
            return normal(json.loads(path.read_text(encoding="utf-8")), self.shorten, dropped)
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            return [normal(json.loads(line), self.shorten, dropped) for line in lines]
        if path.suffix in LINES:
            return self.shorten(path.read_text(encoding="utf-8")).splitlines()
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix in HASHED else None

    def run(self, name: str, words: str) -> None:
        """Run a command to its end and record it."""
        before, began = self.files(), time.monotonic()
        command = [*self.program, *self.arguments(words)]
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        try:
            done = subprocess.run(command, cwd=self.work, env=self.env, timeout=TIMEOUT_S, check=False, **pipes)
        except subprocess.TimeoutExpired:
            done = subprocess.CompletedProcess(command, -1, "", "timeout")
        self.note(name, words, before, done.returncode, done.stdout, done.stderr)
        print(f"{time.monotonic() - began:6.1f} s  exit {done.returncode:3}  {name}", file=sys.stderr, flush=True)

    def note(
        self, name: str, words: str, before: dict[str, tuple[int, int]], code: int, out: str, err: str, **more: Any
    ) -> None:
        """Record a command that ended; `before` is what lay in the work folder."""
        after = self.files()
        entry: dict[str, Any] = {"command": words, "exit": code, "traceback": "Traceback (most recent" in err, **more}
        if out.startswith(("{", "[")):
            entry["stdout"] = shape(json.loads(out))
            out = ""
        entry["written"] = {path: self.describe(path) for path in after if after[path] != before.get(path)}
        entry["removed"] = [path for path in before if path not in after]
        entry["wording"] = {"stdout": self.wording(out), "stderr": self.wording(err)}
        self.record[name] = entry

    def serve(self) -> None:
        """Start the server, ask it over HTTP, and end it with SIGTERM."""
        words = "serve --bundle build/demo/bundle --port 0 --media in --live clip=in/1-named.mp4"
        command, before = [*self.program, *self.arguments(words)], self.files()
        answers: dict[str, Any] = {}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=self.work, env=self.env | {"PYTHONUNBUFFERED": "1"}, **pipes) as server:
            try:
                assert server.stdout is not None
                first = server.stdout.readline()
                address = re.search(r"http://[\d.]+:\d+", first)
                if address:
                    answers.update(self.ask(address[0]))
            except (OSError, ValueError, KeyError, AttributeError) as error:  # an answer of another form
                answers["ended early"] = type(error).__name__
            finally:
                server.send_signal(signal.SIGTERM)
                out, err = server.communicate(timeout=60)
        left = sorted(path.name for path in (self.base / "tmp").glob("bridge*"))
        self.note("serve", words, before, server.returncode, first + out, err, answers=answers, left=left)

    def ask(self, address: str) -> Iterator[tuple[str, Any]]:
        """Yield requests and their answers: valid ones and misuses."""

        def call(method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            request = urllib.request.Request(address + path, data, {"Content-Type": kind}, method=method)
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    status, form, text = answer.status, answer.headers.get_content_type(), answer.read()
            except urllib.error.HTTPError as error:
                status, form, text = error.code, error.headers.get_content_type(), error.read()
            raw = json.loads(text) if form == "application/json" and text else text
            return {"status": status, "type": form, "raw": raw}

        def seen(answer: Any) -> Any:
            raw = answer["raw"]
            answer_json = normal(raw, self.shorten, DROPPED_HTTP) if not isinstance(raw, bytes) else None
            return {"status": answer["status"], "type": answer["type"], "json": answer_json}

        for path in ("/", "/docs", "/health", "/health/live", "/v1/live", "/none", "/v1/videos/none", "/v1/jobs/none"):
            yield f"GET {path}", seen(call("GET", path))
        routes = call("GET", "/openapi.json")["raw"]["paths"]
        yield (
            "routes",
            {p: {m: sorted(answer_json["responses"]) for m, answer_json in r.items()} for p, r in routes.items()},
        )
        metrics = call("GET", "/metrics")["raw"].decode()
        yield "metrics", sorted(set(re.findall(r"^# TYPE (bridge_stg_\w+ \w+)", metrics, re.MULTILINE)))
        clip = (self.work / "in/1-named.mp4").read_bytes()
        head = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
        queries = head % (b"queries", b"", b"where is the blue bird") + head % (b"queries", b"", b"the bus")
        form = "multipart/form-data; boundary=x"
        for name, content in (("a clip", clip), ("a cut clip", clip[:5000]), ("a text", b"text"), ("nothing", b"")):
            body = head % (b"file", b'; filename="a.mp4"', content) + queries + b"--x--\r\n"
            yield f"POST /v1/ground with {name}", seen(call("POST", "/v1/ground", body, form))
        made = call("POST", "/v1/videos", {"source": "2-moving.mp4"})
        yield "POST /v1/videos", seen(made)
        video = made["raw"].get("id")
        yield "POST /v1/videos not there", seen(call("POST", "/v1/videos", {"source": "../secret.mp4"}))
        for queries_given in (["the dog", "the bus"], [], [""], ["a"] * 99):
            job = call("POST", "/v1/jobs", {"video": video, "queries": queries_given})
            yield f"POST /v1/jobs with {len(queries_given)} {queries_given[:1]}", seen(job) | {"json": None}
            if job["status"] == 202:
                path = f"/v1/jobs/{job['raw']['id']}"
                while (answer := call("GET", path))["raw"].get("status") in ("queued", "running"):
                    time.sleep(0.2)
                yield "GET /v1/jobs/{id}", seen(answer)
                yield "GET annotated.mp4", seen(call("GET", f"{path}/annotated.mp4"))
                events = call("GET", f"{path}/events")["raw"].decode()
                yield "GET events", sorted(set(re.findall(r"^event: (\w+)", events, re.MULTILINE)))
        yield "POST /v1/jobs is no JSON", seen(call("POST", "/v1/jobs", b"{"))
        yield "GET frame", seen(call("GET", f"/v1/videos/{video}/frame?time=1"))
        yield "DELETE video", seen(call("DELETE", f"/v1/videos/{video}"))
        yield "GET deleted video", seen(call("GET", f"/v1/videos/{video}"))


def make_inputs(recorder: Recorder) -> None:
    """Write clips, annotations, pictures and a plain model into the folder `in` of the work folder."""
    folder, demo = recorder.work / "in", recorder.root / "assets" / "demo"
    for clip in sorted((demo / "clips").glob("*.mp4")):
        shutil.copy(clip, folder)
    shutil.copytree(demo / "checkpoint", folder / "checkpoint")
    subprocess.run([str(recorder.python), "-c", INPUTS, str(folder)], check=True, capture_output=True)
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
    changed = {"version": (b'"schema_version": 1', b'"schema_version": 99'), "changed": (b'"layers": ', b'"layers": 1')}
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


def record(root: Path, python: Path, out: Path, bundle: Path | None, slow: bool) -> None:
    """Run everything and write the record, after every step, so that what was seen is kept if it is ended.

    Args:
        root: the checkout.
        python: an interpreter that it is installed for.
        out: the JSON file to write.
        bundle: what `make demo` of this checkout left, instead of an export; its files are recorded in the same way.
        slow: whether to run the slow steps too.
    """
    os.nice(5)
    with tempfile.TemporaryDirectory(prefix="behaviour-") as folder:
        recorder = Recorder(root.resolve(), python.absolute(), Path(folder).resolve())
        make_inputs(recorder)
        recorder.run("help", "--help")
        listing = "\n".join(recorder.record["help"]["wording"]["stdout"]).partition("Commands:")[2]
        for command in re.findall(r"^  ([\w-]+)", listing, re.MULTILINE):
            recorder.run(f"help of {command}", f"{command} --help")
        for name, words in (STEPS | (SLOW_STEPS if slow else {})).items():
            before = recorder.files()
            if name == "export" and bundle is not None:
                shutil.copytree(bundle, recorder.work / "build/demo/bundle")
                recorder.note(name, words, before, 0, "", "")
            else:
                recorder.run(name, words)
            if name == "export":
                make_broken(recorder.work)
                recorder.serve()
            out.write_text(json.dumps(recorder.record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def differences(one: Any, two: Any, place: str = "") -> Iterator[str]:
    """Yield a line for every place in which two values differ."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in sorted({*one, *two}):
            if key in one and key in two:
                yield from differences(one[key], two[key], f"{place}/{key}")
            else:
                yield f"{place}/{key}: only in the {'first' if key in one else 'second'}"
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for index, (left, right) in enumerate(zip(one, two)):
            yield from differences(left, right, f"{place}[{index}]")
    elif isinstance(one, float) and isinstance(two, (int, float)) and abs(one - two) <= TOLERANCE:
        return
    elif one != two:
        yield f"{place}: {json.dumps(one)[:200]} → {json.dumps(two)[:200]}"


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Read a record; what is dropped today is dropped from one that was written before."""
    steps: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    for step in steps.values():
        for name, content in step["written"].items():
            dropped = DROPPED_REPORT if "/reports/" in name else DROPPED
            step["written"][name] = normal(content, str, dropped)
    return steps


def compare(first: Path, second: Path) -> int:
    """Print how two records differ, and return the exit code: 1 if in more than wording."""
    one, two = load(first), load(second)
    counts = {"DIFFERENT": 0, "wording": 0}
    for step in dict.fromkeys([*one, *two]):
        if step not in one:
            print(f"not compared  {step}: only in the second")
            continue
        found = list(differences(one[step], two[step])) if step in two else [": only in the first"]
        for line in found:
            kind = "wording" if WORDING.match(line) else "DIFFERENT"
            counts[kind] += 1
            print(f"{kind}  {step}{line}")
    print(f"{len(one)} and {len(two)} steps; {counts['DIFFERENT']} differences, {counts['wording']} of wording")
    return 1 if counts["DIFFERENT"] else 0


def main() -> int:
    """Read the arguments, and record or compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run every command and write what was seen")
    recording.add_argument("--root", type=Path, required=True, help="the checkout")
    recording.add_argument("--python", type=Path, required=True, help="an interpreter that it is installed for")
    recording.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    recording.add_argument("--bundle", type=Path, help="what `make demo` exported; without it, it is exported here")
    recording.add_argument("--slow", action="store_true", help="more exports and a training too: some five minutes")
    comparing = commands.add_parser("compare", help="say how two records differ")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    options = parser.parse_args()
    if options.command == "compare":
        return compare(options.first, options.second)
    record(options.root, options.python, options.out, options.bundle, options.slow)
    return 0


if __name__ == "__main__":
    sys.exit(main())
