"""Runner programs seen from the orchestrator: started in their own environment, asked one line at a time."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
OURS = ("ours", "torch_eager", "torch_compile")
PEERS = HERE / "peers"
AUTO, CHOOSE_THEMSELVES = "auto", ("openvino", "openvino_genai")
"""Peers that compute a graph in fp32 in bf16 where the CPU can, unless they are told not to: also as they choose."""

CHAIN_ROWS = ("vision", "prefill", "prefill_text", "decode", "bridge", "spatial", "end_to_end")
"""What is compared; the rest is this runtime's alone, and measured in int8."""


class RunnerError(Exception):
    """A runner that does not start, does not answer, or says that it cannot; the message is one line."""


@dataclass(frozen=True)
class RunnerSpec:
    """Which program runs what.

    Attributes:
        name: of the engine: one of `OURS` or of the peers.
        precision: fp32, int8 or int4.
        command: the program.
        rows: the only rows to measure; None: all that it has.
        beside: the name of our own runner that took turns with it, where there was no memory for all at once.
    """

    name: str
    precision: str
    command: tuple[str, ...]
    rows: tuple[str, ...] | None = None
    beside: str = "ours"

    @property
    def label(self) -> str:
        """The name under which its figures stand, such as `ours_int8`."""
        return f"{self.name}_{self.precision}"


@dataclass(eq=False)
class Runner:
    """A started program that has loaded a model.

    Attributes:
        spec: what it is.
        loaded: its answer to `load`.
    """

    spec: RunnerSpec
    process: subprocess.Popen[str]
    answers: queue.Queue[str | None]
    errors: IO[str]
    loaded: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[str]:
        """The rows that it can measure and is to."""
        rows = list(self.loaded.get("rows", []))
        return rows if self.spec.rows is None else [row for row in rows if row in self.spec.rows]

    def ask(self, request: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            RunnerError: it ended, took too long (and was ended for it), or answered with an error.
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
            raise RunnerError(f"{self.spec.label} answered something else than JSON: {line[:200]!r}") from None
        if not answer.get("ok"):
            raise RunnerError(str(answer.get("error", "no reason given"))[:500])
        return answer

    def end(self) -> None:
        """Let it quit; one that does not is killed. May be called again."""
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
        said = [line.strip() for line in lines if line.strip()]
        return f"exit status {self.process.returncode}; {said[-1][:300] if said else 'it said nothing'}"


def start(spec: RunnerSpec, model: Mapping[str, Any], *, threads: int, log: Path, timeout_s: float = 1800) -> Runner:
    """Start a program and let it load a model.

    Args:
        spec: what to start.
        model: `name`, `checkpoint`, `folder` and `bundles`, as the protocol has it.
        log: file that its stderr goes to.

    Raises:
        RunnerError: it does not start, or cannot load.
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
    """Return the runners of other runtimes, each installed in its own environment, and why some are missing.

    Args:
        names: of the peers; none that is unknown or does not install stops the others.
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
        spare = (AUTO,) if name in CHOOSE_THEMSELVES and "fp32" in precisions else ()
        for precision in (*precisions, *spare):
            specs.append(RunnerSpec(name, precision, (str(python), str(PEERS / f"run_{name}.py"))))
    return specs, missing


def own_runners(precisions: Sequence[str], engines: Sequence[str] = OURS) -> list[RunnerSpec]:
    """Return this runtime in each precision, and torch as it is and compiled."""
    program = str(HERE / "run_chain.py")
    found = []
    for engine in engines:
        for precision in precisions if engine == "ours" else ("fp32",):
            rows = None if (engine, precision) == ("ours", "int8") else CHAIN_ROWS
            found.append(RunnerSpec(engine, precision, (sys.executable, program, engine), rows))
    return found
