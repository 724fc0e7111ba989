"""Build TensorRT engines of a bundle: select and check, compile, read the plan's layers, rename into place."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bridge_stg.export.engines.compile import Report, compile_graph
from bridge_stg.export.engines.inspector import inspected_kernels
from bridge_stg.export.engines.layers import GROUPS, graph_nodes, plan_summary, read_plan_report, report_by_block
from bridge_stg.export.engines.profiles import Deployment, GraphProfiles
from bridge_stg.export.engines.select_builds import LEAST_WORKSPACE, Build, check_room, select_builds
from bridge_stg.runtime.backends.tensorrt.engine_cache import PLAN, EngineEntry, read_engine
from bridge_stg.runtime.backends.tensorrt.engine_store import new_engine, publish, writable_folder
from bridge_stg.runtime.backends.tensorrt.library import TensorRT
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.host.memory import gigabytes, peak_bytes, reset_peak

TIMING = "timing.cache"
"""TensorRT's timings of kernels on this device, next to its engines."""


def build_engines(
    bundle: Bundle,
    targets: Sequence[str],
    *,
    graphs: Sequence[str] = (),
    variant: str | None = None,
    precision: str | None = None,
    deployment: Deployment | None = None,
    overrides: Mapping[str, Any] | None = None,
    where: str = "--profiles",
    check_memory: bool = True,
    overwrite: bool = False,
    family: str | None = None,
    exact_profiles: Mapping[str, GraphProfiles] | None = None,
    activations: Callable[[Build], int] = lambda build: LEAST_WORKSPACE,
    report: Report | None = None,
    say: Callable[[str], Any] = lambda line: None,
) -> list[EngineEntry]:
    """Compile graphs of a bundle for targets, and put the engines where the runtime finds them.

    Everything is checked before the first engine is compiled. An intact engine of the same key is not compiled again.

    Args:
        bundle: bundle of the graphs.
        targets: names of `targets.TARGETS`, or `this`.
        graphs: names of the graphs; empty for all.
        variant: variant of the graphs; None for that of each target.
        precision: expected precision of the bundle, which is not converted; None to accept any.
        deployment: frames per video and queries at once to build for; None for the defaults.
        overrides: result of `profiles.read_overrides`.
        where: file of the overrides, for messages.
        check_memory: whether to stop where the estimate exceeds the memory of this machine or the target.
        overwrite: whether to rebuild existing engines.
        family: TensorRT family for the target `this`, a key of `engine_cache.FAMILIES`; None for the first that is
            installed.
        exact_profiles: profiles by graph to use unchanged, instead of the defaults with `overrides`.
        activations: returns the bytes of tensors between layers, for the check of memory.
        report: called with phase, step and number of steps; may raise to stop.
        say: called with each line for the user.

    Raises:
        EngineError: a target, graph or precision is unknown or unsupported, TensorRT is missing or cannot compile a
            graph, memory is not sufficient, or nothing can be written.
    """
    builds: list[Build] = []
    for name in dict.fromkeys(targets):
        builds += select_builds(
            bundle, name, graphs=graphs, variant=variant, precision=precision,
            deployment=deployment or Deployment(), overrides=overrides, where=where, say=say, family=family,
            exact_profiles=exact_profiles,
        )  # fmt: skip
    if check_memory:
        for build in builds:
            check_room(build, activations(build))
    entries = []
    for build in builds:
        found = None if overwrite else _existing(bundle, build, say)
        entries.append(found or _compile(bundle, build, report, say))
    return entries


def _existing(bundle: Bundle, build: Build, say: Callable[[str], Any]) -> EngineEntry | None:
    """Return the engine that exists already, if it is intact."""
    try:
        found = read_engine(bundle, build.graph, build.key())
    except EngineError as error:
        say(str(error))
        return None
    if found is not None:
        say(f"{build.graph} for {build.target.name} exists already: {found.folder}")
    return found


def _compile(bundle: Bundle, build: Build, report: Report | None, say: Callable[[str], Any]) -> EngineEntry:
    graph, target, key = build.graph, build.target, build.key()
    folder = writable_folder(bundle)
    path = bundle.graph_path(graph.name, graph.variant)
    timing = folder / key.target / TIMING
    say(f"compiling {graph} ({graph.precision}) for {target.name}: {', '.join(build.profiles.profiles)}")
    began, is_alone = time.monotonic(), reset_peak()
    compiled = compile_graph(
        build.tensorrt,
        path,
        build.profiles.profiles,
        capacity=build.profiles.capacity,
        sms=target.sms if target.ahead_of_time else (),
        workspace=build.workspace_bytes,
        timing=timing.read_bytes() if timing.is_file() else b"",
        report=report,
    )
    with new_engine(folder) as partial:
        with open(partial / PLAN, "wb") as file:
            file.write(memoryview(compiled.plan))
        about: dict[str, Any] = {
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began, 2),
            "peak_memory_bytes": peak_bytes() if is_alone else None,
            "weight_bytes": build.weight_bytes,
            "activation_bytes": list(compiled.activations),
            "cache_row_bytes": build.cache_bytes,
            "python": sys.version.split()[0],
            "layers": _layers(build, partial / PLAN, compiled.plan, path, say),
        }
        made = EngineEntry(
            key=key, target=target.name, graph=graph.name, variant=graph.variant, precision=graph.precision,
            profiles=build.profiles.profiles, capacity=build.profiles.capacity, inputs=graph.inputs,
            outputs=graph.outputs, size=0, sha256="", built=about,
        )  # fmt: skip
        entry = publish(partial, made)
    if compiled.timing is not None:
        timing.parent.mkdir(parents=True, exist_ok=True)
        with replacing(timing) as temporary:
            temporary.write_bytes(compiled.timing)
    return entry


def _layers(build: Build, file: Path, plan: Any, graph: Path, say: Callable[[str], Any]) -> Any:
    """Return the layers of an engine by block, read from its plan or with TensorRT on this device; None if neither."""
    try:
        return read_plan_report(file, graph)
    except EngineError as error:
        if build.target.ahead_of_time:
            say(str(error))
            return None
    try:
        kernels = inspected_kernels(TensorRT(build.target.family, build.tensorrt), plan)
        return report_by_block([kernels], graph_nodes(graph))
    except Exception as error:  # noqa: BLE001  # an engine is worth more than the report about it
        say(f"{build.graph}: {error}")
        return None


def engine_line(entry: EngineEntry) -> str:
    """Describe an engine in one line."""
    built = entry.built
    counts = plan_summary(built["layers"]) if built.get("layers") else {}
    layers = "".join(
        f"; {GROUPS[group]}: {', '.join(f'{n} {word}' for word, n in words.items())}" for group, words in counts.items()
    )
    peak = built.get("peak_memory_bytes")
    memory = f", peak {gigabytes(peak)}" if peak else ""
    seconds = math.ceil(float(built.get("seconds", 0)))
    head = f"{entry.graph} ({entry.variant}, {entry.precision}) for {entry.target}"
    return f"{head}: {gigabytes(entry.size)}, {seconds} s{memory}{layers}"
