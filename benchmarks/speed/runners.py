"""Start runner programs in their own environments and exchange requests with them line by line."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
OURS = ("ours", "torch_eager", "torch_compile")
PEERS = HERE / "peers"
AUTO, CHOOSE_THEMSELVES = "auto", ("openvino", "openvino_genai")
"""Peers that by default compute fp32 graphs in bf16 if the CPU supports it; measured with and without that choice."""

CHAIN_ROWS = ("vision", "prefill", "prefill_text", "decode", "bridge", "spatial", "end_to_end")
"""Rows that are compared; the others are measured only for this runtime, in int8."""


class RunnerError(Exception):
    """A runner failed to start, to answer, or to run a request; the message is one line."""


@dataclass(frozen=True)
class RunnerSpec:
    """A runner program and what it measures.

    Attributes:
        name: name of the engine: one of `OURS` or a peer.
        precision: fp32, int8 or int4.
        command: command line of the program.
        rows: rows to measure; None: all that it has.
        compared_with: name of our runner that takes turns with it, since not all runners may fit in memory at once.
    """

    name: str
    precision: str
    command: tuple[str, ...]
    rows: tuple[str, ...] | None = None
    compared_with: str = "ours"

    @property
    def label(self) -> str:
        """Name of the runner in the results, such as `ours_int8`."""
        return f"{self.name}_{self.precision}"


@dataclass(eq=False)
class Runner:
    """A running program that has loaded a model.

    Attributes:
        spec: the program and what it measures.
        loaded: its answer to `load`.
    """

    spec: RunnerSpec
    process: subprocess.Popen[str]
    answers: queue.Queue[str | None]
    errors: IO[str]
    loaded: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[str]:
        """Rows to measure that the program supports."""
        rows = list(self.loaded.get("rows", []))
        return rows if self.spec.rows is None else [row for row in rows if row in self.spec.rows]

    def ask(self, request: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            RunnerError: the program ended, exceeded `timeout_s` (it is then stopped), or answered with an error.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise RunnerError(f"{self.spec.label} has ended: {self._last_words()}") from error
        try:
            line = self.answers.get(timeout=timeout_s)
        except queue.Empty:
            self.end()
            raise RunnerError(
                f"{self.spec.label} did not answer {request.get('row', request['do'])} in {timeout_s:g} s"
            ) from None
        if line is None:
            raise RunnerError(f"{self.spec.label} ended at {request.get('row', request['do'])}: {self._last_words()}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise RunnerError(f"{self.spec.label} answered invalid JSON: {line[:200]!r}") from None
        if not answer.get("ok"):
            raise RunnerError(str(answer.get("error", "no reason given"))[:500])
        return answer

    def end(self) -> None:
        """Ask the program to quit and kill it if it does not; may be called again."""
        if self.process.poll() is None:
            try:
                assert self.process.stdin is not None
                self.process.stdin.write('{"do": "quit"}\n')
                self.process.stdin.close()
                self.process.wait(timeout=5)
            except (OSError, ValueError, subprocess.TimeoutExpired):
                self.process.kill()
                self.process.wait()
        self.errors.close()

    def _last_words(self) -> str:
        try:
            self.process.wait(timeout=5)
            lines = Path(self.errors.name).read_text(encoding="utf-8", errors="replace").split("\n")
        except (OSError, subprocess.TimeoutExpired):
            return "no reason given"
        printed = [line.strip() for line in lines if line.strip()]
        return f"exit status {self.process.returncode}; {printed[-1][:300] if printed else 'no error output'}"


def start(spec: RunnerSpec, model: Mapping[str, Any], *, threads: int, log: Path, timeout_s: float = 1800) -> Runner:
    """Start a program and load a model in it.

    Args:
        spec: program to start.
        model: `name`, `checkpoint`, `folder` and `bundles` of the protocol's `load` request.
        threads: threads to compute with.
        log: file for the program's stderr.
        timeout_s: limit for loading in seconds.

    Raises:
        RunnerError: the program does not start, or cannot load the model.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    errors = log.open("w", encoding="utf-8")
    try:
        process = subprocess.Popen(
            spec.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    except OSError as error:
        errors.close()
        raise RunnerError(f"{spec.command[0]} does not start: {error}") from error
    answers: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, answers), daemon=True).start()
    runner = Runner(spec, process, answers, errors)
    request = {"do": "load", "model": dict(model), "precision": spec.precision, "threads": threads}
    try:
        runner.loaded = runner.ask(request, timeout_s=timeout_s)
    except RunnerError:
        runner.end()
        raise
    return runner


def _read(stream: IO[str], answers: queue.Queue[str | None]) -> None:
    for line in stream:
        answers.put(line)
    answers.put(None)


