"""Run the steps on a checkout, and record what a user would see."""

from __future__ import annotations

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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inputs import make_broken, make_inputs
from normalize import DROPPED, DROPPED_HTTP, DROPPED_REPORT, normal, shape
from steps import POSITIONAL, RENAMED, SLOW_STEPS, STEPS

TIMEOUT_S = 300
HASHED = {".onnx", ".data", ".npz", ".safetensors", ".png", ".mp4"}
LINES = {".pbtxt", ".yaml", ".csv", ".txt"}


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
        make_inputs(recorder.work, recorder.root, recorder.python)
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
