"""Replay an export in a process of its own: the engine's memory is then not on top of torch's, and is measured apart.

The first process records probes and golden cases and waits; the second one, which imports neither torch nor onnx, opens
one variant of one graph at a time and compares.
"""

from __future__ import annotations

import dataclasses
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
from bridge_stg.runtime.host.memory import peak_bytes
from bridge_stg.runtime.host.subprocess import run_in_subprocess
from bridge_stg.runtime.parity.compare import replay_cases

PURPOSE = "replays the bundle"
ADVICE = (
    "Nothing was written. Close other programs, or leave the comparison out with --no-verify and run `verify` on a "
    "larger machine"
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
        probes: folder with the recorded probes.
        golden: folders of golden cases.
        threads: CPU threads of the engine; None: its own choice.
        lean: whether the engine keeps no second copy of the weights; slower.

    Raises:
        EngineError: a graph cannot run, or the process failed; see `run_in_subprocess`.
    """
    job = {
        "graphs": [{"contract": dataclasses.asdict(contract), "file": str(file)} for contract, file in graphs],
        "probes": str(probes), "golden": [str(folder) for folder in golden],
        "options": {"threads": threads, "lean": lean},
    }  # fmt: skip
    result = run_in_subprocess("bridge_stg.export.parity.replay:replay", job, purpose=PURPOSE, advice=ADVICE)
    return Replayed(Parity.from_dict(result["parity"]), result["peak_rss_bytes"], result["seconds"])


def replay(job: dict[str, Any]) -> dict[str, Any]:
    """Replay the graphs of a job of `replay_in_subprocess`; return its result."""
    golden = [Path(case) for case in job["golden"]]
    parity, seconds = Parity((), {}), {}
    for entry in job["graphs"]:
        contract: GraphSpec = from_json(GraphSpec, entry["contract"], "contract")
        began = time.monotonic()
        parity += replay_graph(contract, Path(entry["file"]), Path(job["probes"]), golden, **job["options"])
        seconds[str(contract)] = time.monotonic() - began
    return {"parity": parity.to_dict(), "peak_rss_bytes": peak_bytes(), "seconds": seconds}


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