def peer_runners(names: Sequence[str], precisions: Sequence[str]) -> tuple[list[RunnerSpec], dict[str, str]]:
    """Install peers in their own environments; return their runners, and the reason for each missing peer.

    Args:
        names: names of the peers; an unknown name or failed installation does not affect the others.
        precisions: precisions to run each peer in.
    """
    sys.path.insert(0, str(PEERS))
    from speed.peers.install import InstallError, install

    specs, missing = [], {}
    for name in names:
        try:
            python = install(name)
        except (InstallError, OSError, subprocess.SubprocessError) as error:
            missing[name] = " ".join(str(error).split())[:500]
            continue
        extra = (AUTO,) if name in CHOOSE_THEMSELVES and "fp32" in precisions else ()
        for precision in (*precisions, *extra):
            specs.append(RunnerSpec(name, precision, (str(python), str(PEERS / f"run_{name}.py"))))
    return specs, missing


def own_runners(precisions: Sequence[str], engines: Sequence[str] = OURS) -> list[RunnerSpec]:
    """Return the runners of this runtime in each precision, and of eager and compiled torch."""
    program = str(HERE / "run_chain.py")
    found = []
    for engine in engines:
        for precision in precisions if engine == "ours" else ("fp32",):
            rows = None if (engine, precision) == ("ours", "int8") else CHAIN_ROWS
            found.append(RunnerSpec(engine, precision, (sys.executable, program, engine), rows))
    return found


MEMORY = {"fp32": (2.15, 1.6e9), "int8": (0.9, 0.7e9), "int4": (1.6, 0.8e9)}
"""Memory of a runner: bytes per byte of the bf16 checkpoint, and further bytes, from the 0.5B and 2B models."""
MEMORY_OF_PEERS = {
    "openvino": {"fp32": 6.2, "int8": 4.4, "int4": 4.0, AUTO: 6.0},
    "openvino_genai": {AUTO: 2.6},
    "hf_exporters": {"fp32": 4.2, "int8": 2.0},
}
"""Memory per byte of the bf16 checkpoint, including what loading takes, of peers that need more (0.5B)."""
RESERVED_DISK = 4e9
KINDS_OF_GGUF = {"fp32": "f32", "int8": "q8_0", "int4": "q4_0"}


def needs(spec: RunnerSpec, weights: int) -> float:
    """Estimate a runner's memory in bytes from the size of the bf16 checkpoint."""
    factor, constant = MEMORY.get(spec.precision, MEMORY["fp32"])
    return MEMORY_OF_PEERS.get(spec.name, {}).get(spec.precision, factor) * weights + constant


def disk_to_build(spec: RunnerSpec, weights: int, folder: Path) -> float:
    """Estimate the bytes of disk that a peer's files take while they are made, from the size of the bf16 checkpoint.

    int8 and int4 are made from files in fp32. 0 if the files are in `folder` already, or the peer needs none.
    """
    kind = (KINDS_OF_GGUF if spec.name == "llama_cpp" else {AUTO: "fp32"}).get(spec.precision, spec.precision)
    if spec.name in (*OURS, "openvino") or (folder / f"{spec.name}-{kind}").is_dir():
        return 0.0
    graphs = 2 if spec.name == "hf_exporters" else 1
    return graphs * (2.0 if kind in ("fp32", "f32") else 2.6) * weights + RESERVED_DISK


def grouped(
    specs: Sequence[RunnerSpec], weights: int, room: float, anchors: Mapping[str, RunnerSpec]
) -> list[list[RunnerSpec]]:
    """Group runners so that each group fits in memory.

    Args:
        specs: runners, reference first.
        weights: bytes of the bf16 checkpoint.
        room: bytes of memory available to the runners of one group together.
        anchors: our runner by precision. Every group of peers repeats those of its precisions as `ours@NAME`, NAME
            being the group's first peer, so that each peer takes turns with ours.
    """
    rows = tuple(row for row in CHAIN_ROWS if row != "end_to_end")
    groups: list[list[RunnerSpec]] = []

    def added(spec: RunnerSpec, to: list[RunnerSpec]) -> list[RunnerSpec]:
        """Return what a runner adds to a group: itself, and our runner of its precision if that is missing."""
        if spec.precision not in anchors:
            return [spec]
        first = next((one.name for one in to if not one.name.startswith("ours@")), spec.name)
        anchor = replace(anchors[spec.precision], name=f"ours@{first}", rows=rows)
        return [*([] if anchor in to else [anchor]), replace(spec, compared_with=anchor.name)]

    for spec in specs:
        if not groups or sum(needs(one, weights) for one in (*groups[-1], *added(spec, groups[-1]))) > room:
            groups.append([])
        groups[-1] += added(spec, groups[-1])
    return groups
