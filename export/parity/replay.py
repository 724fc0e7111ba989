"""Replay an export in a process of its own: the engine's memory is then not on top of torch's, and is measured apart.

The first process records probes and golden cases and waits; the second one, which imports neither torch nor onnx, opens
one variant of one graph at a time and compares. They speak through JSON files in a folder.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge_stg.export.parity.parity import Parity, measure
from bridge_stg.export.parity.probes import load_probes
from bridge_stg.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.bundle.typed_json import from_json
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.peak import peak_bytes
from bridge_stg.runtime.parity.compare import replay_cases

JOB, RESULT = "job.json", "result.json"
START = (
    "import json, sys; paths, job = json.loads(sys.argv[1]); sys.path[:] = paths; "
    "from bridge_stg.export.parity.replay import main; sys.exit(main(job))"
)


@dataclass(frozen=True)
class Replayed:
    """What the second process found.

    Attributes:
        parity: of every variant.
        peak_rss_bytes: the most memory it held.
        seconds: by `graph (variant)`, for loading and running it.
    """

    parity: Parity
    peak_rss_bytes: int
    seconds: dict[str, float]


def replay_in_subprocess(
    graphs: Sequence[tuple[GraphSpec, Path]],
    probes: Path,
    golden: Sequence[Path],
    *,
    threads: int | None = None,
    lean: bool = False,
) -> Replayed:
    """Replay graphs in a second process.

    Args:
        graphs: contract and .onnx file of each, in the order of the chain.
        probes: folder with the recorded probes; what the two processes say to each other goes there too.
        golden: folders of golden cases.
        threads: CPU threads of the engine; None: its own choice.
        lean: whether the engine keeps no second copy of the weights; slower.

    Raises:
        EngineError: the process failed; the message holds its last line.
    """
    job = {
        "graphs": [{"contract": dataclasses.asdict(contract), "file": str(file)} for contract, file in graphs],
        "probes": str(probes), "golden": [str(folder) for folder in golden],
        "options": {"threads": threads, "lean": lean},
    }  # fmt: skip
    (probes / JOB).write_text(json.dumps(job), encoding="utf-8")
    arguments = json.dumps([[path or "." for path in sys.path], str(probes)])
    done = subprocess.run(
        [sys.executable, "-c", START, arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise EngineError(_failure(done.returncode, done.stderr))
    result = json.loads((probes / RESULT).read_text(encoding="utf-8"))
    return Replayed(Parity.from_dict(result["parity"]), result["peak_rss_bytes"], result["seconds"])


def main(folder: str) -> int:
    """Do what the job in a folder says, and write its result there. Return the exit code."""
    probes = Path(folder)
    job = json.loads((probes / JOB).read_text(encoding="utf-8"))
    golden = [Path(case) for case in job["golden"]]
    parity, seconds = Parity((), {}), {}
    try:
        for entry in job["graphs"]:
            contract: GraphSpec = from_json(GraphSpec, entry["contract"], "contract")
            began = time.monotonic()
            parity += replay_graph(contract, Path(entry["file"]), probes, golden, **job["options"])
            seconds[str(contract)] = time.monotonic() - began
    except EngineError as error:
        print(error, file=sys.stderr)
        return 2
    result: dict[str, Any] = {"parity": parity.to_dict(), "peak_rss_bytes": peak_bytes(), "seconds": seconds}
    (probes / RESULT).write_text(json.dumps(result), encoding="utf-8")
    return 0


def replay_graph(
    contract: GraphSpec,
    file: Path,
    probes: Path,
    golden: Sequence[Path],
    *,
    threads: int | None = None,
    lean: bool = False,
) -> Parity:
    """Open one variant of a graph, run its probes and its part of the golden cases, and close it."""
    with OnnxRuntimeSession(file, contract, threads=threads, lean=lean) as session:
        parity = measure(load_probes(probes, contract.name), {contract.variant: session})
        replayed = replay_cases(golden, {contract.name: session}, graphs=(contract.name,))
    named = []
    for boundary in replayed:
        call, _, tensor = boundary.name.rpartition(".")
        name = f"{contract.name}.{tensor} ({contract.variant}; golden {call})"
        named.append(dataclasses.replace(boundary, name=name))
    return parity + Parity(tuple(named), {})


def _failure(code: int, stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    if code == 2 and lines:
        return lines[-1]
    if code < 0:
        why = "most likely it ran out of memory" if code == -9 else "its engine crashed"
        return (
            f"the process that replays the bundle was ended by signal {-code}: {why}. Nothing was written. Close other "
            "programs, or leave the comparison out with --no-verify and run `verify` on a larger machine"
        )
    return f"the process that replays the bundle failed: {lines[-1] if lines else f'exit code {code}'}"
