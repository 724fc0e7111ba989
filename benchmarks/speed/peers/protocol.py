"""Protocol between a runner and the orchestrator: one JSON object per line on stdin and stdout, arrays in .npz files.

    {"do": "load", "model": {"name", "checkpoint", "folder", "bundles"}, "precision": "int8", "threads": 2}
    → {"ok": true, "load_s", "build_s", "versions", "rows", "precision"}
    {"do": "run", "row": "decode", "inputs": "in.npz", "repeat": 3, "outputs": "out.npz" or null}
    → {"ok": true, "seconds": [3 floats], "cpu_seconds": [3 floats], "tokens", "peak_bytes"}
    {"do": "quit"}

An error is {"ok": false, "error": "one line"}. Output of libraries goes to stderr. Must not depend on any peer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import numpy as np

Arrays = Mapping[str, np.ndarray]


class PeerError(Exception):
    """A request that this peer does not support; the message gives the reason in one line."""


@dataclass(frozen=True)
class Model:
    """The model to run.

    Attributes:
        name: name of the shape, or `demo`.
        checkpoint: folder of the checkpoint.
        folder: folder for files that a runner builds once per model.
        bundles: precision → folder of this project's bundle, for peers that run its graphs.
    """

    name: str
    checkpoint: Path
    folder: Path
    bundles: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """One repetition of a row.

    Attributes:
        timed: does the work and returns its outputs; called at least once.
        before: restores the initial state; not timed.
        tokens: number of tokens that one repetition computes; None if the row has no tokens.
    """

    timed: Callable[[], Arrays]
    before: Callable[[], object] = lambda: None
    tokens: int | None = None


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run.

    Attributes:
        rows: row → function that makes a `Work` from the row's inputs.
        precision: description of the precision that is computed in.
        versions: distributions whose versions are reported.
        build_s: seconds spent on building files that are kept; 0 if they existed.
    """

    rows: Mapping[str, Callable[[Arrays], Work]]
    precision: str
    versions: tuple[str, ...]
    build_s: float = 0.0


Load = Callable[[Model, str, int], Loaded]


def serve(load: Load) -> None:
    """Answer requests from stdin until `quit` or end of file; `load` takes model, precision and threads."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keep output of libraries out of the answers
    answer_requests(load, sys.stdin, answers)


def answer_requests(load: Load, requests: TextIO, answers: TextIO) -> None:
    """Answer each line, a JSON object, with one line."""
    loaded: Loaded | None = None
    for line in requests:
        try:
            request = json.loads(line)
            if request.get("do") == "quit":
                return
            if request.get("do") == "load":
                loaded, answer = _load(load, request)
            elif request.get("do") == "run":
                answer = _run(loaded, request)
            else:
                raise PeerError(f"do is {request.get('do')!r}, expected load, run or quit")
        except Exception as error:  # noqa: BLE001 - a peer may raise anything, and the others still have to be measured
            answer = {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _load(load: Load, request: Mapping[str, Any]) -> tuple[Loaded, dict[str, Any]]:
    given = request["model"]
    bundles = {name: Path(folder) for name, folder in (given.get("bundles") or {}).items()}
    model = Model(given["name"], Path(given["checkpoint"]), Path(given["folder"]), bundles)
    began = time.perf_counter()
    loaded = load(model, request["precision"], request["threads"])
    seconds = time.perf_counter() - began - loaded.build_s
    return loaded, {
        "ok": True,
        "load_s": seconds,
        "build_s": loaded.build_s,
        "versions": {name: metadata.version(name) for name in loaded.versions},
        "rows": list(loaded.rows),
        "precision": loaded.precision,
    }


def _run(loaded: Loaded | None, request: Mapping[str, Any]) -> dict[str, Any]:
    if loaded is None:
        raise PeerError("nothing is loaded; send load first")
    make = loaded.rows.get(request["row"])
    if make is None:
        raise PeerError(f"unknown row {request['row']!r}; this peer has: {', '.join(loaded.rows)}")
    with np.load(request["inputs"], allow_pickle=False) as file:
        work = make(dict(file))
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    outputs: Arrays = {}
    for _ in range(request["repeat"]):
        work.before()
        began, cpu_began = time.perf_counter(), time.process_time()
        outputs = work.timed()
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
    if request.get("outputs"):
        np.savez(request["outputs"], **outputs)
    measured = {"seconds": seconds, "cpu_seconds": cpu_seconds}
    return {"ok": True, **measured, "tokens": work.tokens, "peak_bytes": peak_bytes()}


def peak_bytes() -> int | None:
    """Return the peak resident memory of this process in bytes, or None if the system does not report it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), None)
