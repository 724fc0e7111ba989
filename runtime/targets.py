"""What runs where: which backend this machine has, and which variant of each graph it gets.

Packages are found by their metadata; none is imported before a session is opened.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bridge_stg.runtime.bundle import Bundle
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.manifest import GraphSpec, Manifest
from bridge_stg.runtime.session import Session

STANDARD_SINCE = (1, 32)
"""First onnxruntime whose CPU kernels were shown to run the `standard` lowering: opset 24, in-place cache."""


@dataclass(frozen=True)
class Backend:
    """An engine that can run graphs.

    `distributions` are the packages that bring it, best first; `extra` is the pip extra that installs one. `variants`
    names, best first, the variants that its version can run. `open` makes one session.
    """

    name: str
    distributions: tuple[str, ...]
    extra: str
    variants: Callable[[tuple[int, ...]], tuple[str, ...]]
    open: Callable[[Bundle, GraphSpec, int | None], Session]

    def version(self) -> str | None:
        """Version of the installed package, or None if there is none."""
        for distribution in self.distributions:
            try:
                return importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None


@dataclass(frozen=True)
class Target:
    """The backend and the variant of each graph that were chosen for this machine."""

    backend: str
    version: str
    variants: Mapping[str, str]


def _onnxruntime_variants(version: tuple[int, ...]) -> tuple[str, ...]:
    return ("standard", "primitive") if version >= STANDARD_SINCE else ("primitive",)


def _open_onnxruntime(bundle: Bundle, graph: GraphSpec, threads: int | None) -> Session:
    from bridge_stg.runtime.onnxruntime_session import OnnxRuntimeSession

    return OnnxRuntimeSession(bundle.graph_path(graph.name, graph.variant), graph, threads=threads)


BACKENDS: tuple[Backend, ...] = (
    Backend(
        name="onnxruntime",
        distributions=("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"),
        extra="cpu",
        variants=_onnxruntime_variants,
        open=_open_onnxruntime,
    ),
)
"""Every backend, best first: `auto` takes the first that is installed and has a variant of every graph."""


def choose(
    manifest: Manifest, *, backend: str = "auto", variant: str | None = None, backends: tuple[Backend, ...] = BACKENDS
) -> Target:
    """Pick the backend, and a variant of each graph of the bundle.

    Args:
        backend: the name of a backend, or "auto".
        variant: the variant to use of every graph; None: the best that backend and bundle have in common.

    Raises:
        EngineError: the backend is unknown or not installed, or it cannot run what the bundle holds.
    """
    known = {b.name: b for b in backends}
    if backend != "auto" and backend not in known:
        raise EngineError(f"backend {backend!r} is unknown; known: auto, {', '.join(known)}.")
    candidates = list(backends) if backend == "auto" else [known[backend]]
    problems = []
    for candidate in candidates:
        version = candidate.version()
        if version is None:
            install = f'pip install "bridge-stg[{candidate.extra}]"'
            problems.append(f"backend {candidate.name!r} is not installed (install it with: {install})")
            continue
        runnable = candidate.variants(_numbers(version))
        chosen = {name: _variant_of(variants, runnable, variant) for name, variants in manifest.graphs.items()}
        complete = {name: v for name, v in chosen.items() if v is not None}
        if len(complete) == len(chosen):
            return Target(candidate.name, version, complete)
        name = next(name for name, v in chosen.items() if v is None)
        asked = f"variant {variant!r} was asked for, " if variant else ""
        problems.append(
            f"{asked}{candidate.name} {version} runs the variants {', '.join(runnable)}, and graph {name!r} of this "
            f"bundle has {', '.join(manifest.graphs[name])}"
        )
    raise EngineError(f"no backend can run this bundle here: {'; '.join(problems)}.")


def open_sessions(
    bundle: Bundle, *, backend: str = "auto", variant: str | None = None, threads: int | None = None
) -> dict[str, Session]:
    """Open every graph of a bundle on the target that `choose` picks. Return the sessions by graph name.

    Raises:
        EngineError: as `choose`, or the backend refuses a graph; the sessions opened so far are closed.
    """
    target = choose(bundle.manifest, backend=backend, variant=variant)
    chosen = next(b for b in BACKENDS if b.name == target.backend)
    sessions: dict[str, Session] = {}
    try:
        for name, picked in target.variants.items():
            sessions[name] = chosen.open(bundle, bundle.graph(name, picked), threads)
    except BaseException:
        for session in sessions.values():
            session.close()
        raise
    return sessions


def _variant_of(variants: Mapping[str, GraphSpec], runnable: tuple[str, ...], asked: str | None) -> str | None:
    wanted = runnable if asked is None else tuple(v for v in runnable if v == asked)
    return next((v for v in wanted if v in variants), None)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "1.32.0rc1" → (1, 32)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
