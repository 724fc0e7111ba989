"""Replay an export in subprocesses, whose memory is separate from that of torch and is measured on its own.

This process records the cases and goes on with the next graph; a subprocess, which imports neither torch nor onnx,
opens one variant of a graph at a time and compares.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.export.parity.parity import Parity, measure
from bridge_stg.export.parity.probes import load_cases
from bridge_stg.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from bridge_stg.runtime.backends.session import KVCache, Session, SessionWrapper
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.bundle.typed_json import from_json
from bridge_stg.runtime.host.memory import peak_bytes
from bridge_stg.runtime.host.subprocess import run_in_subprocess
from bridge_stg.runtime.parity import compare

PURPOSE = "replays the bundle"
ADVICE = (
    "Nothing was written. Close other programs, or leave the comparison out with --no-verify and run `verify` on a "
    "larger machine"
)


@dataclass(frozen=True)
class Replayed:
    """Comparisons of every variant, a subprocess's peak memory, and the seconds of each `graph (variant)`."""

    parity: Parity
    peak_rss_bytes: int
    seconds: dict[str, float]

    def __add__(self, other: Replayed) -> Replayed:
        """Return the comparisons of both, and the larger peak."""
        peak = max(self.peak_rss_bytes, other.peak_rss_bytes)
        return Replayed(self.parity + other.parity, peak, self.seconds | other.seconds)


class Replays(AbstractContextManager["Replays"]):
    """Replays of graphs in subprocesses, one at a time, while the caller goes on.

    `cases`, `golden` and `low_memory` are as for `replay_in_subprocess`. Replays that have not begun when the block
    ends are left out.
    """

    def __init__(self, cases: Path, golden: Sequence[Path], *, low_memory: bool = False) -> None:
        self._cases, self._golden, self._low_memory = cases, golden, low_memory
        self._queue = ThreadPoolExecutor(1)
        self._replays: list[Future[Replayed]] = []

    def __exit__(self, *exception: object) -> None:
        self._queue.shutdown(cancel_futures=True)

    def add(self, graphs: Sequence[tuple[GraphSpec, Path]]) -> None:
        """Replay graphs as soon as those before have been."""
        arguments = graphs, self._cases, self._golden
        self._replays.append(self._queue.submit(replay_in_subprocess, *arguments, low_memory=self._low_memory))

    def finish(self) -> Replayed:
        """Wait for all replays and return their results in order. Raises EngineError if a graph could not run."""
        return sum((replay.result() for replay in self._replays), Replayed(Parity((), {}), 0, {}))


def replay_in_subprocess(
    graphs: Sequence[tuple[GraphSpec, Path]],
    cases: Path,
    golden: Sequence[Path],
    *,
    threads: int | None = None,
    low_memory: bool = False,
) -> Replayed:
    """Replay graphs (contract and .onnx file, in the order of the chain) in a subprocess.

    `cases` is the folder of the random-input cases, `golden` are folders of golden cases. With `low_memory` onnxruntime
    keeps no second copy of the weights, which is slower. Raises EngineError if a graph cannot run.
    """
    job = {
        "graphs": [{"contract": dataclasses.asdict(contract), "file": str(file)} for contract, file in graphs],
        "cases": str(cases), "golden": [str(folder) for folder in golden],
        "threads": threads, "low_memory": low_memory,
    }  # fmt: skip
    result = run_in_subprocess("bridge_stg.export.parity.replay:replay", job, purpose=PURPOSE, advice=ADVICE)
    return Replayed(Parity.from_dict(result["parity"]), result["peak_rss_bytes"], result["seconds"])


def replay(job: Mapping[str, Any]) -> dict[str, Any]:
    """Replay the graphs of a job of `replay_in_subprocess`, which has the arguments; return its result."""
    golden = [Path(case) for case in job["golden"]]
    parity, seconds = Parity((), {}), {}
    for entry in job["graphs"]:
        contract: GraphSpec = from_json(GraphSpec, entry["contract"], "contract")
        began = time.monotonic()
        options = {"threads": job["threads"], "low_memory": job["low_memory"]}
        with OnnxRuntimeSession(Path(entry["file"]), contract, **options) as session:
            parity += measure(load_cases(Path(job["cases"]), contract.name), {contract.variant: session})
            replayed = compare.replay(golden, {contract.name: _Once(session)}, graphs=(contract.name,))
        named = []
        for boundary in replayed:
            call, _, tensor = boundary.name.rpartition(".")
            name = f"{contract.name}.{tensor} ({contract.variant}; golden {call})"
            named.append(dataclasses.replace(boundary, name=name))
        parity += Parity(tuple(named), {})
        seconds[str(contract)] = time.monotonic() - began
    return {"parity": parity.to_dict(), "peak_rss_bytes": peak_bytes(), "seconds": seconds}


class _Once(SessionWrapper):
    """A session that runs a call without a cache once: the clips of two golden cases have the same frames."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._known: list[tuple[Mapping[str, np.ndarray], dict[str, Any]]] = []

    def infer(self, feeds: Mapping[str, np.ndarray], *, cache: KVCache | None = None) -> dict[str, Any]:
        """See `Session.infer`."""
        if cache is not None:
            return super().infer(feeds, cache=cache)
        for known, outputs in self._known:
            if all(np.array_equal(known[name], array) for name, array in feeds.items()):
                return outputs
        self._known.append((feeds, super().infer(feeds)))
        return self._known[-1][1]
